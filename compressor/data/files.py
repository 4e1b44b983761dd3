"""Folders of images: finding them, decoding them, and what to do about those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from compressor import progress
from compressor.errors import CompressorError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
_TOLERATED_SHARE = 0.05
_TOLERATED_COUNT = 3
_CHUNK = 256


class ImageFile(NamedTuple):
    """One image of a folder."""

    path: str
    label: int


class Decoded(NamedTuple):
    """Images that were read: uint8 (N, 3, size, size), int64 (N,), and the paths that could not be."""

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: tuple[str, ...]


def class_folders(folder: Path) -> dict[str, list[str]]:
    """The images of each sub-folder, by its name, both in order; hidden and other files are passed over.

    Sub-folders of a class's folder belong to the class. Folders without any image are left out.
    """
    found: dict[str, list[str]] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            paths = [
                os.path.join(where, name)
                for where, _, names in os.walk(entry.path)
                for name in names
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
            ]
            if paths:
                found[entry.name] = sorted(paths)
    return found


def image_size(path: str) -> tuple[int, int] | None:
    """(width, height) of an image from its header, or None where that cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            return int(width), int(height)
    except _unreadable():
        return None


def _unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises for images that are damaged, cut short or absurdly large."""
    from PIL import Image

    return OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError


def decode(path: str, size: int) -> torch.Tensor | None:
    """uint8 (3, size, size), or None where the file cannot be read.

    An image of another size is scaled so that its short side is `size` (8/7 of it from 96 pixels on, as for
    ImageNet: 256 for 224), and its middle is cut out.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.size != (size, size):
                short = round(size * 8 / 7) if size >= 96 else size
                image.draft("RGB", (short, short))
            rgb = image.convert("RGB")
    except _unreadable():
        return None
    if rgb.size != (size, size):
        scale = short / min(rgb.size)
        width, height = (max(size, round(side * scale)) for side in rgb.size)
        left, top = (width - size) // 2, (height - size) // 2
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR).crop(
            (left, top, left + size, top + size)
        )
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def load_files(files: Sequence[ImageFile], size: int, label: str, workers: int | None = None) -> Decoded:
    """Decode many files with a few threads (Pillow lets go of the interpreter while it decodes).

    Raises:
        CompressorError: too many are unreadable; see `refuse_unreadable`.
    """
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    fine = torch.zeros(len(files), dtype=torch.bool)

    def read(start: int) -> int:
        chunk = range(start, min(start + _CHUNK, len(files)))
        for index in chunk:
            if (image := decode(files[index].path, size)) is not None:
                images[index] = image
                fine[index] = True
        return len(chunk)

    threads = workers or min(8, 2 * (os.cpu_count() or 1))
    with progress.bar(label, total=len(files)) as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for done in pool.map(read, range(0, len(files), _CHUNK)):
                bar.advance(done)
        except KeyboardInterrupt:  # leaving the pool would otherwise wait until every file is read
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    unreadable = tuple(file.path for file, good in zip(files, fine.tolist(), strict=True) if not good)
    refuse_unreadable(unreadable, len(files))
    labels = torch.tensor([file.label for file in files])
    return Decoded(images[fine], labels[fine], unreadable) if unreadable else Decoded(images, labels, ())


def refuse_unreadable(unreadable: Sequence[str], total: int) -> None:
    """Accept a few damaged images (up to 3, or 5 % where that is more) and refuse more.

    Raises:
        CompressorError: the first of them are named.
    """
    if len(unreadable) > max(_TOLERATED_COUNT, _TOLERATED_SHARE * total) or len(unreadable) == total > 0:
        first = ", ".join(unreadable[:3])
        raise CompressorError(
            f"{len(unreadable)} of {total} images cannot be read, such as {first}.",
            "They may be cut short or no images: copy them again, or delete them. "
            f"Up to {_TOLERATED_SHARE:.0%} are skipped.",
        )
