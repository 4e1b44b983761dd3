"""What segmentation and detection have in common: pictures with a target each, and a score of a whole split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.data import DataBundle, Split
from compressor.training.randomness import own_randomness
from compressor.training.settings import TrainSettings
from compressor.training.task import Task

if TYPE_CHECKING:
    from compressor.training.feeds import Feed

_PIXELS = 128 * 64 * 64
"""Pixels of a batch where nothing is trained."""


class SceneTask(Task):
    """Pictures with targets, scored by one number over all of them.

    Args:
        data: The data set, with a target for each picture.
    """

    train: Split | None
    search: Split | None
    test: Split | None
    calibration: Split | None

    def __init__(self, data: DataBundle) -> None:
        self.train, self.search, self.test, self.calibration = data.train, data.search, data.test, data.train
        self._facts = data.facts()
        channels, height, width = data.input_shape
        self.example = (torch.zeros(1, channels, height, width),)
        self.batch_size = max(4, min(128, _PIXELS // (height * width)))

    @abstractmethod
    def score(
        self,
        model: nn.Module,
        split: Split,
        device: str | torch.device,
        advance: Callable[[int], None] = lambda _: None,
    ) -> float:
        """Return the score of a network on a split, 0..1; its training mode is restored.

        Args:
            model: Network on `device`, or its ONNX file as a module.
            split: Pictures with targets.
            device: Device of the batches.
            advance: Receives the number of pictures after each batch.
        """

    def gradients(self, device: str | torch.device, seed: int) -> Any:
        assert self.train is not None
        stream = self.train.batches(self.batch_size, shuffle_seed=seed, device=device)
        batches = [batch for _, batch in zip(range(2), stream, strict=False)]

        def loss(model: nn.Module) -> torch.Tensor:
            with own_randomness(seed, torch.device(device)):
                found = [self.losses(model, batch, None, TrainSettings(), nullcontext).loss for batch in batches]
            return torch.stack([each for each in found if each is not None]).mean()

        return loss

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
        return self.score(model, feed, device)

    def test_score(self, model: nn.Module, goals: Any, device: str | torch.device) -> float:
        assert self.test is not None
        return self.score(model, self.test, device)

    def file_score(self, path: Path, network: nn.Module, goals: Any, advance: Callable[[int], None]) -> float:
        from export.convert.module import OnnxModule

        assert self.test is not None
        return self.score(OnnxModule(path, network, self.example), self.test, "cpu", advance)

    def file_judge(self, number: int, seed: int, network: nn.Module) -> Callable[[Path], float]:
        from export.convert.module import OnnxModule

        assert self.search is not None
        sample = self.search.sample(number, seed)
        return lambda path: self.score(OnnxModule(path, network, self.example), sample, "cpu")

    def facts(self) -> dict[str, Any]:
        return self._facts
