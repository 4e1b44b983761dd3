"""Mixup and cutmix: batches whose images and labels are combined in pairs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def mixed(
    images: torch.Tensor, labels: torch.Tensor, classes: int, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch in which each image is combined with the one before it, and its labels with that one's.

    All pairs of a batch have the same share, drawn from Beta(alpha, alpha) by torch's global generator. With both, each
    batch has one of the two.

    Args:
        images: (N, C, H, W).
        labels: int64 (N,).
        classes: Number of classes.
        mixup: Alpha of weighted means ("mixup: Beyond empirical risk minimization", Zhang et al., 2017); 0 for none.
        cutmix: Alpha of rectangles of the other image ("CutMix", Yun et al., 2019); 0 for none.

    Returns:
        Images as before, and the shares of the classes, float32 (N, classes).
    """
    second = cutmix > 0 and (not mixup or bool(torch.rand(()) < 0.5))
    found: tuple[torch.Tensor, torch.Tensor] = _mix(second, cutmix if second else mixup, classes)(images, labels)
    return found


@cache
def _mix(cut: bool, alpha: float, classes: int) -> Any:
    from torchvision.transforms import v2

    return (v2.CutMix if cut else v2.MixUp)(alpha=alpha, num_classes=classes)
