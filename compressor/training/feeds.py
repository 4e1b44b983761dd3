"""Where a task's inputs come from, and how they come out of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from export.convert.trees import mapped


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
    ) -> Iterator[Any]:
        """Iterate once; see `data.Split.batches`. Batches of a user's loader have the loader's own size and order."""

    def steps(self, batch_size: int) -> int:
        """Number of whole batches, at least one."""


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
