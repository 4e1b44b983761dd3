"""Augmentation of training images: random changes that follow from seeds alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from compressor.data.images import pixels
from compressor.data.preprocessing import SMALL, Preprocessing
from compressor.data.reader import place_seed

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_CROP = 0.08
"""Smallest share of a photograph's area that a random crop keeps, as timm and torchvision train on ImageNet."""
RATIOS = (3 / 4, 4 / 3)
"""Aspect ratios of random crops, width over height."""
RAND_AUGMENT_OPERATIONS = 2
RAND_AUGMENT_MAGNITUDES = 31


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        shift: Maximum shift in pixels, in each direction; the new border is black.
        flip: Whether to mirror every second image horizontally.
        smallest_crop: Minimum share of the area of the whole picture that a random crop keeps before it is scaled to
            the input's size; 1 for no crop.
        interpolation: How crops are scaled: one of `preprocessing.INTERPOLATIONS`.
        rand_augment: Magnitude of RandAugment's two operations, below 31; 0 for none.
        random_erasing: Probability that a rectangle of the input is replaced by the mean color.
    """

    shift: int = 0
    flip: bool = False
    smallest_crop: float = 1.0
    interpolation: str = "bilinear"
    rand_augment: int = 0
    random_erasing: float = 0.0

    @property
    def crops(self) -> bool:
        """Whether inputs are crops of whole pictures, so that the scaled and cut ones are not enough."""
        return self.smallest_crop < 1

    def moved(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Shift and mirror uint8 (N, C, H, W) on the CPU; the input is unchanged."""
        if self.shift:
            images = _random_shifts(images, self.shift, generator)
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images

    def cropped(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        """Return random crops of images in memory, scaled back to their size: uint8 (N, C, H, W)."""
        if not self.crops:
            return images
        from torchvision.transforms.v2.functional import to_pil_image

        high, wide = images.shape[-2:]
        whole = [to_pil_image(each) for each in images]
        return torch.stack([self.crop(each, (high, wide), place_seed(seed, place)) for place, each in enumerate(whole)])

    def crop(self, picture: Image, sides: tuple[int, int], seed: int) -> torch.Tensor:
        """Return a random crop of a whole picture, scaled to height and width: uint8 (C, H, W)."""
        with _drawing(seed, 0):
            return pixels(_crop(sides, self.smallest_crop, self.interpolation)(picture))

    def varied(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        """Apply RandAugment to uint8 (N, C, H, W)."""
        if not self.rand_augment:
            return images
        with _drawing(seed, 1):
            return torch.stack([_rand_augment(self.rand_augment)(image) for image in images])

    def erase(self, inputs: torch.Tensor, seed: int) -> None:
        """Erase rectangles of normalized inputs (N, C, H, W) in place; 0 is the mean color."""
        if self.random_erasing:
            with _drawing(seed, 2):
                for each in inputs:
                    _erasing(self.random_erasing)(each)

    def largest_needed(self, side: int) -> int:
        """Return the pixels of a picture's short side beyond which more are lost on inputs of this side.

        The smallest crop then still has twice the pixels of the input in each direction.
        """
        return math.ceil(2 * side / math.sqrt(self.smallest_crop * RATIOS[0]))


def augmentation_for(preprocessing: Preprocessing) -> Augmentation:
    """Return the usual augmentation for photographs: shifts by an eighth if small, random crops if large."""
    size = min(preprocessing.sides)
    if size <= SMALL:
        return Augmentation(shift=max(1, size // 8), flip=True)
    return Augmentation(flip=True, smallest_crop=SMALLEST_CROP, interpolation=preprocessing.interpolation)


@contextmanager
def _drawing(seed: int, change: int) -> Iterator[None]:
    """Seed torch's global generator of the CPU, which torchvision's transforms draw from, and restore it afterwards.

    Args:
        seed: Seed of an image or a batch.
        change: Number of the change, so that it does not follow from the draws of another one.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed((4 * seed + change) % 2**63)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@cache
def _crop(sides: tuple[int, int], smallest: float, interpolation: str) -> Any:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandomResizedCrop

    scaling = InterpolationMode(interpolation)
    return RandomResizedCrop(sides, scale=(smallest, 1.0), ratio=RATIOS, interpolation=scaling, antialias=True)


@cache
def _rand_augment(magnitude: int) -> Any:
    from torchvision.transforms.v2 import RandAugment

    return RandAugment(RAND_AUGMENT_OPERATIONS, magnitude, RAND_AUGMENT_MAGNITUDES)


@cache
def _erasing(probability: float) -> Any:
    from torchvision.transforms.v2 import RandomErasing

    return RandomErasing(probability, inplace=True)


def _random_shifts(images: torch.Tensor, reach: int, generator: torch.Generator) -> torch.Tensor:
    count, _, height, width = images.shape
    padded = functional.pad(images, (reach, reach, reach, reach))
    offsets = torch.randint(0, 2 * reach + 1, (count, 2), generator=generator).tolist()
    # A loop of slices is several times faster than one gather: each slice is copied row by row.
    out = torch.empty_like(images)
    for index, (top, left) in enumerate(offsets):
        out[index] = padded[index, :, top : top + height, left : left + width]
    return out
