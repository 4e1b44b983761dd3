"""Where a task's inputs come from, and how they come out of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from export.convert.trees import mapped, tensors_in


class Batches(Protocol):
    """Batches to train on, which can be read again and again."""

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
    ) -> Iterator[Any]:
        """Iterate once; see `data.Split.batches`. Batches of a user's loader have the loader's own size and order.

        Skipped batches have drawn from the global generators when this returns, if they draw from them at all.
        """

    def steps(self, batch_size: int, world: int = 1) -> int:
        """Number of steps in which `world` processes go through all whole batches, at least one."""

    def release(self) -> None:
        """Free what is only kept for further epochs."""


class Feed(Batches, Protocol):
    """Inputs of a network; `data.Split` is one of images with labels."""

    def __len__(self) -> int:
        """Number of inputs."""

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return the positional arguments of the network in a batch."""

    def sample(self, number: int, seed: int = 0) -> Feed:
        """Return a seeded sample of this many inputs."""

    def in_memory(self) -> Feed:
        """Return the same inputs, decoded once if they fit into memory."""


def inputs_in(feed: Feed, number: int, seed: int, batch_size: int, device: str | torch.device) -> Iterator[Any]:
    """Yield the network's inputs in a seeded sample of a feed, batch by batch."""
    sample = feed.sample(number, seed)
    for batch in sample.batches(batch_size, device=device):
        yield sample.inputs(batch)


def joined(rows: list[Any]) -> Any:
    """Return nested values of several batches as one, with their tensors concatenated."""
    first = rows[0]
    if isinstance(first, Tensor):
        return first if first.dim() == 0 else torch.cat(rows)
    if isinstance(first, Mapping):
        return {key: joined([row[key] for row in rows]) for key in first}
    if isinstance(first, list | tuple):
        items = [joined(list(part)) for part in zip(*rows, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


def parts_of(batch: Any, number: int) -> list[tuple[Any, float]]:
    """Return a batch in up to `number` equal parts, each with its share of the inputs.

    Tensors are divided that have as many rows as the first, and lists within the batch that have as many items.
    """
    if number == 1:
        return [(batch, 1.0)]
    count = len(tensors_in(batch)[0])
    size = math.ceil(count / number)
    if size >= count:
        return [(batch, 1.0)]

    def part(value: Any, rows: slice, depth: int = 0) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.dim() and len(value) == count else value
        if isinstance(value, Mapping):
            return {key: part(item, rows, depth + 1) for key, item in value.items()}
        if isinstance(value, list) and depth and len(value) == count:
            return value[rows]
        if isinstance(value, list | tuple):
            items = [part(item, rows, depth + 1) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    starts = range(0, count, size)
    return [(part(batch, slice(start, start + size)), min(size, count - start) / count) for start in starts]


def random_inputs(example: tuple[Any, ...], number: int, seed: int) -> tuple[Any, ...]:
    """Return normally distributed inputs in the form of an example for one; whole numbers are repeated."""
    random = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != 1:
            return tensor
        if tensor.is_floating_point():
            return torch.randn(number, *tensor.shape[1:], generator=random).to(tensor)
        return tensor.expand(number, *tensor.shape[1:])

    found: tuple[Any, ...] = mapped(drawn, example)
    return found
