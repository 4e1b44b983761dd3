"""A data set in disjoint splits, each in memory or on disk, and their batches."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.core.manifest import SplitFiles
from compressor.data.augment import Augmentation
from compressor.data.preprocessing import Preprocessing
from compressor.data.reader import place_seed

Batch = tuple[torch.Tensor, Any]
"""Images, and their labels: a tensor, or a list of one for each image."""
Indices = npt.NDArray[np.int64]
SPLITS = ("train", "search", "test")
MEMORY_LIMIT = 2 * 1024**3
"""Maximum bytes of decoded images for which a split is held in memory."""
TEST_SEED = 20
"""Seed of the test split of data without one; the same for every run, so that runs are comparable."""


class Split(ABC):
    """Images with labels, in batches.

    Args:
        preprocessing: How an image becomes an input.
        augmentation: Random changes of training images; None for none.
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation or Augmentation()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _raw(
        self, order: torch.Tensor, batch_size: int, generator: torch.Generator | None, *, skip: int, pinned: bool
    ) -> Iterator[Batch]:
        """Yield uint8 images and labels in the given order; see `batches`.

        Args:
            order: Numbers of the images, int64 (N,).
            batch_size: Images per batch.
            generator: What augmentation draws from; None for none.
            skip: Batches at the beginning that are not yielded, and not read if they need not be.
            pinned: Whether the batches should be in page-locked memory.
        """

    @abstractmethod
    def in_memory(self) -> Split:
        """Return the split decoded into memory; the split itself if it does not fit."""

    @property
    @abstractmethod
    def labels(self) -> torch.Tensor:
        """int64 (N,)."""

    @abstractmethod
    def chosen(self, indices: torch.Tensor) -> Split:
        """Return the images at these indices, in their order."""

    @abstractmethod
    def prepared(self, preprocessing: Preprocessing) -> Split:
        """Return the same images for another kind of network: other channels, mean or std, but not another size."""

    def sample(self, images: int, seed: int = 0) -> Split:
        """Return a seeded sample of `images`, spread over the classes; all of them if there are no more.

        Every class has its share of the split, to within one image; so it has in each prefix of the sample, because
        the classes alternate.
        """
        return self.chosen(torch.from_numpy(_spread(self.labels.numpy(), seed)[:images]))

    def inputs(self, batch: Batch) -> tuple[torch.Tensor]:
        """Return the arguments of a network in a batch: its images."""
        return (batch[0],)

    def steps(self, batch_size: int, world: int = 1) -> int:
        """Return the number of whole batches, at least one; `world` processes share each."""
        return max(1, len(self) // batch_size)

    def release(self) -> None:  # noqa: B027  (most splits keep nothing)
        """Free what is only kept for further epochs."""

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
        skip: int = 0,
    ) -> Iterator[Batch]:
        """Iterate over the split once.

        Args:
            batch_size: Images per batch; the last may be smaller.
            shuffle_seed: Seed of order and augmentation; None for the stored order.
            augment: Whether to augment, which needs a seed.
            device: Device of the batches.
            drop_last: Whether to drop an incomplete last batch (unless it is the only one).
            shard: (rank, world size): every process gets its share of each of the common batches.
            skip: Batches at the beginning that are left out; the others are as without it.

        Yields:
            (normalized float32 (N, C, H, W), int64 (N,)).
        """
        if augment and shuffle_seed is None:
            raise ValueError("augmentation is drawn from shuffle_seed, which is None")
        order, batch_size = epoch_order(len(self), batch_size, shuffle_seed, drop_last, shard)
        drawn = None
        if augment:
            rank, world = shard
            drawn = torch.Generator().manual_seed(((shuffle_seed or 0) * world + rank) ^ 0x5EED)
        pinned = torch.device(device).type == "cuda"
        stream = self._raw(order, batch_size, drawn, skip=skip, pinned=pinned)
        for number, (images, labels) in enumerate(stream, start=skip):
            normalised = self.preprocessing.normalised(images.to(device, non_blocking=True))
            if drawn is not None:
                self.augmentation.erase(normalised, place_seed(drawn.initial_seed(), number))
            if isinstance(labels, list):  # boxes, of which every image has another number
                yield normalised, [each.to(device, non_blocking=True) for each in labels]
            else:
                yield normalised, labels.to(device, non_blocking=True)


def epoch_order(
    count: int, batch_size: int, shuffle_seed: int | None, drop_last: bool, shard: tuple[int, int]
) -> tuple[torch.Tensor, int]:
    """Return the inputs of an epoch in order, int64 (N,), and the size of a process's batches; see `Split.batches`."""
    order = torch.arange(count)
    if shuffle_seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle_seed))
    if drop_last and count > batch_size:
        order = order[: count - count % batch_size]
    rank, world = shard
    return order[: len(order) - len(order) % world][rank::world], max(1, batch_size // world)


def _spread(labels: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Return all indices in a random order in which the classes alternate, each as often as it has images."""
    if not len(labels):
        return np.zeros(0, dtype=np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    turn = (rank + np.repeat(generator.random(len(counts)), counts)) / np.repeat(counts, counts)
    return np.asarray(order[np.argsort(turn, kind="stable")])


class MemorySplit(Split):
    """Images decoded in memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(preprocessing, augmentation)
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"expected uint8 (N, C, H, W) and N labels, got {images.dtype} {tuple(images.shape)}"
            )
        self.images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> torch.Tensor:
        return self._labels

    def in_memory(self) -> MemorySplit:
        return self

    def chosen(self, indices: torch.Tensor) -> MemorySplit:
        return MemorySplit(self.images[indices], self._labels[indices], self.preprocessing, self.augmentation)

    def prepared(self, preprocessing: Preprocessing) -> MemorySplit:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        images = self.images
        if preprocessing.channels < images.shape[1]:
            images = torch.cat([rgb_to_grayscale(part) for part in torch.split(images, 1000)])
        elif preprocessing.channels > images.shape[1]:
            images = images.expand(-1, preprocessing.channels, -1, -1).contiguous()
        return MemorySplit(images, self._labels, preprocessing, self.augmentation)

    def _raw(
        self, order: torch.Tensor, batch_size: int, generator: torch.Generator | None, *, skip: int, pinned: bool
    ) -> Iterator[Batch]:
        for number, chosen in enumerate(torch.split(order, batch_size)):
            images = self.images[chosen]
            if generator is not None:  # batches that are skipped draw, too
                images = self.augmentation.moved(images, generator)
            if number < skip:
                continue
            if generator is not None:
                seed = place_seed(generator.initial_seed(), number)
                images = self.augmentation.varied(self.augmentation.cropped(images, seed), seed)
            yield images, self._labels[chosen]


@dataclass(frozen=True)
class DataBundle:
    """A data set in three disjoint splits.

    Attributes:
        name: Requested name, such as "digits" or "folder:/data/birds".
        classes: Names of the classes, in the order of the labels; empty without labels, which are then 0.
        input_shape: (channels, height, width) of one image.
        train: Images for training the weights.
        search: Held out from training; scores candidates, and is never reported.
        test: Reported, and never used for a choice.
        notes: What the user should know, such as the number of images that could not be read.
        files: Split -> its files, by which a resumed run knows whether they are still the same; empty without files.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    train: Split
    search: Split
    test: Split
    notes: tuple[str, ...] = ()
    files: Mapping[str, SplitFiles] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def facts(self) -> dict[str, Any]:
        """What a network's files say about the images that it takes and about its classes; JSON's kinds only."""
        classes = {"classes": list(self.classes)} if self.classes else {}
        return {**classes, "preprocessing": self.preprocessing.to_dict()}

    @property
    def preprocessing(self) -> Preprocessing:
        """How its images become inputs; the same in all splits."""
        return self.train.preprocessing

    def prepared(self, preprocessing: Preprocessing) -> DataBundle:
        """The same images for another kind of network; see `Split.prepared`."""
        parts = {name: getattr(self, name).prepared(preprocessing) for name in SPLITS}
        return replace(self, input_shape=preprocessing.input_shape, **parts)


def split_files(parts: Iterable[Iterable[tuple[str, object]]], folder: Path) -> dict[str, SplitFiles]:
    """Return what identifies the files of each split.

    Args:
        parts: Path and label of each file, for each of `SPLITS`.
        folder: The names are relative to it.
    """
    found = {}
    for split, files in zip(SPLITS, parts, strict=True):
        digest, count = hashlib.sha256(), 0
        for path, label in files:
            digest.update(os.fsencode(path.removeprefix(f"{folder}{os.sep}")) + f"\0{label}\0".encode())
            count += 1
        found[split] = SplitFiles(images=count, sha256=digest.hexdigest())
    return found


@dataclass(frozen=True)
class Loading:
    """How a data set is divided and read, whatever it is.

    Attributes:
        seed: Seed that chooses the search split's images from the training images; the test split is fixed.
        search_share: Share of the training images that the search split holds out, for images by class; other data
            has a share of its own.
        search_limit: Maximum number of images held out.
        workers: Threads or processes that decode files; None for a number that suits the machine.
        decode_files: Whether files are decoded now as far as they fit into memory; else each is when it is used, and
            unreadable ones are not known.
    """

    seed: int
    search_share: float
    search_limit: int
    workers: int | None
    decode_files: bool

    @property
    def processes(self) -> int:
        """Number of processes that read a split on disk."""
        return min(8, os.cpu_count() or 1) if self.workers is None else self.workers

    def hold_out(self, labels: Sequence[int] | Indices, share: float | None = None) -> tuple[Indices, Indices]:
        """Divide the training images into those that stay and the search split; see `hold_out`.

        Args:
            labels: One label an image, shape (N,).
            share: Share of each class to hold out; None for `search_share`.
        """
        return hold_out(labels, self.search_share if share is None else share, self.search_limit, self.seed)


def hold_out(
    labels: Sequence[int] | Indices, share: float, limit: int | None, seed: int
) -> tuple[Indices, Indices]:
    """Divide indices into a part that stays and a part that is held out, stratified by label.

    Args:
        labels: One label an image, shape (N,).
        share: Share of each class to hold out, rounded to whole images, at least one where there are two.
        limit: The most images to hold out in all; the share is lowered to it.
        seed: Same seed, same split.

    Returns:
        (stays, held out), both ascending.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if limit is not None and len(labels) * share > limit:
        share = limit / len(labels)
    rng = np.random.default_rng(seed)
    held: list[Indices] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        held.append(members[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out
