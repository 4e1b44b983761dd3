"""A user's batches: which part of them the network takes, and inputs in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor import CompressorError
from compressor.training.loaders import InputsOfBatch, Loader, Memory

X, Y, V = torch.rand(4, 3, 5), torch.arange(4), torch.rand(4, 2)
ONE = InputsOfBatch((torch.zeros(1, 3, 5),))
TWO = InputsOfBatch((torch.zeros(1, 3, 5), torch.zeros(1, 2)))
NAMED = InputsOfBatch((torch.zeros(1, 3, 5), torch.zeros(1, 2)), ("x", "v"))
DICTIONARY = InputsOfBatch(({"x": torch.zeros(1, 3, 5)},))


@pytest.mark.parametrize(
    ("find", "batch"),
    [
        (ONE, X),
        (ONE, (X, Y)),
        (ONE, [X]),
        (ONE, {"picture": X, "label": Y}),
        (ONE, ((X,), Y)),
        (TWO, (X, V, Y)),
        (TWO, ((X, V), Y)),
        (NAMED, {"v": V, "y": Y, "x": X}),
        (NAMED, ({"v": V, "x": X}, Y)),
        (NAMED, (X, V)),
    ],
)
def test_inputs_are_found(find: InputsOfBatch, batch: Any) -> None:
    found = find(batch)
    assert torch.equal(found[0], X)
    assert len(found) == len(find.example)
    assert len(found) == 1 or torch.equal(found[1], V)


def test_a_dictionary_has_the_keys_of_the_example_only() -> None:
    for batch in ({"x": X, "y": Y}, ({"x": X, "z": V}, Y)):
        (found,) = DICTIONARY(batch)
        assert list(found) == ["x"]


@pytest.mark.parametrize(
    ("find", "batch"),
    [(ONE, Y), (ONE, (Y, X)), (ONE, torch.rand(4, 2, 5)), (ONE, 3), (ONE, ()), (TWO, (X, Y)), (DICTIONARY, X)],
)
def test_what_does_not_fit_is_refused(find: InputsOfBatch, batch: Any) -> None:
    with pytest.raises(CompressorError, match="does not fit the network"):
        find(batch)


def test_memory_holds_inputs_in_their_order_up_to_a_number() -> None:
    memory = Memory.of([(X, V), (X + 1, V + 1), (X + 2, V + 2)], TWO, 6)
    assert len(memory) == 6
    whole = next(memory.batches(6))
    assert torch.equal(whole[0], torch.cat([X, X[:2] + 1]))
    assert torch.equal(whole[1], torch.cat([V, V[:2] + 1]))
    assert [len(x) for x, _ in memory.batches(4)] == [4, 2]
    assert [len(x) for x, _ in memory.batches(4, drop_last=True)] == [4]
    assert memory.steps(4) == 1
    first, second = (next(memory.sample(3, seed=1).batches(3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, next(memory.sample(3, seed=2).batches(3))[0])
    parts = [next(memory.batches(4, shuffle_seed=0, shard=(rank, 2)))[0] for rank in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), next(memory.batches(4, shuffle_seed=0))[0])


def test_inputs_of_other_shapes_are_left_out_or_refused() -> None:
    sizes = [X, torch.rand(2, 3, 7), X + 1]
    assert len(Memory.of(sizes, ONE, 99, alike=True)) == 8
    with pytest.raises(CompressorError, match="cannot be put together"):
        Memory.of(sizes, ONE, 99)


def test_a_loader_gives_each_process_its_batches() -> None:
    loader = Loader([0, 1, 2, 3, 4], 5)
    assert list(loader.batches(99)) == [0, 1, 2, 3, 4]
    shares = [list(loader.batches(99, shard=(rank, 2))) for rank in range(2)]
    assert shares == [[0, 2], [1, 3]]  # as many for each: they take their steps together
    assert [loader.steps(99), loader.steps(99, 2)] == [5, 2]
