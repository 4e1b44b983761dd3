"""Load the splits of `--data`: scikit-learn's digits, CIFAR by torchvision, ImageNet, and any folder of images."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder
from compressor.core.metrics import SCENES
from compressor.data.augment import Augmentation, augmentation_for
from compressor.data.boxes import load_coco
from compressor.data.folder import load_folder, load_imagenet
from compressor.data.images import fitted
from compressor.data.masks import load_masks
from compressor.data.pictures import load_pictures
from compressor.data.preprocessing import Preprocessing, Wanted, sides_of
from compressor.data.shapes import load_shapes
from compressor.data.splits import TEST_SEED, DataBundle, Loading, MemorySplit, hold_out

KINDS = ("digits", "cifar10", "cifar100", "folder", "imagenet", "images", "shapes", *SCENES)
SEARCH_LIMIT = 5000
"""Maximum number of images of the search split: its standard error is then below 0.7 % at any accuracy."""


def load_data(
    spec: str,
    *,
    seed: int,
    image_size: int | str | None = None,
    wanted: Wanted | None = None,
    search_fraction: float = 0.1,
    search_limit: int = SEARCH_LIMIT,
    workers: int | None = None,
    task: str = "classification",
    decode_files: bool = True,
) -> DataBundle:
    """Load a data set as disjoint train, search and test splits.

    Args:
        spec: "digits", "cifar10[:PATH]", "cifar100[:PATH]", "folder:PATH", "imagenet:PATH", or "images:PATH" for
            pictures without labels, "masks:PATH", "coco:PATH", or "shapes[:NUMBER]".
        seed: Seed that chooses the search split's images from the training images; the test split is fixed.
        image_size: Height and width in pixels, or "HEIGHTxWIDTH"; None for 32 (digits, CIFAR), the weights' usual
            one (ImageNet) and, for a folder, the images' own if they are small and of equal size, else the weights'
            usual one.
        wanted: Preprocessing; None for the usual one. `image_size` has precedence over its own.
        search_fraction: Share of the training images held out, equal in every class.
        search_limit: Maximum number of images held out.
        workers: Threads or processes that decode files; None for a number that suits the machine.
        task: "classification", "segmentation" or "detection".
        decode_files: Whether files are decoded now as far as they fit into memory; else each is when it is used.

    Raises:
        CompressorError: The name is unknown, or the data is missing, damaged or not a classification problem.
    """
    kind, _, where = spec.partition(":")
    if kind not in KINDS:
        from difflib import get_close_matches

        near = get_close_matches(kind, KINDS, n=2, cutoff=0.4)
        raise CompressorError(
            f"There is no data set called {spec!r}.",
            f"{'Did you mean ' + ' or '.join(near) + '? ' if near else ''}"
            "Choose digits, cifar10[:PATH], cifar100[:PATH], shapes, or folder, imagenet, images or "
            f"{' or '.join(SCENES)} with :PATH.",
        )
    _check_task(spec, kind, task)
    if not 0 < search_fraction < 1:
        raise CompressorError(f"The search split's share must lie between 0 and 1, got {search_fraction}.")
    if image_size is not None and min(sides_of(image_size)) < 8:
        raise CompressorError(f"Images need at least 8 pixels a side, got {image_size}.")
    wanted = replace(wanted or Wanted(), image_size=image_size or (wanted.image_size if wanted else None))
    loading = Loading(seed, search_fraction, search_limit, workers, decode_files)
    if kind == "digits":
        if where:
            raise CompressorError(f"digits takes no path, got {where!r}.", "It ships with scikit-learn.")
        return _load_digits(wanted, loading)
    if kind == "shapes":
        return load_shapes(where, spec, wanted, loading, task)
    path = Path(where).expanduser() if where else None
    if kind in ("cifar10", "cifar100"):
        return _load_cifar(kind, path, wanted.at(wanted.image_size or 32), loading)
    if path is None:
        raise CompressorError(f"{kind} needs a folder, as in {kind}:/data/images.")
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise CompressorError(f"The folder of images {path} {what}.", f"Write --data {kind}:PATH.")
    return _OF_FOLDERS[kind](path, spec, wanted, loading)


_OF_FOLDERS = {
    "folder": load_folder,
    "imagenet": load_imagenet,
    "images": load_pictures,
    "masks": load_masks,
    "coco": load_coco,
}


def _check_task(spec: str, kind: str, task: str) -> None:
    """Refuse data that cannot be used for a task; `shapes` says so itself."""
    expected = SCENES.get(kind, "classification")
    if kind != "shapes" and task != expected:
        what = {"classification": "images by class, or without labels", "segmentation": "masks", "detection": "boxes"}
        raise CompressorError(
            f"{spec} has {what[expected]}, and --task is {task}.",
            f"Leave out --task for {expected}, or give data with {what[task]}.",
        )


def _load_digits(wanted: Wanted, loading: Loading) -> DataBundle:
    """Load scikit-learn's handwritten digits: 1,797 gray images of 8x8, scaled up, the same in three channels.

    A fifth is the test split. Images are shifted but not mirrored, because a mirrored digit is not a digit.

    Raises:
        CompressorError: Another crop or interpolation is requested.
    """
    from sklearn.datasets import load_digits

    if (wanted.crop_share or 1.0) != 1 or (wanted.interpolation or "bilinear") != "bilinear":
        raise CompressorError(
            "The digits are scaled bilinearly and not cropped.",
            "Leave out data.crop_share and data.interpolation.",
        )
    preprocessing = replace(wanted, crop_share=1.0, interpolation="bilinear").at(wanted.image_size or 32)
    raw, sides = load_digits(), preprocessing.sides
    grey = torch.from_numpy(np.asarray(raw.images, dtype=np.float32))[:, None] * (255 / 16)
    scaled = functional.interpolate(grey, size=sides, mode="bilinear", align_corners=False)
    images = scaled.round().clamp(0, 255).to(torch.uint8)
    images = images.expand(-1, preprocessing.channels, -1, -1).contiguous()
    labels = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    rest, test = hold_out(labels.numpy(), 0.2, None, TEST_SEED)
    kept, held = loading.hold_out(labels.numpy()[rest])
    small_shifts = Augmentation(shift=max(1, min(sides) // 16))
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


def _load_cifar(
    kind: str, path: Path | None, preprocessing: Preprocessing, loading: Loading
) -> DataBundle:
    """Load CIFAR-10 or CIFAR-100 through torchvision, which downloads it if it is missing.

    Raises:
        CompressorError: It is neither at `path` nor downloadable.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    root = path or cache_folder() / "data"
    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    present = (root / dataset.base_folder).is_dir()
    new = [each for each in (root, *root.parents) if not each.exists()]
    try:
        parts = [dataset(str(root), train=train, download=not present) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        for each in new:  # a download that failed leaves empty folders
            with suppress(OSError):
                each.rmdir()
        raise CompressorError(
            f"{kind} is not in {root} and cannot be downloaded: {reason}",
            f"Download {dataset.filename} elsewhere, unpack it in a folder and pass that as --data {kind}:PATH; "
            "or use images with --data folder:PATH.",
        ) from error
    (train, test), (labels, test_labels) = (
        [_stacked(part.data, preprocessing) for part in parts],
        [torch.tensor(part.targets) for part in parts],
    )
    kept, held = loading.hold_out(labels.numpy())
    return DataBundle(
        name=kind if path is None else f"{kind}:{path}",
        classes=tuple(parts[0].classes),
        input_shape=preprocessing.input_shape,
        train=MemorySplit(train[kept], labels[kept], preprocessing, augmentation_for(preprocessing)),
        search=MemorySplit(train[held], labels[held], preprocessing),
        test=MemorySplit(test, test_labels, preprocessing),
    )


def _stacked(images: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> torch.Tensor:
    """Convert uint8 (N, 32, 32, 3) to uint8 (N, channels, height, width)."""
    from PIL import Image

    if preprocessing.covered == images.shape[1:3] and preprocessing.channels == 3:
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    mode = "L" if preprocessing.channels == 1 else "RGB"
    return torch.stack([fitted(Image.fromarray(image).convert(mode), preprocessing) for image in images])
