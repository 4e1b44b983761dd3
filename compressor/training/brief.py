"""A few steps of training on a candidate before it is scored."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from compressor.data import DataBundle
from compressor.training.loop import Trainer, _own_randomness
from compressor.training.settings import TrainSettings


class BriefTraining:
    """Trains networks in place for a few steps, each on the same images in the same order.

    Args:
        data: its training split is used.
        settings: as for any training; the learning rate is the same in all steps.
        seed: of order and augmentation.
        device: where the networks lie.
    """

    def __init__(
        self, data: DataBundle, settings: TrainSettings, *, seed: int, device: str | torch.device = "cpu"
    ) -> None:
        self._data, self._settings, self._seed, self._device = data, settings, seed, device

    def __call__(self, model: nn.Module, steps: int) -> None:
        """Train `model` for `steps` minibatches."""
        if steps:
            _Brief(
                model, self._data, self._settings, epochs=1, seed=self._seed, device=self._device
            ).run_steps(steps)


class _Brief(Trainer):
    def run_steps(self, steps: int) -> None:
        self._wrapped.train()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        with _own_randomness(self._epoch_seed(), self.device):
            batches = itertools.chain.from_iterable(self._batches() for _ in itertools.count())
            for images, labels in itertools.islice(batches, steps):
                sums += self._step(images, labels, self.settings.learning_rate)
        self._check(sums)
        self.model.eval()
