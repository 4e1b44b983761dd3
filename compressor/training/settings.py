"""Training settings, the learning-rate schedule, and defaults by data set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from compressor.core.errors import CompressorError

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainSettings:
    """How weights are trained: an optimizer, and a schedule over the whole training.

    Attributes:
        batch_size: Images in a step, over all processes together.
        learning_rate: Highest learning rate of the schedule.
        momentum: Momentum factor of SGD.
        weight_decay: L2 penalty on kernels, for AdamW decoupled from the gradient; biases and batch norm have none.
        schedule: "cosine" to zero, or "step": a tenth after 50 % and a hundredth after 75 % of the steps.
        warmup_share: Share of all steps in which the rate rises from zero.
        label_smoothing: Share of the target that is spread over all classes.
        grad_clip: Maximum norm of the gradient; 0 for no limit.
        mixed_precision: "no" (float32), "bf16" or "fp16" (with loss scaling) for the forward and backward
            pass.
        temperature: Softmax temperature of distillation, if there is a teacher.
        ema_decay: Decay of the averaged weights per step; 0 for no average.
        optimizer: "sgd", with Nesterov momentum, or "adamw".
        accumulation: Parts in which a batch goes through the network; their gradients are added.
        mixup, cutmix: Alpha of the distribution from which the share of the other image is drawn; 0 for none.
        channels_last: Whether kernels are held channels last during an epoch.
        compile: Whether torch.compile compiles the network.
    """

    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_share: float = 0.05
    label_smoothing: float = 0.0
    grad_clip: float = 0.0
    mixed_precision: Precision = "no"
    temperature: float = 4.0
    ema_decay: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    accumulation: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise CompressorError(f"Training needs batches of at least 2 images, got {self.batch_size}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise CompressorError(f"The learning rate must be positive, got {self.learning_rate}.")
        if not 1 <= self.accumulation <= self.batch_size // 2:
            raise CompressorError(
                f"A batch of {self.batch_size} images cannot be divided into {self.accumulation} parts of 2 or more."
            )
        if not 0 <= self.warmup_share < 1 or not 0 <= self.ema_decay < 1:
            raise CompressorError("warmup_share and ema_decay are shares of at least 0 and less than 1.")

    def learning_rate_at(self, share: float) -> float:
        """Return the learning rate when `share` (0..1) of all steps are done."""
        if share < self.warmup_share:
            return self.learning_rate * max(share / self.warmup_share, 0.02)
        if self.schedule == "step":
            return self.learning_rate * (1.0 if share < 0.5 else 0.1 if share < 0.75 else 0.01)
        passed = (share - self.warmup_share) / (1 - self.warmup_share)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(passed, 1.0)))
