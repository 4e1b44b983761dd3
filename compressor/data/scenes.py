"""Pictures with a target each: the class of every pixel, or boxes; drawn in memory, or read from files.

A target is a tensor: a mask is uint8 (H, W) with `IGNORED` where no class is known; boxes are float32 (n, 5), each its
left, top, right and bottom edge in pixels of the input and the number of its class, from 1 on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.data.decoded import pictures
from compressor.data.images import decode
from compressor.data.preprocessing import Preprocessing
from compressor.data.reader import Key, Reader, keys_of
from compressor.data.splits import MEMORY_LIMIT, DataBundle, Indices, Loading, Split, split_files

IGNORED = 255
"""Class of pixels that neither the loss nor the score counts."""
SMALLEST_CROP = 0.5
"""Smallest share of a training picture's area that a random crop keeps."""
SEARCH_SHARE = 0.1
FEWEST = 4
"""Pictures to train on; some networks cannot be trained on a batch of one."""
Batch = tuple[Tensor, Any]


class Scene(Protocol):
    """A picture with its target."""

    def read(self, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        """Return the picture, uint8 (channels, height, width), and its target.

        Raises:
            CompressorError: A file cannot be read, or the target does not fit the picture.
        """


@dataclass(frozen=True)
class SceneFile:
    """A picture on disk; a subclass has its target."""

    image: str

    @property
    def label(self) -> object:
        """What of its target is written in a list of files, instead of in a file of its own."""
        return ""

    def read(self, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        image = decode(self.image, preprocessing)
        if image is None:
            raise self.unreadable()
        return image, self.target(preprocessing)

    def target(self, preprocessing: Preprocessing) -> Tensor:
        """Return the target of the picture as an input."""
        raise NotImplementedError

    @classmethod
    def targets(cls, files: Sequence[Any], preprocessing: Preprocessing) -> Sequence[Tensor]:
        """Return the targets of many files."""
        return [file.target(preprocessing) for file in files]

    def unreadable(self) -> CompressorError:
        """Return the error that the picture cannot be read."""
        return CompressorError(f"{self.image} cannot be read.", "Copy it again, or delete it and its mask or boxes.")


@dataclass(frozen=True)
class Drawn:
    """A picture in memory, uint8 (3 or 1, H, W), with its target."""

    image: Tensor
    target: Tensor

    def read(self, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        image = self.image
        if preprocessing.channels < len(image):
            image = rgb_to_grayscale(image)
        return image.expand(preprocessing.channels, -1, -1), self.target


class SceneSplit(Split):
    """Pictures with targets, in batches: masks are stacked, boxes are a list of tensors.

    Args:
        scenes: The pictures.
        preprocessing: How a picture becomes an input.
        augment: Whether training pictures are mirrored and cropped at random.
        workers: Processes that read files; 0 for this one.
    """

    def __init__(
        self, scenes: Sequence[Scene], preprocessing: Preprocessing, augment: bool = False, workers: int = 0
    ) -> None:
        super().__init__(preprocessing)
        self.scenes, self.augment, self.workers = tuple(scenes), augment, workers

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def labels(self) -> Tensor:
        """Zeros: a picture as a whole has no class."""
        return torch.zeros(len(self), dtype=torch.int64)

    def in_memory(self) -> SceneSplit:
        if len(self) * _bytes(self.preprocessing) > MEMORY_LIMIT:
            return self
        return SceneSplit(_read(self.scenes, self.preprocessing, None), self.preprocessing, self.augment)

    def chosen(self, indices: Tensor) -> SceneSplit:
        scenes = [self.scenes[index] for index in indices.tolist()]
        return SceneSplit(scenes, self.preprocessing, self.augment, self.workers)

    def prepared(self, preprocessing: Preprocessing) -> SceneSplit:
        return SceneSplit(self.scenes, preprocessing, self.augment, self.workers)

    def _raw(
        self, order: Tensor, batch_size: int, generator: torch.Generator | None, *, skip: int, pinned: bool
    ) -> Iterator[Batch]:
        seed = None if generator is None or not self.augment else generator.initial_seed()
        items = _Items(self.scenes, self.preprocessing)
        keys = keys_of(order, batch_size, seed, skip)
        if not self.workers:
            for batch in keys:
                yield _collate([items[key] for key in batch])
            return
        for batch in Reader(items, _collate, self.workers, pinned=pinned)(keys):
            if isinstance(batch, CompressorError):
                raise batch
            yield batch


class _Items(torch.utils.data.Dataset[Any]):
    """Scenes by their number, augmented if there is a seed."""

    def __init__(self, scenes: Sequence[Scene], preprocessing: Preprocessing) -> None:
        self.scenes, self.preprocessing = scenes, preprocessing

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor] | CompressorError:
        number, seed = key
        try:
            image, target = self.scenes[number].read(self.preprocessing)
        except CompressorError as refused:  # raised in a worker, it would come with the worker's traceback
            return refused
        return (image, target) if seed is None else augmented(image, target, seed)


def _collate(items: Sequence[Any]) -> Any:
    for item in items:
        if isinstance(item, CompressorError):
            if torch.utils.data.get_worker_info() is None:
                raise item
            return item
    targets = [target for _, target in items]
    return torch.stack([image for image, _ in items]), torch.stack(targets) if is_mask(
        targets[0]
    ) else targets


def is_mask(target: Tensor) -> bool:
    """Return whether a target is a mask; else it is boxes."""
    return target.dtype == torch.uint8


def augmented(image: Tensor, target: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mirror every second picture, and crop and scale it back, together with its target.

    Args:
        image: uint8 (C, H, W).
        target: Its mask, or boxes; of these, what is less than a pixel wide after the crop is left out.
        seed: Seed of the changes.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    height, width = image.shape[-2:]
    changes = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomResizedCrop((height, width), scale=(SMALLEST_CROP, 1.0), antialias=True),
        ]
    )
    mask = is_mask(target)
    told: Any = (
        tv_tensors.Mask(target)
        if mask
        else tv_tensors.BoundingBoxes(target[:, :4], format="XYXY", canvas_size=(height, width))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed, told = changes(tv_tensors.Image(image), told)
    pixels, moved = changed.as_subclass(Tensor), told.as_subclass(Tensor)
    if mask:
        return pixels, moved
    found = torch.cat([moved, target[:, 4:]], dim=1)
    return pixels, found[((moved[:, 2:] - moved[:, :2]) >= 1).all(dim=1)]


def bundle_of(
    name: str,
    classes: tuple[str, ...],
    train: Sequence[Scene],
    test: Sequence[Scene],
    preprocessing: Preprocessing,
    loading: Loading,
    *,
    search_share: float = SEARCH_SHARE,
    path: Path | None = None,
    notes: Sequence[str] = (),
) -> DataBundle:
    """Return scenes as a data set, read into memory if they fit; the search split comes out of the training scenes.

    Args:
        name, classes, notes: As in `DataBundle`.
        train, test: Scenes to train on and to report.
        preprocessing: How a picture becomes an input.
        loading: How the search split is chosen, and whether files are read now and by how many processes.
        search_share: Share of the scenes in the search split, instead of that of `loading`.
        path: Folder of the files; None for scenes in memory.

    Raises:
        CompressorError: There are too few scenes, or one cannot be read.
    """
    if len(train) < FEWEST or not test:
        raise CompressorError(
            f"{name} has {len(train)} pictures to train on and {len(test)} to test on; {FEWEST} and one are needed.",
            "Add some.",
        )
    stays, held = loading.hold_out([0] * len(train), search_share)
    files = {} if path is None else split_files(_listed(train, test, (stays, held)), path)
    if fits := loading.decode_files and (len(train) + len(test)) * _bytes(preprocessing) <= MEMORY_LIMIT:
        read = _read([*train, *test], preprocessing, loading.workers)
        train, test = read[: len(train)], read[len(train) :]
    processes = 0 if fits else loading.processes
    kept, scored = ([train[index] for index in part.tolist()] for part in (stays, held))
    return DataBundle(
        name,
        classes,
        preprocessing.input_shape,
        SceneSplit(kept, preprocessing, augment=True, workers=processes),
        SceneSplit(scored, preprocessing, workers=processes),
        SceneSplit(test, preprocessing, workers=processes),
        tuple(notes),
        files,
    )


def _listed(train: Sequence[Any], test: Sequence[Any], places: Sequence[Indices]) -> list[list[tuple[str, object]]]:
    """Return path and label of the files in each split."""
    parts = [*([train[index] for index in part.tolist()] for part in places), test]
    return [[(scene.image, scene.label) for scene in part] for part in parts]


def _bytes(preprocessing: Preprocessing) -> int:
    channels, height, width = preprocessing.input_shape
    return (channels + 1) * height * width


def _read(scenes: Sequence[Any], preprocessing: Preprocessing, workers: int | None) -> list[Scene]:
    """Return scenes in memory; those of files are decoded, or come from the cache."""
    if isinstance(scenes[0], Drawn):
        return list(scenes)
    images, fine, rows = pictures([scene.image for scene in scenes], preprocessing, "Reading pictures", workers)
    if lost := next((scene for scene in scenes if not fine[rows[scene.image]]), None):
        raise lost.unreadable()
    targets = type(scenes[0]).targets(scenes, preprocessing)
    return [Drawn(images[rows[scene.image]], target) for scene, target in zip(scenes, targets, strict=True)]
