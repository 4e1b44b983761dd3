"""A split of a data set, in memory or on the disk, and the batches that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from compressor.data.augment import Augmentation
from compressor.data.files import ImageFile, decode, load_files

Batch = tuple[torch.Tensor, torch.Tensor]
MEMORY_LIMIT = 2 * 1024**3
"""Bytes of decoded images up to which a split is held in memory."""


class Split(ABC):
    """Images with labels that come in batches.

    Args:
        mean, std: Per channel, on the scale 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._shift = torch.tensor(mean).view(1, -1, 1, 1) * 255
        self._scale = torch.tensor(std).view(1, -1, 1, 1) * 255
        self.moments = tuple(mean), tuple(std)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _raw(
        self, order: torch.Tensor, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[Batch]:
        """uint8 images and labels in the given order; augmented where there is a generator."""

    @abstractmethod
    def in_memory(self, images: int | None = None, seed: int = 0) -> Split:
        """The split, or a seeded choice of `images` of it, decoded once; the same where it would not fit."""

    @property
    @abstractmethod
    def labels(self) -> torch.Tensor:
        """int64 (N,)."""

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Go through the split once.

        Args:
            batch_size: Images in a batch; the last may be smaller.
            shuffle_seed: Order and augmentation follow from it alone; None for the stored order.
            augment: Whether to augment, which needs a seed.
            device: Where the batches are put.
            drop_last: Whether a last batch that is not full is left out (unless it is the only one).
            shard: (rank, world size): every process takes its share of each of the common batches.

        Yields:
            (float32 normalised (N, C, H, W), int64 (N,)).
        """
        if augment and shuffle_seed is None:
            raise ValueError("augmentation is drawn from shuffle_seed, which is None")
        count = len(self)
        generator = None
        if shuffle_seed is None:
            order = torch.arange(count)
        else:
            generator = torch.Generator().manual_seed(shuffle_seed)
            order = torch.randperm(count, generator=generator)
        if drop_last and count > batch_size:
            order = order[: count - count % batch_size]
        rank, world = shard
        if world > 1:
            order = order[: len(order) - len(order) % world][rank::world]
            batch_size = max(1, batch_size // world)
        if generator is not None:
            generator.manual_seed(((shuffle_seed or 0) * world + rank) ^ 0x5EED)
        for images, labels in self._raw(order, batch_size, generator if augment else None):
            yield self._normalised(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        shift, scale = self._shift.to(images.device), self._scale.to(images.device)
        return images.to(torch.float32).sub_(shift).div_(scale)


class MemorySplit(Split):
    """Images that lie decoded in memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(mean, std)
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"expected uint8 (N, C, H, W) and N labels, got {images.dtype} {tuple(images.shape)}"
            )
        self.images = images
        self._labels = labels
        self.augmentation = augmentation or Augmentation()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> torch.Tensor:
        return self._labels

    def in_memory(self, images: int | None = None, seed: int = 0) -> MemorySplit:
        if images is None or images >= len(self):
            return self
        chosen = (
            torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:images].sort().values
        )
        return MemorySplit(self.images[chosen], self._labels[chosen], *self.moments, self.augmentation)

    def _raw(
        self, order: torch.Tensor, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[Batch]:
        for chosen in torch.split(order, batch_size):
            images = self.images[chosen]
            if generator is not None:
                images = self.augmentation(images, generator)
            yield images, self._labels[chosen]


class FileSplit(Split):
    """Images that stay on the disk and are decoded by worker processes as they are needed.

    Files that turn out to be unreadable are left out of their batch and counted in `.unreadable`.

    Args:
        files: Path and label of each image.
        size: Height and width in pixels.
        workers: Worker processes; 0 decodes in this one.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(mean, std)
        self.files = tuple(files)
        self.size = size
        self.augmentation = augmentation or Augmentation()
        self.workers = workers
        self.unreadable = 0

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> torch.Tensor:
        return torch.tensor([file.label for file in self.files])

    def in_memory(self, images: int | None = None, seed: int = 0) -> Split:
        files = self.files
        if images is not None and images < len(files):
            generator = torch.Generator().manual_seed(seed)
            files = tuple(
                files[i] for i in torch.randperm(len(files), generator=generator)[:images].sort().values
            )
        if len(files) * 3 * self.size**2 > MEMORY_LIMIT:
            return self
        decoded = load_files(files, self.size, "Reading images")
        return MemorySplit(decoded.images, decoded.labels, *self.moments, self.augmentation)

    def _raw(
        self, order: torch.Tensor, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        seed = None if generator is None else generator.initial_seed()
        items = _Items([self.files[i] for i in order.tolist()], self.size, self.augmentation, seed)
        loader = DataLoader(items, batch_size=batch_size, num_workers=self.workers, collate_fn=_collate)
        for images, labels, missing in loader:
            self.unreadable += missing
            if len(labels):
                yield images, labels


class _Items(torch.utils.data.Dataset[tuple[torch.Tensor, int] | None]):
    def __init__(
        self, files: Sequence[ImageFile], size: int, augmentation: Augmentation, seed: int | None
    ) -> None:
        self.files = files
        self.size = size
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | None:
        file = self.files[index]
        image = decode(file.path, self.size)
        if image is None:
            return None
        if self.seed is not None:  # one generator an image, so that the number of workers changes nothing
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
            image = self.augmentation(image[None], generator)[0]
        return image, file.label


def _collate(items: Sequence[tuple[torch.Tensor, int] | None]) -> tuple[torch.Tensor, torch.Tensor, int]:
    whole = [item for item in items if item is not None]
    images = torch.stack([image for image, _ in whole]) if whole else torch.empty(0, dtype=torch.uint8)
    return images, torch.tensor([label for _, label in whole]), len(items) - len(whole)
