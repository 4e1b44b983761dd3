"""Images on disk as a split: decoded by worker processes when they are needed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from compressor.core.errors import CompressorError
from compressor.data.augment import Augmentation
from compressor.data.decoded import load_files
from compressor.data.images import ImageFile, decode, whole_picture
from compressor.data.preprocessing import Preprocessing
from compressor.data.reader import Key, Reader, keys_of
from compressor.data.splits import MEMORY_LIMIT, Batch, MemorySplit, Split


class FileSplit(Split):
    """Images on disk.

    Unreadable files are left out of their batch and counted in `.unreadable`. The processes that read augmented images
    stay for the next epoch.

    Args:
        files: Path and label of each image.
        preprocessing, augmentation: As for any split.
        workers: Number of worker processes; 0 decodes in this one.
        decoded: The same images, scaled and cut, if they fit into memory: the files are then only read for random crops
            of whole pictures.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        workers: int = 0,
        decoded: MemorySplit | None = None,
    ) -> None:
        super().__init__(preprocessing, augmentation)
        self.files = tuple(files)
        self.workers = workers
        self.unreadable = 0
        self._decoded = decoded
        self._augmented: tuple[Augmentation, bool, Reader] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> torch.Tensor:
        return torch.tensor([file.label for file in self.files])

    def in_memory(self) -> Split:
        if self._decoded is not None:
            return self._decoded
        if len(self) * math.prod(self.preprocessing.input_shape) > MEMORY_LIMIT:
            return self
        (decoded,) = load_files([self.files], self.preprocessing, "Reading images")
        return MemorySplit(decoded.images, decoded.labels, self.preprocessing, self.augmentation)

    def chosen(self, indices: torch.Tensor) -> FileSplit:
        files = [self.files[index] for index in indices.tolist()]
        decoded = None if self._decoded is None else self._decoded.chosen(indices)
        return FileSplit(files, self.preprocessing, self.augmentation, self.workers, decoded)

    def prepared(self, preprocessing: Preprocessing) -> FileSplit:
        decoded = None if self._decoded is None else self._decoded.prepared(preprocessing)
        return FileSplit(self.files, preprocessing, self.augmentation, self.workers, decoded)

    def release(self) -> None:
        self._augmented = None

    def _raw(
        self, order: torch.Tensor, batch_size: int, generator: torch.Generator | None, *, skip: int, pinned: bool
    ) -> Iterator[Batch]:
        if generator is None and self._decoded is not None:
            yield from self._decoded._raw(order, batch_size, None, skip=skip, pinned=pinned)
            return
        seed = None if generator is None else generator.initial_seed()
        for images, labels, missing, refused in self._reader(seed is not None, pinned)(
            keys_of(order, batch_size, seed, skip)
        ):
            if refused is not None:
                raise refused
            self.unreadable += missing
            if len(labels):
                yield images, labels

    def _reader(self, augmented: bool, pinned: bool) -> Reader:
        """Return a reader: the same one for each epoch of augmented images."""
        known = self._augmented
        if augmented and known is not None and known[:2] == (self.augmentation, pinned):
            return known[2]
        pictures = _Pictures(self.files, self.preprocessing, self.augmentation)
        reader = Reader(pictures, _collate, self.workers, pinned=pinned)
        if augmented:
            self._augmented = (self.augmentation, pinned, reader)
        return reader


_Item = tuple[torch.Tensor, int] | CompressorError | None
"""An image with its label, the reason why it is rejected, or None if it cannot be read."""


class _Pictures(torch.utils.data.Dataset[_Item]):
    """What workers read. They hold the paths as one text: of a million objects each would make a copy of its own."""

    def __init__(
        self, files: Sequence[ImageFile], preprocessing: Preprocessing, augmentation: Augmentation
    ) -> None:
        paths = [os.fsencode(file.path) for file in files]
        self._text = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)])
        self._labels = np.array([file.label for file in files], dtype=np.int64)
        self._preprocessing, self._augmentation = preprocessing, augmentation

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: Key) -> _Item:
        number, seed = key
        path = os.fsdecode(self._text[self._ends[number] : self._ends[number + 1]])
        try:
            image = self._image(path, seed)
        except CompressorError as refused:  # raised through the loader, it would include the worker's traceback
            return refused
        return None if image is None else (image, int(self._labels[number]))

    def _image(self, path: str, seed: int | None) -> torch.Tensor | None:
        """Return an image, augmented if there is a seed: uint8 (channels, height, width)."""
        preprocessing, augmentation = self._preprocessing, self._augmentation
        if seed is None:
            return decode(path, preprocessing)
        if augmentation.crops:
            sides = preprocessing.sides
            picture = whole_picture(path, preprocessing, augmentation.largest_needed(max(sides)))
            image = None if picture is None else augmentation.crop(picture, sides, seed)
        else:
            image = decode(path, preprocessing)
        if image is None:
            return None
        moved = augmentation.moved(image[None], torch.Generator().manual_seed(seed))
        return augmentation.varied(moved, seed)[0]


def _collate(
    items: Sequence[_Item],
) -> tuple[torch.Tensor, torch.Tensor, int, CompressorError | None]:
    refused = next((item for item in items if isinstance(item, CompressorError)), None)
    whole = [item for item in items if isinstance(item, tuple)]
    images = torch.stack([image for image, _ in whole]) if whole else torch.empty(0, dtype=torch.uint8)
    return images, torch.tensor([label for _, label in whole]), len(items) - len(whole), refused
