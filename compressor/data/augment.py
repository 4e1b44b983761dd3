"""Augmentation of whole batches as tensor operations, with a generator of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from compressor.data.preprocessing import SMALL, Preprocessing


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        shift: Maximum shift in pixels, in each direction; the new border is black.
        flip: Whether to mirror every second image horizontally.
        smallest_crop: Minimum share of the area that a random crop keeps before scaling back; 1 for no crop.
        interpolation: How crops are scaled: "nearest", "bilinear" or "bicubic".
    """

    shift: int = 0
    flip: bool = False
    smallest_crop: float = 1.0
    interpolation: str = "bilinear"

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment uint8 (N, C, H, W) on the CPU; the input is unchanged."""
        if self.smallest_crop < 1:
            images = _random_crops(images, self.smallest_crop, self.interpolation, generator)
        if self.shift:
            images = _random_shifts(images, self.shift, generator)
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


def augmentation_for(preprocessing: Preprocessing) -> Augmentation:
    """Return the usual augmentation for photographs: shifts by an eighth if small, random crops if large."""
    size, interpolation = min(preprocessing.sides), preprocessing.interpolation
    if size <= SMALL:
        return Augmentation(shift=max(1, size // 8), flip=True)
    crops = "bicubic" if interpolation == "lanczos" else interpolation  # torch has no lanczos
    return Augmentation(flip=True, smallest_crop=0.35, interpolation=crops)


def _random_shifts(images: torch.Tensor, reach: int, generator: torch.Generator) -> torch.Tensor:
    count, _, height, width = images.shape
    padded = functional.pad(images, (reach, reach, reach, reach))
    offsets = torch.randint(0, 2 * reach + 1, (count, 2), generator=generator).tolist()
    # A loop of slices is several times faster than one gather: each slice is copied row by row.
    out = torch.empty_like(images)
    for index, (top, left) in enumerate(offsets):
        out[index] = padded[index, :, top : top + height, left : left + width]
    return out


def _random_crops(
    images: torch.Tensor, smallest: float, interpolation: str, generator: torch.Generator
) -> torch.Tensor:
    """Crop random areas with an aspect ratio between 3:4 and 4:3, and scale them back."""
    count = len(images)
    area = smallest + (1 - smallest) * torch.rand(count, generator=generator)
    ratio = torch.exp((2 * torch.rand(count, generator=generator) - 1) * torch.tensor(4 / 3).log())
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    centre = 2 * torch.rand(count, 2, generator=generator) - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = centre[:, 0] * (1 - width), centre[:, 1] * (1 - height)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    sampled = functional.grid_sample(
        images.float(), grid, mode=interpolation, padding_mode="border", align_corners=False
    )
    return sampled.round_().clamp_(0, 255).to(torch.uint8)  # bicubic overshoots
