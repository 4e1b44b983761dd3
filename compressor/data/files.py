"""Folders of images: finding them, decoding them, and what to do about those that cannot be read."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from compressor.core import progress
from compressor.core.errors import CompressorError
from compressor.data.pixels import eight_bit
from compressor.data.preprocessing import Preprocessing, Wanted
from export.files import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
_TOLERATED_SHARE = 0.05
_TOLERATED_COUNT = 3
_CHUNK = 256
_SHOWN = 5
_MOST_PIXELS = 1 << 26
"""Of an image after it is scaled."""


class ImageFile(NamedTuple):
    """One image of a folder."""

    path: str
    label: int


class Decoded(NamedTuple):
    """Images that were read: uint8 (N, channels, size, size), int64 (N,), and the paths that could not be."""

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: tuple[str, ...]


def class_folders(folder: Path, notes: list[str]) -> dict[str, list[str]]:
    """The images of each sub-folder, by its name, both in order; hidden and other files are passed over.

    Sub-folders of a class's folder belong to the class. An empty folder is a class without images, so that the others
    keep their places; one with other files only is none, and `notes` gets a sentence about either.
    """
    found: dict[str, list[str]] = {}
    empty: list[str] = []
    foreign: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            files = [
                os.path.join(where, name)
                for where, _, names in os.walk(entry.path)
                for name in names
                if not name.startswith(".")
            ]
            paths = sorted(path for path in files if os.path.splitext(path)[1].lower() in SUFFIXES)
            if paths or not files:
                found[entry.name] = paths
            if not paths:
                (foreign if files else empty).append(entry.name)
    if any(found.values()):
        if empty:
            notes.append(f"{folder} has classes without images: {_some(empty)}. They keep their places.")
        if foreign:
            notes.append(f"{folder} has folders without images, which are not classes: {_some(foreign)}.")
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def image_size(path: str) -> tuple[int, int] | None:
    """Return (width, height) of an image from its header, or None if that cannot be read."""
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file) as image:
            width, height = image.size
            return int(width), int(height)
    except _unreadable():
        return None


def _unreadable() -> tuple[type[Exception], ...]:
    """Return the exceptions that Pillow raises for damaged, truncated or extremely large images."""
    from PIL import Image

    damaged = (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, struct.error, zlib.error)
    return OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, *damaged


def decode(path: str, wanted: Preprocessing | int) -> torch.Tensor | None:
    """Decode one image before normalization: uint8 (channels, size, size), or None if the file cannot be read.

    Args:
        path: Image file.
        wanted: Size, crop, interpolation and channels; a number is a size, with the usual values for the rest.

    Raises:
        CompressorError: It has values of unknown range; see `eight_bit`.
    """
    from PIL import Image as pillow

    preprocessing = Wanted().at(wanted) if isinstance(wanted, int) else wanted
    needed = 2 * preprocessing.resize_size
    try:
        with open_regular(path) as file, pillow.open(file) as image:
            short, long = sorted(image.size)
            if long * preprocessing.resize_size**2 > short * _MOST_PIXELS:
                return None  # a line of pixels would become gigabytes when its short side is scaled
            # JPEG decodes to a half, a quarter or an eighth at once; twice the pixels that are needed lose nothing.
            image.draft("RGB", (needed, needed))
            pixels = eight_bit(image, preprocessing.channels, path)
    except _unreadable():
        return None
    return fitted(pixels, preprocessing)


def fitted(image: Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale and crop as torchvision and timm do, so that published accuracies hold: uint8 (channels, size, size)."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    size, scaled = preprocessing.size, preprocessing.resize_size
    if scaled != size or image.size != (size, size):
        sides = [scaled, scaled] if preprocessing.resize == "squash" else [scaled]
        image = center_crop(
            resize(image, sides, InterpolationMode(preprocessing.interpolation)), [size, size]
        )
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1).contiguous()


def load_files(
    files: Sequence[ImageFile], preprocessing: Preprocessing, label: str, workers: int | None = None
) -> Decoded:
    """Decode many files with a few threads (Pillow releases the GIL while it decodes).

    Raises:
        CompressorError: Too many are unreadable, see `refuse_unreadable`; or one has values of unknown range.
    """
    images = torch.empty(len(files), *preprocessing.input_shape, dtype=torch.uint8)
    fine = torch.zeros(len(files), dtype=torch.bool)

    def read(start: int) -> int:
        chunk = range(start, min(start + _CHUNK, len(files)))
        for index in chunk:
            if (image := decode(files[index].path, preprocessing)) is not None:
                images[index] = image
                fine[index] = True
        return len(chunk)

    threads = workers or min(8, 2 * (os.cpu_count() or 1))
    with progress.bar(label, total=len(files)) as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for done in pool.map(read, range(0, len(files), _CHUNK)):
                bar.advance(done)
        except KeyboardInterrupt:  # otherwise leaving the pool would wait until every file is read
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    unreadable = tuple(file.path for file, good in zip(files, fine.tolist(), strict=True) if not good)
    refuse_unreadable(unreadable, len(files))
    labels = torch.tensor([file.label for file in files])
    return Decoded(images[fine], labels[fine], unreadable) if unreadable else Decoded(images, labels, ())


def refuse_unreadable(unreadable: Sequence[str], total: int) -> None:
    """Accept a few damaged images (up to 3, or 5 % if that is more) and raise an error for more.

    Raises:
        CompressorError: Names the first of them.
    """
    if len(unreadable) > max(_TOLERATED_COUNT, _TOLERATED_SHARE * total) or len(unreadable) == total > 0:
        first = ", ".join(unreadable[:3])
        raise CompressorError(
            f"{len(unreadable)} of {total} images cannot be read, such as {first}.",
            "They may be truncated or not images: copy them again, or delete them. "
            f"Up to {_TOLERATED_SHARE:.0%} are skipped.",
        )
