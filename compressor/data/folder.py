"""Folders of images by class: any such folder, and ImageNet as it is usually unpacked."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from compressor.core.errors import CompressorError
from compressor.data.augment import Augmentation, augmentation_for
from compressor.data.decoded import load_files
from compressor.data.files import FileSplit
from compressor.data.images import ImageFile, decode, image_size, refuse_unreadable
from compressor.data.preprocessing import Wanted
from compressor.data.splits import (
    MEMORY_LIMIT,
    SPLITS,
    TEST_SEED,
    DataBundle,
    Indices,
    Loading,
    MemorySplit,
    Split,
    hold_out,
    split_files,
)

_LAYOUT = (
    "Expected PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg (or val instead of test), or PATH/CLASS/*.jpg."
)
_OTHER_NAMES = {
    "training": "train", "training_set": "train", "valid": "val", "validation": "val", "testing": "test",
    "test_set": "test", "train": "train", "val": "val", "test": "test",
}  # fmt: skip
"""Lower-case name of a folder -> the split that it looks like."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
_PROBED = 256
_SHOWN = 5
_LARGEST_OWN_SIZE = 64
Classes = Mapping[str, Sequence[str]]


def load_folder(path: Path, name: str, wanted: Wanted, loading: Loading) -> DataBundle:
    """Load images in folders by class, with train/ and test/ or val/ above them, or split here.

    If both test/ and val/ exist, test/ is reported and val/ is not used.

    Raises:
        CompressorError: No images, one class, classes that differ, or too many unreadable images.
    """
    notes: list[str] = []
    splits = split_folders(path)
    if "train" in splits:
        other = "test" if "test" in splits else "val"
        if other not in splits:
            raise CompressorError(f"{path} has train/ but neither test/ nor val/.", _LAYOUT)
        if len(splits) == 3:
            notes.append(f"{path}: test/ is the test split; val/ is not used.")
        found, tested = (_class_folders(splits[part], notes) for part in ("train", other))
        classes = _same_classes(found, tested, splits["train"], splits[other])
        if untrained := _untrained(found, tested):
            name = untrained[0]
            raise CompressorError(
                f"{splits['train'] / name} holds no images, but {splits[other] / name} has {len(tested[name])}.",
                "Add images to train on, or empty both.",
            )
        train, test = _files(found, classes), _files(tested, classes)
    elif splits:
        raise CompressorError(
            f"{path} has {' and '.join(f'{part}/' for part in splits)} but no train/.", _LAYOUT
        )
    else:
        found = _class_folders(path, notes)
        classes = _checked(found, path)
        files = _files(found, classes)
        train, test = _parts(files, hold_out(_labels(files, notes), 0.2, None, TEST_SEED))
        notes.append(
            f"{path} has no train/ and test/: {len(test)} of its images form the test split."
        )
    kept, held = _parts(train, loading.hold_out(_labels(train, notes)))
    return bundle(name, path, classes, (kept, held, test), wanted.image_size, wanted, notes, loading)


def split_folders(path: Path) -> dict[str, Path]:
    """Return those of the folders train/, val/ and test/ that there are.

    Raises:
        CompressorError: Folders to train and to test on have other names: they would be read as classes, or drawn from.
    """
    splits = {part: path / part for part in ("train", "val", "test") if (path / part).is_dir()}
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name.lower() in _OTHER_NAMES)
    alike = [_OTHER_NAMES[name.lower()] for name in names]
    whole = "train" in splits and len(splits) > 1
    if not whole and "train" in alike and set(alike) > {"train"}:
        other = [f"{name}/ to {part}/" for name, part in zip(names, alike, strict=True) if name != part]
        raise CompressorError(
            f"{path} has {' and '.join(f'{name}/' for name in names)}; only train/ and test/ (or val/) are read as "
            "splits.",
            f"Rename {' and '.join(other)}.",
        )
    return splits


def load_imagenet(path: Path, name: str, wanted: Wanted, loading: Loading) -> DataBundle:
    """Load ImageNet with train/ and val/ by WordNet id; the label is the id's rank, as for published weights.

    Raises:
        CompressorError: A split is missing, or its folders are not WordNet ids.
    """
    hint = "Expected PATH/train/n01440764/*.JPEG and PATH/val likewise; other images: --data folder:PATH."
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise CompressorError(f"{path} has no {part}/ folder.", hint)
    notes: list[str] = []
    found = {part: _class_folders(path / part, notes) for part in ("train", "val")}
    classes = _same_classes(found["train"], found["val"], path / "train", path / "val")
    if invalid := [name for name in classes if not re.fullmatch(r"n\d{8}", name)]:
        raise CompressorError(f"{path} has folders that are no WordNet ids, such as {invalid[0]!r}.", hint)
    if untrained := _untrained(found["train"], found["val"]):
        notes.append(
            f"{path / 'train'} has no images of {len(untrained)} classes that {path / 'val'} has: published weights "
            "know them, but training here would forget them."
        )
    train = _files(found["train"], classes)
    kept, held = _parts(train, loading.hold_out(_labels(train, notes)))
    size = wanted.image_size or wanted.usual.size
    parts = (kept, held, _files(found["val"], classes))
    return bundle(name, path, classes, parts, size, wanted, notes, loading)


def _class_folders(folder: Path, notes: list[str]) -> dict[str, list[str]]:
    """The images of each sub-folder, by its name, both in order; hidden and other files are ignored.

    Sub-folders of a class's folder belong to the class. An empty folder is a class without images, so that the others
    keep their places; one with other files only is none, and `notes` gets a sentence about either.
    """
    found: dict[str, list[str]] = {}
    empty: list[str] = []
    without_images: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            files = list(visible_files(entry.path))
            paths = sorted(path for path in files if is_image(path))
            if paths or not files:
                found[entry.name] = paths
            if not paths:
                (without_images if files else empty).append(entry.name)
    if any(found.values()):
        if empty:
            notes.append(f"{folder} has classes without images: {_some(empty)}. They keep their places.")
        if without_images:
            notes.append(f"{folder} has folders without images, which are not classes: {_some(without_images)}.")
    return found


def visible_files(folder: str | Path) -> Iterator[str]:
    """Yield the files below a folder in order, without hidden ones and those in hidden folders.

    Links to folders are followed. Every folder is read once, whatever leads to it, and none that `folder` lies in.
    """
    read = {(facts.st_dev, facts.st_ino) for facts in map(os.stat, Path(folder).resolve().parents)}
    for where, folders, names in os.walk(folder, followlinks=True):
        facts = os.stat(where)
        if (facts.st_dev, facts.st_ino) in read:
            folders.clear()
            continue
        read.add((facts.st_dev, facts.st_ino))
        visible = sorted(name for name in folders if not name.startswith("."))
        folders[:] = sorted(visible, key=lambda name: os.path.islink(os.path.join(where, name)))  # links come last
        yield from (os.path.join(where, name) for name in sorted(names) if not name.startswith("."))


def is_image(path: str) -> bool:
    """Return whether a file is an image by its name."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _checked(found: Classes, folder: Path) -> tuple[str, ...]:
    filled = [name for name, paths in found.items() if paths]
    if not filled:
        raise CompressorError(f"{folder} holds no images in folders by class.", _LAYOUT)
    if len(filled) == 1:
        raise CompressorError(
            f"{folder} holds images of one class only, {filled[0]!r}; two are needed.", _LAYOUT
        )
    return tuple(found)


def _same_classes(train: Classes, test: Classes, train_path: Path, test_path: Path) -> tuple[str, ...]:
    classes = _checked(train, train_path)
    _checked(test, test_path)
    for one, other, here, there in (
        (train, test, train_path, test_path),
        (test, train, test_path, train_path),
    ):
        if missing := sorted(set(one) - set(other)):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CompressorError(
                f"The classes differ: {', '.join(missing[:3])}{more} in {here}, but not in {there}.",
                "Every class needs a folder in both.",
            )
    return classes


def _untrained(train: Classes, test: Classes) -> list[str]:
    """Return the classes that only the test split has images of."""
    return [name for name, paths in test.items() if paths and not train[name]]


def _files(found: Classes, classes: Sequence[str]) -> list[ImageFile]:
    return [ImageFile(path, label) for label, name in enumerate(classes) for path in found[name]]


def _labels(files: Sequence[ImageFile], notes: list[str]) -> Indices:
    """Return the labels by which files are divided: all 0 where there are classes with a single image."""
    labels = np.array([file.label for file in files], dtype=np.int64)
    if np.unique(labels, return_counts=True)[1].min() < 2:
        note = "Some classes have a single image: splits are drawn without regard to the classes."
        notes += [note] if note not in notes else []
        labels = np.zeros_like(labels)
    return labels


def _parts(
    files: Sequence[ImageFile], places: tuple[Indices, Indices]
) -> tuple[list[ImageFile], list[ImageFile]]:
    """Return the files at places as `hold_out` returns them: (remaining, held out)."""
    stays, out = ([files[index] for index in part.tolist()] for part in places)
    return stays, out


def bundle(
    name: str,
    path: Path,
    classes: tuple[str, ...],
    parts: tuple[list[ImageFile], list[ImageFile], list[ImageFile]],
    size: int | str | None,
    wanted: Wanted,
    notes: list[str],
    loading: Loading,
) -> DataBundle:
    """Return files as a data set: in memory if they fit, except for the random crops of training.

    Args:
        name, classes: As in `DataBundle`.
        path: Folder of the data set.
        parts: Files of the train, search and test split.
        size: Height and width of an input; None for the images' own if they are small and equal, else the usual one.
        wanted: Preprocessing.
        notes: Receives sentences about unreadable files.
        loading: Whether files are decoded now, and by how many processes.

    Raises:
        CompressorError: A split is empty, or too many files are unreadable.
    """
    if empty := [part for part, files in zip(SPLITS, parts, strict=True) if not files]:
        raise CompressorError(f"{name} has too few images: its {empty[0]} split is empty.", "Add some.")
    preprocessing = wanted.at(size or _common_size(parts[0]) or wanted.usual.size)
    in_memory = sum(map(len, parts)) * math.prod(preprocessing.input_shape) <= MEMORY_LIMIT
    decode_now = loading.decode_files and in_memory
    whole = load_files(parts, preprocessing, "Reading images", loading.workers) if decode_now else None

    def read(place: int, augmentation: Augmentation | None = None) -> Split:
        part, files = SPLITS[place], parts[place]
        if not loading.decode_files:
            return FileSplit(files, preprocessing, augmentation, loading.processes)
        if whole is not None:
            decoded, seen = whole[place], files
            unreadable = decoded.unreadable
            held = MemorySplit(decoded.images, decoded.labels, preprocessing, augmentation)
            split: Split = held
            if augmentation is not None and augmentation.crops:  # of whole pictures: these are read in each epoch
                lost = set(unreadable)
                readable = [file for file in files if file.path not in lost]
                split = FileSplit(readable, preprocessing, augmentation, loading.processes, held)
        else:  # opening a million files would take longer than many a run: only a sample is decoded beforehand
            part, seen = f"sampled {part}", _sample(files)
            unreadable = tuple(file.path for file in seen if decode(file.path, preprocessing) is None)
            refuse_unreadable(unreadable, len(seen))
            split = FileSplit(files, preprocessing, augmentation, loading.processes)
        if unreadable:
            share = f"{len(unreadable)} of {len(seen)} {part} images"
            notes.append(f"{share} cannot be read and are skipped, such as {unreadable[0]}.")
        return split

    train, search, test = read(0, augmentation_for(preprocessing)), read(1), read(2)
    files = split_files(parts, path)
    return DataBundle(name, classes, preprocessing.input_shape, train, search, test, tuple(notes), files)


def _sample(files: Sequence[ImageFile]) -> list[ImageFile]:
    chosen = np.random.default_rng(0).permutation(len(files))[:_PROBED]
    return [files[index] for index in np.sort(chosen).tolist()]


def _common_size(files: Sequence[ImageFile]) -> int | None:
    """Return the images' own size if all that were examined are small squares of the same size."""
    sizes = {size for file in _sample(files) if (size := image_size(file.path)) is not None}
    if len(sizes) == 1:
        width, height = next(iter(sizes))
        if width == height and 8 <= width <= _LARGEST_OWN_SIZE:
            return width
    return None
