"""Pictures with masks: PATH/train/images/NAME.jpg and PATH/train/masks/NAME.png, a class number for every pixel."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as pillow
from torch import Tensor

from compressor.core import progress
from compressor.core.errors import CompressorError
from compressor.core.files import sha256_file
from compressor.data.decoded import Tensors, geometry, remembered
from compressor.data.folder import SUFFIXES, split_folders
from compressor.data.images import fitted, turned
from compressor.data.preprocessing import Preprocessing, Wanted
from compressor.data.scenes import IGNORED, SceneFile, bundle_of
from compressor.data.splits import DataBundle, Loading
from export.files import open_regular

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

NAMES = "classes.txt"
"""File beside train/ with the name of each class in a line, the first that of class 0; it may be left out."""

_LAYOUT = "Expected PATH/train/images/NAME.jpg and PATH/train/masks/NAME.png, and test/ (or val/) likewise."
_SHOWN = 3
_WIDTH, _HEIGHT = 256, 257  # tags of TIFF


@dataclass(frozen=True)
class MaskedFile(SceneFile):
    """A picture and its mask on disk."""

    mask: str

    def target(self, preprocessing: Preprocessing) -> Tensor:
        classes = pillow.fromarray(read_mask(self.mask))
        return fitted(classes, replace(preprocessing, interpolation="nearest"))[0]

    @classmethod
    def targets(cls, files: Sequence[MaskedFile], preprocessing: Preprocessing) -> Sequence[Tensor]:
        by_mask = sorted(files, key=lambda file: file.mask)
        found = _of_each(
            "masks", by_mask, [file.mask for file in by_mask], "Reading masks",
            lambda file: file.target(preprocessing), preprocessing.sides, torch.uint8, geometry(preprocessing),
        )  # fmt: skip
        rows = {file.mask: row for row, file in enumerate(by_mask)}
        return [found[rows[file.mask]] for file in files]

    def checked(self) -> Tensor:
        """Return which classes are in the mask, bool (256,), without `IGNORED`.

        Raises:
            CompressorError: It cannot be read, or has another size than its picture.
        """
        classes = read_mask(self.mask)
        if (size := picture_size(self.image)) != classes.shape[::-1]:
            raise CompressorError(
                f"{self.mask} has {classes.shape[1]}x{classes.shape[0]} pixels, its picture {size[0]}x{size[1]}.",
                "A mask needs the size of its picture: a class for every pixel.",
            )
        present = torch.from_numpy(np.bincount(classes.reshape(-1), minlength=256) > 0)
        present[IGNORED] = False
        return present


def load_masks(path: Path, name: str, wanted: Wanted, loading: Loading) -> DataBundle:
    """Load pictures with masks; every mask is read once, so that a wrong one is refused before the run begins.

    Raises:
        CompressorError: A picture has no mask, a mask has another size than its picture or a class that there is not,
            or the layout is another one.
    """
    parts = split_folders(path)
    other = "test" if "test" in parts else "val"
    if "train" not in parts or other not in parts:
        raise CompressorError(
            f"{path} has no {'train' if 'train' not in parts else 'test'}/ folder.", _LAYOUT
        )
    notes: list[str] = []
    train, test = (_pairs(parts[part], notes) for part in ("train", other))
    highest, where = _highest([*train, *test])
    names = _names(path)
    if names is not None and highest >= len(names):
        raise CompressorError(
            f"{where} holds the class {highest}, but {path / NAMES} names {len(names)}: 0 to {len(names) - 1}.",
            f"Correct the mask, or name the class. Pixels of no class are {IGNORED}.",
        )
    classes = names or tuple(str(number) for number in range(highest + 1))
    if len(classes) < 2:
        raise CompressorError(f"The masks in {path} hold class 0 only; two classes are needed.", _LAYOUT)
    return bundle_of(
        name,
        classes,
        train,
        test,
        wanted.at(wanted.image_size or wanted.usual.size),
        loading,
        notes=notes,
        path=path,
    )


def read_mask(path: str) -> npt.NDArray[np.uint8]:
    """Return a mask's class numbers, uint8 (H, W): gray values, or places in a palette.

    Raises:
        CompressorError: It cannot be read, or has several channels or numbers beyond 255.
    """
    try:
        with open_regular(path) as file, pillow.open(file) as image:
            step = _step(image)
            values: npt.NDArray[Any] = np.array(image) // step
    except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError) as error:
        raise CompressorError(f"The mask {path} cannot be read: {error}.", "Save it again as PNG.") from error
    if values.ndim != 2:
        raise CompressorError(
            f"The mask {path} has {values.shape[-1]} channels, expected the number of a class for every pixel.",
            "Save it as a gray or palette PNG: 0, 1, 2, ..., and 255 where no class is known.",
        )
    if values.min() < 0 or values.max() > IGNORED:
        raise CompressorError(
            f"The mask {path} holds the class {values.max()}; the largest possible is {IGNORED - 1}.",
            f"Number the classes from 0 on; {IGNORED} is ignored.",
        )
    return values.astype(np.uint8)


def _step(image: ImageFile) -> int:
    """Return what Pillow multiplies the gray values of an opened file of 2 or 4 bits by, so that white is 255."""
    coded = image.tile[0][3] if image.tile else ""
    raw_mode = str(coded[0] if coded and isinstance(coded, tuple) else coded)
    return {"L;2": 85, "L;4": 17}.get(raw_mode[:3], 1)


def picture_size(path: str) -> tuple[int, int]:
    """Return (width, height) of a picture as a viewer shows it."""
    try:
        with open_regular(path) as file, pillow.open(file) as image:
            wide, high = image.size
            tags = getattr(image, "tag_v2", {})  # as stored: newer versions of Pillow turn the size of a TIFF already
            wide, high = int(tags.get(_WIDTH, wide)), int(tags.get(_HEIGHT, high))
            return (high, wide) if turned(image) else (wide, high)
    except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError) as error:
        raise CompressorError(
            f"{path} cannot be read: {error}.", "Copy it again, or delete it and its mask."
        ) from error


def _by_stem(folder: Path) -> dict[str, str]:
    """Return the image files in a folder by name without suffix, in order."""
    if not folder.is_dir():
        raise CompressorError(f"{folder} does not exist.", _LAYOUT)
    found: dict[str, str] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem, suffix = os.path.splitext(entry.name)
        if entry.name.startswith(".") or suffix.lower() not in SUFFIXES:
            continue
        if stem in found:
            raise CompressorError(
                f"{folder} holds {stem} twice: {found[stem]} and {entry.path}.", "Rename one."
            )
        found[stem] = entry.path
    return found


def _pairs(folder: Path, notes: list[str]) -> list[MaskedFile]:
    images, masks = _by_stem(folder / "images"), _by_stem(folder / "masks")
    if missing := [stem for stem in images if stem not in masks]:
        raise CompressorError(
            f"{folder / 'masks'} has no mask of {_some(missing)}.",
            "Every picture needs one: the same name, as PNG.",
        )
    if unused := [stem for stem in masks if stem not in images]:
        notes.append(f"{folder / 'masks'} has masks without a picture, which are not used: {_some(unused)}.")
    return [MaskedFile(path, masks[stem]) for stem, path in images.items()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _highest(files: list[MaskedFile]) -> tuple[int, str]:
    """Return the highest class in all masks, and a mask that has it."""
    by_mask = sorted(files, key=lambda file: file.mask)
    paths = sorted([file.mask for file in files] + [file.image for file in files])
    found = _of_each("classes", by_mask, paths, "Checking masks", MaskedFile.checked, (256,), torch.bool, {})
    row, highest = max(found.nonzero().tolist(), key=lambda pair: pair[1], default=(0, 0))
    return highest, by_mask[row].mask


def _of_each(
    name: str,
    files: Sequence[MaskedFile],
    paths: Sequence[str],
    label: str,
    compute: Callable[[MaskedFile], Tensor],
    shape: tuple[int, ...],
    kind: torch.dtype,
    follows_from: Mapping[str, Any],
) -> Tensor:
    """Return a tensor of each file, as rows; they are kept between runs.

    Args:
        name: What they are.
        files: The files, sorted by their masks.
        paths: What is read, sorted.
        label: Name of the progress bar.
        compute: Computes the tensor of a file.
        shape, kind: Form of one.
        follows_from: What they follow from beside the files.
    """

    def all_of_them() -> Tensors:
        rows = torch.empty(len(files), *shape, dtype=kind)
        with progress.bar(label, total=len(files)) as bar, ThreadPoolExecutor(4) as pool:
            for row, found in enumerate(pool.map(compute, files)):
                rows[row] = found
                bar.advance(1)
        return {name: rows}

    known = {**follows_from, "of": name, "code": sha256_file(Path(__file__))}
    return remembered(paths, known, {name: (kind, (len(files), *shape))}, all_of_them)[name]


def _names(path: Path) -> tuple[str, ...] | None:
    try:
        text = (path / NAMES).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CompressorError(
            f"{path / NAMES} cannot be read: {error}.", "Write the name of a class in each line."
        ) from error
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if "" in names:
        raise CompressorError(
            f"{path / NAMES} has no name in line {names.index('') + 1}, which is that of class {names.index('')}.",
            "Name the class there, or delete the line if it is no class.",
        )
    return names
