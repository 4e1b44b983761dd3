"""Data sets that need no folder of the user's: scikit-learn's digits, and CIFAR as torchvision fetches it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from compressor.data.augment import Augmentation, augmentation_for
from compressor.data.bundle import MEAN, STD, DataBundle, hold_out
from compressor.data.splits import MemorySplit
from compressor.errors import CompressorError

_TEST_SEED = 20
"""Deals the test split of data that has none of its own; the same for every run, so that runs compare."""


def load_digits(seed: int, size: int, search_fraction: float, search_limit: int | None) -> DataBundle:
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8, scaled up, the same in three channels.

    A fifth is the test split. Mirroring would turn a digit into no digit, so images are only shifted.
    """
    from sklearn.datasets import load_digits as embedded

    raw = embedded()
    grey = torch.from_numpy(np.asarray(raw.images, dtype=np.float32))[:, None] * (255 / 16)
    scaled = functional.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    images = scaled.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    rest, test = hold_out(labels.numpy(), 0.2, None, _TEST_SEED)
    kept, held = hold_out(labels.numpy()[rest], search_fraction, search_limit, seed)
    small_shifts = Augmentation(shift=max(1, size // 16))
    return DataBundle(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        input_shape=(3, size, size),
        train=MemorySplit(images[rest[kept]], labels[rest[kept]], MEAN, STD, small_shifts),
        search=MemorySplit(images[rest[held]], labels[rest[held]], MEAN, STD),
        test=MemorySplit(images[test], labels[test], MEAN, STD),
        notes=(
            "The data is scikit-learn's embedded digits (1,797 small images): a demonstration, no real task.",
        ),
    )


def load_cifar(
    kind: str, path: Path | None, seed: int, size: int, search_fraction: float, search_limit: int | None
) -> DataBundle:
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded where it is missing.

    Raises:
        CompressorError: it is neither at `path` nor downloadable.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    root = path or _downloads()
    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    try:
        parts = [
            dataset(str(root), train=train, download=not _present(dataset, root)) for train in (True, False)
        ]
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompressorError(
            f"{kind} is not in {root} and cannot be downloaded: {reason}",
            f"Fetch {dataset.filename} elsewhere, unpack it in a folder and give that as --data {kind}:PATH; "
            "or give images as --data folder:PATH.",
        ) from error
    stacked = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    if size != 32:
        stacked = [_resized(images, size) for images in stacked]
    (train, test), (labels, test_labels) = stacked, [torch.tensor(part.targets) for part in parts]
    kept, held = hold_out(labels.numpy(), search_fraction, search_limit, seed)
    return DataBundle(
        name=kind if path is None else f"{kind}:{path}",
        classes=tuple(parts[0].classes),
        input_shape=(3, size, size),
        train=MemorySplit(train[kept], labels[kept], MEAN, STD, augmentation_for(size)),
        search=MemorySplit(train[held], labels[held], MEAN, STD),
        test=MemorySplit(test, test_labels, MEAN, STD),
    )


def _present(dataset: type, root: Path) -> bool:
    return (root / str(dataset.base_folder)).is_dir()  # type: ignore[attr-defined]


def _downloads() -> Path:
    import platformdirs

    cache = os.environ.get("COMPRESSOR_CACHE") or platformdirs.user_cache_dir("compressor")
    return Path(cache) / "data"


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (N, C, H, W) to uint8 (N, C, size, size), a thousand at a time to bound the memory."""
    parts = [
        functional.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        .round_()
        .to(torch.uint8)
        for part in torch.split(images, 1000)
    ]
    return torch.cat(parts)
