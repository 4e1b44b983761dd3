"""Batches that are divided between training and what judges it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from compressor.training.held_out import divided

X = torch.arange(100)
DATA = TensorDataset(X)


def items(batches: Any) -> list[int]:
    return torch.cat([batch[0] for batch in batches]).tolist()


def two_fifths(total: int) -> int:
    return round(0.4 * total)


def test_a_list_loses_whole_batches() -> None:
    batches = [[part] for part in X.split(10)]
    found = divided(batches, two_fifths, lambda batch: len(batch[0]), 0)
    assert found is not None
    assert [len(part) for part in found] == [6, 4]  # type: ignore[arg-type]
    assert items(found[0]) == sorted(items(found[0]))
    assert sorted(items(found[0]) + items(found[1])) == X.tolist()
    assert items(divided(batches, two_fifths, lambda batch: len(batch[0]), 0)[1]) == items(found[1])  # type: ignore[index]


@pytest.mark.parametrize(("sizes", "held"), [((50, 50), [50]), ((16, 20), [16]), ((100,), None), ((1, 99), None)])
def test_at_most_half_of_a_list_is_held_out(sizes: tuple[int, ...], held: list[int] | None) -> None:
    found = divided([[torch.zeros(size)] for size in sizes], two_fifths, lambda batch: len(batch[0]), 0)
    assert (None if found is None else [len(batch[0]) for batch in found[1]]) == held


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": True, "generator": torch.Generator().manual_seed(1)},
        {},
        {"drop_last": True},
        {"sampler": SubsetRandomSampler(range(10, 90))},
        {"shuffle": True, "num_workers": 1, "collate_fn": lambda rows: [torch.stack([x for (x,) in rows])]},
    ],
)
def test_a_loader_loses_items(options: dict[str, Any]) -> None:
    loader = DataLoader(DATA, batch_size=8, **options)
    given = items(loader)
    found = divided(loader, two_fifths, len, 0)
    assert found is not None
    kept, held = (set(items(part)) for part in found)
    assert not kept & held
    assert kept == set(items(found[0]))  # in the next epoch, too
    assert len(set(given) - kept - held) < (8 if options.get("drop_last") else 1)
    assert len(held) == two_fifths(len(range(10, 90)) if "sampler" in options else 100)
    assert len(list(found[0])) == len(found[0])  # type: ignore[arg-type]
    if options.get("shuffle"):
        assert items(found[0]) != items(found[0])


def test_no_last_batch_of_one_input() -> None:
    loader = DataLoader(TensorDataset(torch.arange(102)), batch_size=20)  # 102 - 41 leaves 61
    found = divided(loader, two_fifths, len, 0)
    assert found is not None
    assert [len(batch[0]) for batch in found[0]] == [20, 20, 20]
    assert len(items(found[1])) == 42


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return iter(X[:, None])


class Own(DataLoader):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    "batches",
    [
        DataLoader(Stream(), batch_size=4),
        DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, False)),
        DataLoader(DATA, batch_size=None),
        DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, replacement=True)),
        DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, num_samples=50)),
        DataLoader(DATA, batch_size=80, drop_last=True),
        Own(DATA, batch_size=4),
        Stream(),
    ],
)
def test_others_are_left_whole(batches: Any) -> None:
    assert divided(batches, two_fifths, len, 0) is None


def test_nothing_is_held_out_of_few() -> None:
    assert divided(DataLoader(DATA, batch_size=4), lambda total: 0, len, 0) is None
    assert divided([[X]], lambda total: 0, lambda batch: len(batch[0]), 0) is None
