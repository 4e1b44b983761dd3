"""Batches of items that worker processes read, which stay from one epoch to the next."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from compressor.core.errors import CompressorError

Key = tuple[int, int | None]
"""Number of an item, and the seed of its augmentation; None for none."""
_SPREAD = 1_000_003


class Reader:
    """Reads batches of items.

    Its processes are started by the first batch and end with the reader. They draw nothing from the global generators,
    in whatever epoch they are started.

    Args:
        items: Gives the item of a key.
        collate: Makes a batch of items.
        workers: Number of processes; 0 reads in this one.
        pinned: Whether batches are put into page-locked memory, which a GPU copies from while it computes.
    """

    def __init__(
        self,
        items: torch.utils.data.Dataset[Any],
        collate: Callable[[list[Any]], Any],
        workers: int,
        *,
        pinned: bool = False,
    ) -> None:
        self._order = _Order()
        self._loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            items,
            batch_sampler=self._order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pinned,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
            worker_init_fn=_begin,
        )
        weakref.finalize(self, _end, self._loader)

    def __call__(self, batches: Iterable[list[Key]]) -> Iterator[Any]:
        """Yield the batch of each list of keys. A new call ends an earlier one.

        Raises:
            CompressorError: A process died.
        """
        self._order.batches = batches
        try:
            yield from self._loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise CompressorError(
                f"A process that reads images died: {str(error).splitlines()[0].rstrip('.')}.",
                "Most often the memory is full, or in a container /dev/shm: give it more (docker run --shm-size=8g).",
            ) from error


def _begin(_worker: int) -> None:
    """Leave the signals of the terminal to the parent, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(loader: Any) -> None:
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


class _Order:
    """The keys of each batch, set anew for each epoch; a loader's batch sampler."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


def keys_of(order: torch.Tensor, batch_size: int, seed: int | None, skip: int = 0) -> Iterator[list[Key]]:
    """Yield the keys of each batch of an epoch.

    The seed of an item follows from its place in the epoch: neither the number of processes nor skipped batches change
    it.

    Args:
        order: Numbers of the items, int64 (N,).
        batch_size: Items of a batch; the last may have fewer.
        seed: Seed of the epoch's augmentation; None for none.
        skip: Batches at the beginning that are left out.
    """
    for start in range(skip * batch_size, len(order), batch_size):
        numbers = order[start : start + batch_size].tolist()
        if seed is None:
            yield [(number, None) for number in numbers]
        else:
            yield [(number, place_seed(seed, start + place)) for place, number in enumerate(numbers)]


def place_seed(seed: int, place: int) -> int:
    """Return the seed of what is drawn at one place of an epoch."""
    return (seed * _SPREAD + place) % 2**63
