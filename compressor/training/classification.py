"""The task of classifying images: top-1 accuracy, cross-entropy, and distillation of the classes' scores.

Without labels the dense network's answers take their place: networks are scored by their agreement with them, and are
trained by distillation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from compressor.core.metrics import AGREEMENT, Metric
from compressor.data import DataBundle, Preprocessing, Split
from compressor.training.losses import distillation_loss, logits_of
from compressor.training.mixing import mixed
from compressor.training.scoring import accuracy, closeness, log_probabilities, predictions
from compressor.training.task import Losses, Precision, Task
from export.convert.trees import channels_last

if TYPE_CHECKING:
    from compressor.training.feeds import Feed
    from compressor.training.settings import TrainSettings


class Classification(Task):
    """Images by class.

    Args:
        train, search, test: Its splits; None for one that is not needed.
        measure: What candidates are scored by: "accuracy", or "closeness" to the dense network's outputs, for which
            labels are not used.
        facts: Classes and preprocessing, for the network's files.
        labelled: Whether the labels mean anything.
    """

    train: Split | None
    search: Split | None
    test: Split | None
    calibration: Split | None
    portable = True

    def __init__(
        self,
        train: Split | None = None,
        search: Split | None = None,
        test: Split | None = None,
        *,
        measure: str = "accuracy",
        facts: dict[str, Any] | None = None,
        labelled: bool = True,
    ) -> None:
        self.train, self.search, self.test, self.calibration = train, search, test, train
        self.measure, self.labelled = measure, labelled
        self.metric = Metric() if labelled else Metric(AGREEMENT)
        self._facts = facts or {}
        self.classes = len(self._facts.get("classes", ()))

    @property
    def example(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (torch.zeros(1, *self.preprocessing.input_shape),)

    @property
    def preprocessing(self) -> Preprocessing:
        """How its images become inputs; the same in all splits."""
        assert self.train is not None
        return self.train.preprocessing

    @classmethod
    def of(cls, data: DataBundle, measure: str = "accuracy") -> Classification:
        """Return the task of a data set."""
        return cls(data.train, data.search, data.test, measure=measure, facts=data.facts(), labelled=bool(data.classes))

    def losses(
        self,
        model: nn.Module,
        batch: Any,
        teacher: nn.Module | None,
        settings: TrainSettings,
        precision: Precision,
    ) -> Losses:
        images, labels = batch
        targets = labels
        if mixes := settings.mixup > 0 or settings.cutmix > 0:
            images, targets = mixed(images, labels, max(1, self.classes), settings.mixup, settings.cutmix)
        # Convolutions are fastest in this layout on CPUs with vector units and GPUs with tensor cores.
        images = channels_last(images)
        with precision():
            logits = model(images)
        logits = logits_of(logits)
        loss = None
        if self.labelled:
            loss = functional.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
        distilled = None
        if teacher is not None:
            with torch.no_grad(), precision():
                answers = teacher(images)
            distilled = distillation_loss(logits, answers, settings.temperature)
        right = None
        if self.labelled and not mixes:  # an image of two classes has no right answer
            right = (logits.argmax(dim=1) == labels).sum()
        return Losses(loss, distilled, len(labels), right)

    def gradients(self, device: str | torch.device, seed: int) -> Any:
        return self._batches(device, seed) if self.labelled else None

    def reconstruction(self, device: str | torch.device, seed: int) -> Any:
        return None if self.labelled else self._batches(device, seed)  # those of the gradients serve as well

    def _batches(self, device: str | torch.device, seed: int) -> list[Any]:
        assert self.train is not None
        stream = self.train.batches(128, shuffle_seed=seed, device=device)
        return [batch for _, batch in zip(range(2), stream, strict=False)]

    def search_goals(
        self, dense: nn.Module, feed: Feed | None, *, device: str | torch.device, batch_size: int
    ) -> torch.Tensor | None:
        if self.measure == "accuracy":
            return None
        assert isinstance(feed, Split)
        return log_probabilities(dense, feed, device=device, batch_size=batch_size)

    def search_score(
        self,
        model: nn.Module,
        feed: Feed | None,
        goals: Any,
        *,
        device: str | torch.device,
        batch_size: int,
        floor: float | None = None,
    ) -> float:
        assert isinstance(feed, Split)
        if self.measure == "accuracy":
            return accuracy(model, feed, device=device, batch_size=batch_size, floor=floor)
        return closeness(model, feed, goals, device=device, batch_size=batch_size, floor=floor)

    def test_goals(self, dense: nn.Module, device: str | torch.device) -> torch.Tensor | None:
        assert self.test is not None
        return None if self.labelled else predictions(dense, self.test, device=device)[0]

    def test_score(self, model: nn.Module, goals: Any, device: str | torch.device) -> float:
        assert self.test is not None
        if self.labelled:
            return accuracy(model, self.test, device=device)
        return float((predictions(model, self.test, device=device)[0] == goals).double().mean())

    def answers(
        self, model: nn.Module, device: str | torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        assert self.test is not None
        return None if not self.labelled else predictions(model, self.test, device=device)

    def file_score(
        self, path: Path, network: nn.Module, goals: Any, advance: Callable[[int], None]
    ) -> float:
        from export.convert.ort import accuracy_onnx

        return accuracy_onnx(path, self._test_batches(goals, advance), threads=torch.get_num_threads())

    def file_answers(self, path: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
        from export.convert.ort import answers_onnx

        if not self.labelled:
            return None
        found = answers_onnx(path, self._test_batches(None, lambda _: None), threads=torch.get_num_threads())
        return torch.as_tensor(found[0]), torch.as_tensor(found[1])

    def _test_batches(self, goals: Any, advance: Callable[[int], None]) -> Iterator[tuple[Any, Any]]:
        """Yield the test inputs, and the labels or the dense network's answers (`goals`), as arrays."""
        assert self.test is not None
        seen = 0
        for x, y in self.test.batches(256, device="cpu"):
            labels = y if self.labelled else goals[seen : seen + len(y)]
            yield x.numpy(), labels.numpy()
            seen += len(y)
            advance(len(y))

    def file_judge(self, number: int, seed: int, network: nn.Module) -> Callable[[Path], float]:
        from export.convert.ort import accuracy_onnx

        assert self.search is not None
        sample = self.search.sample(number, seed)
        batches = [(x.numpy(), y.numpy()) for x, y in sample.batches(256)]
        device = next(network.parameters()).device
        if not self.labelled:  # what the file loses is measured against the network that it was exported from
            answers = torch.split(predictions(network, sample, device=device)[0], 256)
            batches = [(x, y.numpy()) for (x, _), y in zip(batches, answers, strict=True)]
        threads = torch.get_num_threads()
        return lambda file: accuracy_onnx(file, batches, threads=threads)

    def spread(self, number: int, seed: int) -> dict[str, int]:
        assert self.calibration is not None
        if not self.labelled:
            return {}
        labels = self.calibration.sample(number, seed).labels
        return dict(zip(self._facts["classes"], labels.bincount(minlength=self.classes).tolist(), strict=True))

    def facts(self) -> dict[str, Any]:
        return self._facts
