"""Divide a user's training batches, so that training does not see the inputs that choose and judge networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

Divided = tuple[Iterable[Any], Iterable[Any]]
"""The batches that stay for training, and those that are held out."""


def divided(
    batches: Iterable[Any], number: Callable[[int], int], length: Callable[[Any], int], seed: int
) -> Divided | None:
    """Hold out random inputs of some batches.

    A list is divided between its batches, a DataLoader of a map-style data set between its items; its order, collation
    and workers stay. Other objects may give other inputs each time, and cannot be divided.

    Args:
        batches: The user's object.
        number: Returns how many inputs to hold out of so many; 0 for none.
        length: Returns the number of inputs in a batch.
        seed: Seed of the choice.

    Returns:
        None where the batches cannot be divided.
    """
    if isinstance(batches, list | tuple):
        return _between_batches(batches, number, length, seed)
    return _between_items(batches, number, seed) if type(batches) is DataLoader else None


def _between_batches(
    batches: Sequence[Any], number: Callable[[int], int], length: Callable[[Any], int], seed: int
) -> Divided | None:
    """Hold out whole batches, at most half of the inputs."""
    lengths = [length(batch) for batch in batches]
    wanted = number(sum(lengths))
    held: set[int] = set()
    count = 0
    for index in _order(len(batches), seed):
        if count < wanted and 2 * (count + lengths[index]) <= sum(lengths):
            held.add(index)
            count += lengths[index]
    if not held or 2 * count < wanted:
        return None
    kept = [batch for index, batch in enumerate(batches) if index not in held]
    return kept, [batches[index] for index in sorted(held)]


def _between_items(loader: DataLoader[Any], number: Callable[[int], int], seed: int) -> Divided | None:
    indices, size = _indices(loader), loader.batch_size
    if indices is None or size is None:
        return None
    wanted, total = number(len(indices)), len(indices)
    if not wanted or (loader.drop_last and total - wanted < size):
        return None
    if size > 1 and (total - wanted) % size == 1 != total % size:
        wanted += 1  # batch norm cannot train on a last batch of one input
    held = frozenset(indices[place] for place in _order(total, seed)[:wanted])
    kept = Without(loader.sampler, held, sum(index not in held for index in indices))
    return _like(loader, kept), _like(loader, sorted(held), drop_last=False, persistent_workers=False)


def _indices(loader: DataLoader[Any]) -> Sequence[int] | None:
    """Return the items that a loader reads once in each epoch; None if it reads others."""
    sampler: Any = loader.sampler
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices)
    if type(sampler) is SequentialSampler:
        return range(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement:
        return range(len(sampler)) if len(sampler) == len(sampler.data_source) else None
    return None


class Without:
    """The indices of a sampler but for some, in its order.

    Args:
        sampler: The user's sampler.
        held: Indices that are left out.
        count: Number of the others.
    """

    def __init__(self, sampler: Iterable[int], held: frozenset[int], count: int) -> None:
        self._sampler, self._held, self._count = sampler, held, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (index for index in self._sampler if index not in self._held)


def _like(loader: DataLoader[Any], sampler: Any, **changed: Any) -> DataLoader[Any]:
    """Return a loader with another sampler."""
    names = (
        "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn",
        "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers",
    )  # fmt: skip
    return DataLoader(loader.dataset, sampler=sampler, **{**{name: getattr(loader, name) for name in names}, **changed})


def _order(count: int, seed: int) -> list[int]:
    found: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return found
