"""The task of a user's own objects: loaders, a loss, and functions that score a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.core.errors import CompressorError
from compressor.core.metrics import AGREEMENT, SCORE, Metric
from compressor.core.plugins import raised_at, shown
from compressor.models.computed import evaluated
from compressor.training.feeds import Feed
from compressor.training.likeness import Likeness, Recorded, same_shapes
from compressor.training.loaders import InputsOfBatch, Loader, Memory
from compressor.training.losses import logits_of
from compressor.training.randomness import own_randomness
from compressor.training.task import Losses, Precision, Task
from export.convert.trees import channels_last, moved, outputs_of, tensors_in

if TYPE_CHECKING:
    from compressor.training.settings import TrainSettings

Loss = Callable[[nn.Module, Any], Tensor]
Score = Callable[[nn.Module], float]
GOALS_LIMIT = 2**30
"""Bytes of the dense network's outputs that are held; candidates are compared on the inputs of these only."""


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch of (inputs, labels) if the user gives none."""
    inputs, labels = batch
    return functional.cross_entropy(logits_of(model(inputs)), labels)


class OwnTask(Task):
    """What a user's functions and loaders say.

    Args:
        inputs: Finds the network's inputs in a batch.
        train: Batches to train on; None for those of `calibration`, without labels, if there are any.
        loss: Loss of a training batch; None without training batches.
        calibration: Inputs for batch norm, compensation and INT8; None if there are none.
        search, test: Inputs on which candidates and the delivered network are compared with the dense one where there
            is no function for it.
        evaluate, score: Functions that score candidates, and the reported one; None for the comparison.
        likeness: The comparison of outputs.
        dense: What `evaluate` gives for the dense network.
        share: Whether `score` gives shares from 0 to 1.
        seed: Seed of what the functions draw.
        split: Name of the split of the reported score.
    """

    def __init__(
        self,
        inputs: InputsOfBatch,
        *,
        train: Loader | None,
        loss: Loss | None,
        calibration: Memory | None,
        search: Memory | None,
        test: Memory | None,
        evaluate: Score | None,
        score: Score | None,
        likeness: Likeness,
        dense: float = 0.0,
        share: bool = True,
        seed: int = 0,
        split: str = "test",
    ) -> None:
        self.train: Any = calibration if train is None else train
        self.calibration, self.search, self.test = calibration, search, test
        self.labelled = train is not None
        self.metric = Metric(AGREEMENT) if score is None else Metric(SCORE, share)
        self.example = inputs.example
        self._inputs, self._loss, self._likeness = inputs, loss, likeness
        self._evaluate, self._score = evaluate, score
        self._dense, self._seed, self.split = dense, seed, split

    # ---------------------------------------------------------------- training
    def losses(
        self,
        model: nn.Module,
        batch: Any,
        teacher: nn.Module | None,
        settings: TrainSettings,
        precision: Precision,
    ) -> Losses:
        count = len(tensors_in(batch)[0])
        if self._loss is None:
            assert teacher is not None  # checked before the run begins
            arguments = channels_last(self.train.inputs(batch))
            with precision():
                found = outputs_of(model(*arguments))
            return Losses(None, self._distance(found, teacher, (arguments, {}), settings, precision), count)
        with Recorded(model) as call, precision():
            loss = self._loss(model, batch)
        distilled = None
        if teacher is not None and call.arguments is not None:
            found = outputs_of(call.output)
            distilled = self._distance(found, teacher, call.arguments, settings, precision)
        return Losses(loss.float(), distilled, count)

    def _distance(
        self,
        found: list[Tensor],
        teacher: nn.Module,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        settings: TrainSettings,
        precision: Precision,
    ) -> Tensor | None:
        with torch.no_grad(), precision():
            goals = outputs_of(teacher(*arguments[0], **arguments[1]))
        return self._likeness.distance(found, goals, settings.temperature) if same_shapes(found, goals) else None

    def gradients(self, device: str | torch.device, seed: int) -> Any:
        loss, train = self._loss, self.train
        if loss is None or train is None:
            return None
        with own_randomness(seed, torch.device(device)):
            batches = [batch for _, batch in zip(range(2), train.batches(128, device=device), strict=False)]
        return lambda model: torch.stack([loss(model, batch) for batch in batches]).mean()

    # ---------------------------------------------------------------- scores
    def search_goals(
        self, dense: nn.Module, feed: Feed | None, *, device: str | torch.device, batch_size: int
    ) -> list[list[Tensor]] | None:
        if self._evaluate is not None or feed is None:
            return None
        return self._goals(dense, feed, device, batch_size)

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
        if self._evaluate is not None:
            return self.unit(self.called("evaluate", self._evaluate, model, device))
        assert feed is not None
        return self._likeness.closeness(self._pairs(model, feed, goals, device, batch_size))

    def unit(self, value: float) -> float:
        """Map a value of `evaluate` to 0..1 without changing the order: candidates are rewarded by it.

        Where the dense network's value is a share, others are cut off at 0 and 1. Else the dense value is 0.5, and a
        difference of a tenth of it counts as much as halving the distance to 0 or 1 by a factor of e.
        """
        if math.isnan(value):
            return 0.0
        if 0 <= self._dense <= 1:
            return min(max(value, 0.0), 1.0)
        difference = (value - self._dense) / max(abs(self._dense) / 10, 1e-12)
        return 0.5 * math.exp(difference) if difference < 0 else 1 - 0.5 * math.exp(-difference)

    def on_search(self) -> OwnTask:
        other = copy.copy(self)
        other.test, other._score = self.search, self._evaluate
        other.metric = Metric(AGREEMENT) if self._evaluate is None else Metric(SCORE, 0 <= self._dense <= 1)
        return other

    def on_calibration(self, seed: int) -> Task | None:
        return super().on_calibration(seed) if self._evaluate is None else None

    @property
    def test_inputs(self) -> int | None:
        """Number of inputs of which a share is reported; other agreements are no shares of a number."""
        return None if self.test is None or not self._likeness.counts else len(self.test)

    def test_goals(self, dense: nn.Module, device: str | torch.device) -> list[list[Tensor]] | None:
        if self._score is not None or self.test is None:
            return None
        return self._goals(dense, self.test, device, 64)

    def test_score(self, model: nn.Module, goals: Any, device: str | torch.device) -> float:
        if self._score is not None:
            value = self.called("test", self._score, model, device)
            if not math.isfinite(value):
                raise CompressorError(
                    f"The reported score is {value}: its function must return a finite number.",
                    "Correct test (or evaluate, where there is no test), then resume.",
                )
            return value
        assert self.test is not None
        return self._likeness.agreement(self._pairs(model, self.test, goals, device, 64))

    def file_score(
        self, path: Path, network: nn.Module, goals: Any, advance: Callable[[int], None]
    ) -> float | None:
        from export.convert.module import OnnxModule

        try:
            return self.test_score(OnnxModule(path, network, self.example), goals, "cpu")
        except CompressorError:  # a function may use more of the network than its forward
            return None

    def file_judge(self, number: int, seed: int, network: nn.Module) -> Callable[[Path], float]:
        from export.convert.module import OnnxModule

        feed = None if self.search is None else self.search.sample(number, seed)
        device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
        goals = self.search_goals(network, feed, device=device, batch_size=64)

        def judged(path: Path) -> float:
            module = OnnxModule(path, network, self.example)
            return self.search_score(module, feed, goals, device="cpu", batch_size=64)

        return judged

    def called(self, name: str, function: Score, model: nn.Module, device: str | torch.device) -> float:
        """Return what a user's function gives for a network in evaluation mode.

        Raises:
            CompressorError: It raises, or returns something else than a number.
        """
        try:
            randomness = own_randomness(self._seed, torch.device(device))
            with evaluated(model), torch.no_grad(), randomness, at_home(model):
                found: Any = function(model)
        except CompressorError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise CompressorError(
                f"{name} raises {shown(error)}{raised_at(error)}.",
                f"{name}(model) is called with a network in evaluation mode on {device} and returns a number.",
            ) from error
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, Real):
            raise CompressorError(
                f"{name} returned {type(found).__name__}, expected a number.", "Higher should be better."
            )
        return float(found)

    def _goals(
        self, dense: nn.Module, feed: Feed, device: str | torch.device, batch_size: int
    ) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []
        size = 0
        for goals in self._outputs(dense, feed, device, batch_size):
            found.append(goals)
            size += sum(each.nbytes for each in goals)
            if size > GOALS_LIMIT:
                break
        return found

    def _pairs(
        self, model: nn.Module, feed: Feed, goals: list[list[Tensor]], device: str | torch.device, batch_size: int
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        yield from zip(self._outputs(model, feed, device, batch_size), goals, strict=False)

    def _outputs(
        self, model: nn.Module, feed: Feed, device: str | torch.device, batch_size: int
    ) -> Iterator[list[Tensor]]:
        with evaluated(model), torch.no_grad():
            for batch in feed.batches(batch_size, device=device):
                yield [each.cpu() for each in outputs_of(model(*channels_last(feed.inputs(batch))))]


@contextmanager
def at_home(model: nn.Module) -> Iterator[None]:
    """Let a network on an accelerator take inputs from the CPU, and return its outputs there."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    homes: list[torch.device] = []

    def leave(_: nn.Module, args: Any, kwargs: Any) -> Any:
        homes.append(next((tensor.device for tensor in tensors_in([args, kwargs])), device))
        return moved(args, device), moved(kwargs, device)

    def come_back(_: nn.Module, args: Any, output: Any) -> Any:
        return moved(output, homes.pop())

    if device.type == "cpu":
        yield
        return
    hooks = [
        model.register_forward_pre_hook(leave, with_kwargs=True), model.register_forward_hook(come_back)
    ]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def counted(batches: Iterable[Any]) -> int:
    """Return the number of batches; they are read once if they do not say it."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in batches)
