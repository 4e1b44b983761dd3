"""Where a task's inputs come from, and how they come out of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch


class Feed(Protocol):
    """Batches that can be read again and again; `data.Split` is one of images with labels."""

    def __len__(self) -> int:
        """Number of inputs."""

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

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return the positional arguments of the network in a batch."""

    def steps(self, batch_size: int) -> int:
        """Number of whole batches, at least one."""

    def sample(self, number: int, seed: int = 0) -> Feed:
        """Return a seeded sample of this many inputs."""

    def in_memory(self) -> Feed:
        """Return the same inputs, decoded once if they fit into memory."""


def inputs_in(feed: Feed, number: int, seed: int, batch_size: int, device: str | torch.device) -> Iterator[Any]:
    """Yield the network's inputs in a seeded sample of a feed, batch by batch."""
    sample = feed.sample(number, seed)
    for batch in sample.batches(batch_size, device=device):
        yield sample.inputs(batch)
