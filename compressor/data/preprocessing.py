"""Preprocessing from an image of any size to a network's input: one description, used wherever images are fed.

Training, scoring, calibration, parity and the device must all prepare images as they were prepared for the weights:
another mean, channel order or crop costs many points of accuracy without any error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from compressor.core.errors import CompressorError

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's channels on the scale 0..1; assumed if neither the weights nor the user give it."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's channels on the scale 0..1."""
CROP_SHARE = 0.875
"""Share of the scaled short side that the crop keeps, 224 of 256 pixels; assumed like `MEAN`."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
ORDERS = ("rgb", "bgr", "grey")
SMALL = 96
"""Images with fewer pixels per side are not cropped: 32 pixels have no margin to lose."""


def sides_of(size: int | str) -> tuple[int, int]:
    """Return height and width of "96x128", or of a square."""
    if isinstance(size, int):
        return size, size
    high, _, wide = size.partition("x")
    return int(high), int(wide or high)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input.

    Its short side is scaled to `resize_size`, the center of `size` x `size` is cropped, pixels are scaled to
    0..`range`, `mean` is subtracted and the result divided by `std`.

    Attributes:
        size: Height of the input in pixels.
        width: Its width; None for that of a square.
        mean, std: Per channel, in the network's order, on the scale 0..`range`.
        crop_share: `size` over the side that the image is scaled to, above 0 and at most 1.
        interpolation: One of `INTERPOLATIONS`, with antialiasing.
        resize: "short" scales the short side and keeps the aspect ratio, "squash" scales both sides to the same.
        channel_order: One of `ORDERS`; "grey" is one channel.
        range: Maximum value of a pixel before the mean is subtracted: 1 or 255.
    """

    size: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    crop_share: float = CROP_SHARE
    interpolation: str = "bilinear"
    resize: str = "short"
    channel_order: str = "rgb"
    range: int = 1
    width: int | None = None

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self.channels} channels need as many means and deviations, got {self}")
        if self.interpolation not in INTERPOLATIONS or self.channel_order not in ORDERS:
            raise ValueError(f"unknown interpolation or channel order in {self}")

    @property
    def channels(self) -> int:
        """1 for gray images, else 3."""
        return 1 if self.channel_order == "grey" else 3

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input."""
        return self.channels, *self.sides

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.size, self.width or self.size

    @property
    def image_size(self) -> int | str:
        """The sides as a recipe has them: 224, or "96x128"."""
        return self.size if self.width is None else f"{self.size}x{self.width}"

    @property
    def resize_size(self) -> int:
        """Pixels of the scaled short side, rounded down like timm; torchvision's 232 results from 224/232."""
        return self.covered[0]

    @property
    def covered(self) -> tuple[int, int]:
        """Height and width that the scaled image covers, before it is cut."""
        high, wide = (max(side, math.floor(side / self.crop_share + 1e-6)) for side in self.sides)
        return high, wide

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 (N, C, H, W) in RGB order to float32 in the network's order and scale."""
        if self.channel_order == "bgr":
            images = images.flip(1)
        scale = 255 / self.range
        shift, divisor = (
            torch.tensor(values, device=images.device).view(1, -1, 1, 1) * scale
            for values in (self.mean, self.std)
        )
        return images.to(torch.float32).sub_(shift).div_(divisor)

    def ordered(self, channel_order: str) -> Preprocessing:
        """Return the same for another channel order; gray images get the mean over the colors."""
        if channel_order == self.channel_order:
            return self
        mean, std = self.mean, self.std
        if channel_order == "grey":
            mean, std = ((round(sum(values) / len(values), 6),) for values in (mean, std))
        elif self.channel_order == "grey":
            mean, std = mean * 3, std * 3
        else:
            mean, std = mean[::-1], std[::-1]
        return replace(self, mean=mean, std=std, channel_order=channel_order)

    def scaled(self, limit: int) -> Preprocessing:
        """Return the same values on the scale 0..`limit`."""
        factor = limit / self.range
        mean, std = (tuple(value * factor for value in values) for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std, range=limit)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-compatible dict, including the derived size that images are scaled to."""
        fields = {**asdict(self), "mean": list(self.mean), "std": list(self.std), "resize_size": self.resize_size}
        if self.width is None:
            del fields["width"]
        return fields

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """Create from the result of `to_dict`."""
        fields = {name: value for name, value in plain.items() if name != "resize_size"}
        return cls(**{**fields, "mean": tuple(plain["mean"]), "std": tuple(plain["std"])})

    def recorded(self, origin: str) -> dict[str, Any]:
        """Return what a manifest records: the values, and where they come from."""
        return {**self.to_dict(), "origin": origin}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> tuple[Preprocessing, str]:
        """Create from the result of `recorded`; also return the origin, which may be missing.

        Raises:
            KeyError, TypeError, ValueError: The record is damaged.
        """
        plain = {name: value for name, value in record.items() if name != "origin"}
        return cls.from_dict(plain), str(record.get("origin") or "")

    def describe(self) -> str:
        """Describe the values in words, for the user."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        high, wide = self.covered
        covered = f"{high}" if self.width is None else f"cover {high}x{wide}"
        scaled = f"{covered} pixels ({self.interpolation}) and cut to {self.image_size}"
        if self.resize == "squash" and self.covered == self.sides:  # nothing is cut off
            scaled = f"{high}x{wide} pixels as a whole ({self.interpolation})"
        order = "" if self.channel_order == "rgb" else f", channels {self.channel_order}"
        return f"scaled to {scaled}, 0..{self.range}, mean {mean}, std {std}{order}"


USUAL = Preprocessing()
"""ImageNet's usual preprocessing, assumed if neither the weights nor the user give one."""


@dataclass(frozen=True)
class Wanted:
    """What is known of the preprocessing before the images are.

    Attributes:
        usual: Preprocessing of the weights, or `USUAL`; it fills in everything below that is None.
        image_size: Height and width in pixels, or "HEIGHTxWIDTH"; None for the images' own, or that of `usual` for
            larger ones.
        mean, std: Per channel in the network's order; a single number applies to every channel.
        crop_share: If None, images below `SMALL` pixels of another size than the usual one are not cropped.
        interpolation, channel_order, range: As in `Preprocessing`.
    """

    usual: Preprocessing = USUAL
    image_size: int | str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_share: float | None = None
    interpolation: str | None = None
    channel_order: str | None = None
    range: int | None = None

    def at(self, size: int | str) -> Preprocessing:
        """Return the preprocessing of inputs of `size` x `size` pixels, or of "HEIGHTxWIDTH".

        Raises:
            CompressorError: There are more or fewer means than channels.
        """
        usual, order = self.usual, self.channel_order or self.usual.channel_order
        high, wide = sides_of(size)
        width = None if high == wide else wide
        found = replace(usual.ordered(order).scaled(self.range or usual.range), size=high, width=width)
        if self.crop_share is None and min(high, wide) < SMALL and high != usual.size:
            found = replace(found, crop_share=1.0)
        return replace(
            found,
            mean=self._for_channels("mean", self.mean, found),
            std=self._for_channels("std", self.std, found),
            crop_share=self.crop_share or found.crop_share,
            interpolation=self.interpolation or found.interpolation,
        )

    @staticmethod
    def _for_channels(name: str, given: tuple[float, ...] | None, found: Preprocessing) -> tuple[float, ...]:
        if given is None:
            return tuple(getattr(found, name))
        if len(given) not in (1, found.channels):
            raise CompressorError(
                f"data.{name} has {len(given)} numbers, but the network takes images of {found.channels} "
                f"channel{'s' if found.channels > 1 else ''}.",
                f"Give one number for each channel, or a single one for all: --{name} {found.mean[0]:g}",
            )
        return given if len(given) == found.channels else given * found.channels
