"""Data sets that need no folder: scikit-learn's digits, and CIFAR as downloaded by torchvision."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from compressor.core.errors import CompressorError
from compressor.data.augment import Augmentation, augmentation_for
from compressor.data.bundle import DataBundle, hold_out
from compressor.data.files import fitted
from compressor.data.preprocessing import Preprocessing, Wanted
from compressor.data.splits import MemorySplit

_TEST_SEED = 20
"""Seed of the test split of data without one; the same for every run, so that runs are comparable."""


def load_digits(seed: int, wanted: Wanted, search_fraction: float, search_limit: int | None) -> DataBundle:
    """Load scikit-learn's handwritten digits: 1,797 gray images of 8x8, scaled up, the same in three channels.

    A fifth is the test split. Images are shifted but not mirrored, because a mirrored digit is not a digit.

    Raises:
        CompressorError: Another crop or interpolation is requested.
    """
    from sklearn.datasets import load_digits as embedded

    if (wanted.crop_share or 1.0) != 1 or (wanted.interpolation or "bilinear") != "bilinear":
        raise CompressorError(
            "The digits are scaled bilinearly and not cropped.",
            "Leave out data.crop_share and data.interpolation.",
        )
    preprocessing = replace(wanted, crop_share=1.0, interpolation="bilinear").at(wanted.image_size or 32)
    raw, size = embedded(), preprocessing.size
    grey = torch.from_numpy(np.asarray(raw.images, dtype=np.float32))[:, None] * (255 / 16)
    scaled = functional.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    images = scaled.round().clamp(0, 255).to(torch.uint8)
    images = images.expand(-1, preprocessing.channels, -1, -1).contiguous()
    labels = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    rest, test = hold_out(labels.numpy(), 0.2, None, _TEST_SEED)
    kept, held = hold_out(labels.numpy()[rest], search_fraction, search_limit, seed)
    small_shifts = Augmentation(shift=max(1, size // 16))
    return DataBundle(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        input_shape=preprocessing.input_shape,
        train=MemorySplit(images[rest[kept]], labels[rest[kept]], preprocessing, small_shifts),
        search=MemorySplit(images[rest[held]], labels[rest[held]], preprocessing),
        test=MemorySplit(images[test], labels[test], preprocessing),
        notes=(
            "The data is scikit-learn's embedded digits (1,797 small images): a demonstration, not a real task.",
        ),
    )


def load_cifar(
    kind: str,
    path: Path | None,
    seed: int,
    preprocessing: Preprocessing,
    search_fraction: float,
    search_limit: int | None,
) -> DataBundle:
    """Load CIFAR-10 or CIFAR-100 through torchvision, which downloads it if it is missing.

    Raises:
        CompressorError: It is neither at `path` nor downloadable.
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
            f"Download {dataset.filename} elsewhere, unpack it in a folder and pass that as --data {kind}:PATH; "
            "or use images with --data folder:PATH.",
        ) from error
    (train, test), (labels, test_labels) = (
        [_stacked(part.data, preprocessing) for part in parts],
        [torch.tensor(part.targets) for part in parts],
    )
    kept, held = hold_out(labels.numpy(), search_fraction, search_limit, seed)
    return DataBundle(
        name=kind if path is None else f"{kind}:{path}",
        classes=tuple(parts[0].classes),
        input_shape=preprocessing.input_shape,
        train=MemorySplit(train[kept], labels[kept], preprocessing, augmentation_for(preprocessing)),
        search=MemorySplit(train[held], labels[held], preprocessing),
        test=MemorySplit(test, test_labels, preprocessing),
    )


def _present(dataset: type, root: Path) -> bool:
    return (root / str(dataset.base_folder)).is_dir()  # type: ignore[attr-defined]


def _downloads() -> Path:
    import platformdirs

    cache = os.environ.get("COMPRESSOR_CACHE") or platformdirs.user_cache_dir("compressor")
    return Path(cache) / "data"


def _stacked(images: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> torch.Tensor:
    """Convert uint8 (N, 32, 32, 3) to uint8 (N, channels, size, size)."""
    from PIL import Image

    if preprocessing.resize_size == images.shape[1] and preprocessing.channels == 3:
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    mode = "L" if preprocessing.channels == 1 else "RGB"
    return torch.stack([fitted(Image.fromarray(image).convert(mode), preprocessing) for image in images])
