"""A few steps of training on a candidate before it is scored."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import nn

from compressor.core.errors import CompressorError
from compressor.data import DataBundle
from compressor.training.loop import Trainer, _own_randomness
from compressor.training.settings import TrainSettings


class BriefTraining:
    """Trains networks in place for a few steps, each on the same images in the same order.

    Args:
        data: Data whose training split is used.
        settings: As for any training; the learning rate is the same in all steps, and nothing is averaged.
        seed: Seed of order and augmentation.
        device: Device of the networks.
        rate_field: Recipe field with which the user can lower the learning rate.

    Raises:
        CompressorError: A network's loss is not finite.
    """

    def __init__(
        self,
        data: DataBundle,
        settings: TrainSettings,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        rate_field: str = "training.finetune_learning_rate",
    ) -> None:
        self._data, self._seed, self._device, self._rate_field = data, seed, device, rate_field
        self._settings = dataclasses.replace(settings, ema_decay=0.0)

    def __call__(self, model: nn.Module, steps: int) -> None:
        """Train `model` for `steps` minibatches."""
        _Brief(
            model,
            self._data,
            self._settings,
            epochs=1,
            seed=self._seed,
            device=self._device,
            rate_field=self._rate_field,
        ).run_steps(steps)


class _Brief(Trainer):
    def run_steps(self, steps: int) -> None:
        self._wrapped.train()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        with _own_randomness(self._epoch_seed(), self.device):
            batches = itertools.chain.from_iterable(self._batches() for _ in itertools.count())
            for images, labels in itertools.islice(batches, steps):
                sums += self._step(images, labels, self.settings.learning_rate)
        if not torch.isfinite(sums).all():
            rate = self.settings.learning_rate
            raise CompressorError(
                f"The loss of a candidate became NaN or infinite in its {steps} steps of training at a learning rate "
                f"of {rate:g}.",
                f"Continue with a lower rate: compress --resume RUN --set {self._rate_field}={rate / 5:g}",
            )
        self.model.eval()
