"""The allocation is the best one where that can be counted out, and the agent uses its evaluations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from compressor.search.allocation import Allocator, saliency_values
from compressor.search.environment import PruningEnv
from compressor.search.proposals import scaled_widths
from compressor.search.records import Limits
from tests.search.fake_space import FakeBudget, FakeEvaluator, FakeSpace, macs_budget


def optimum(env: PruningEnv, values: list[np.ndarray], levels: tuple[np.ndarray, ...]) -> float:
    every = np.array(list(itertools.product(*(range(len(each)) for each in levels))))
    widths = np.stack([levels[i][every[:, i]] for i in range(len(levels))], axis=1)
    worth = sum(values[i][every[:, i]] for i in range(len(levels)))
    return float(worth[env.bounds.feasible(widths)].max())


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_allocations(seed: int, share: float) -> None:
    space = FakeSpace([8, 12, 6, 10], granularity=[1, 2, 1, 1])
    env = PruningEnv(space, [macs_budget(space, share)], FakeEvaluator(space, [1, 1, 1, 1]))
    allocator = Allocator(env)
    scores = [
        np.random.default_rng([seed, i]).lognormal(0, 1, group.width) for i, group in enumerate(space.groups)
    ]
    values = saliency_values(scores, allocator.levels, 1.0)
    widths = allocator.solve(values)
    found = sum(
        value[np.flatnonzero(levels == w)[0]]
        for value, levels, w in zip(values, allocator.levels, widths, strict=True)
    )
    assert env.bounds.feasible(widths)[0]
    assert found >= 0.99 * optimum(env, values, allocator.levels)


def test_several_budgets_and_jumps() -> None:
    space = FakeSpace([16, 16, 16])
    jumps = FakeBudget("latency", 6.5, lambda w: np.ceil(w / 8).sum(axis=1) + w.sum(axis=1) / 48)
    env = PruningEnv(space, [macs_budget(space, 0.6), jumps], FakeEvaluator(space, [1, 1, 1]))
    allocator = Allocator(env)
    values = [np.sqrt(levels) for levels in allocator.levels]
    widths = allocator.solve(values)
    assert env.bounds.feasible(widths)[0]
    found = sum(np.sqrt(widths))
    assert found >= 0.96 * optimum(env, values, allocator.levels)


def test_room_for_one_small_step_is_used() -> None:
    """Of many groups hundreds of larger moves promise more than one level of one group, and none of them fits."""
    space = FakeSpace([64] * 24)
    env = PruningEnv(space, [macs_budget(space, 0.5)], FakeEvaluator(space, [1] * 24))
    allocator = Allocator(env)
    values = [np.log(levels) for levels in allocator.levels]
    widths = allocator._polish(scaled_widths(env, np.ones(24)), values)
    raised = np.minimum(widths + np.eye(24, dtype=np.int64), 64)
    assert env.bounds.feasible(widths)[0]
    assert not env.bounds.feasible(raised[(raised != widths).any(axis=1)]).any()


def test_values_by_hand() -> None:
    values = saliency_values([np.array([1.0, 4.0, 9.0])], [np.array([1, 2, 3])], 0.5)
    assert values[0].tolist() == [3.0, 5.0, 6.0]


def test_a_met_budget_keeps_everything() -> None:
    space = FakeSpace([8, 8])
    env = PruningEnv(space, [macs_budget(space, 1.0)], FakeEvaluator(space, [1, 1]))
    allocator = Allocator(env)
    assert allocator.solve([np.arange(8.0), np.arange(8.0)]).tolist() == [8, 8]


def test_measured_sensitivities_beat_blind_saliency(new_bench: Any) -> None:
    blind = new_bench("blind").search("knapsack", limits=Limits(max_evaluations=1))
    assert blind.evaluations == 1
    seeing = new_bench("seeing").search("knapsack", limits=Limits(max_evaluations=60, use_all=True))
    uniform = new_bench("uniform").search("uniform")
    assert seeing.reward > blind.reward
    assert seeing.reward > uniform.reward
    assert 45 <= seeing.evaluations <= 60
    phases = [candidate.phase for candidate in seeing.candidates]
    assert phases.count("sensitivity") == 8
    assert phases.count("sensitivities") >= 1


def test_killed_anywhere_it_ends_the_same(new_bench: Any) -> None:
    options: dict[str, Any] = {"limits": Limits(max_evaluations=30, use_all=True)}
    bench = new_bench("whole")
    whole = bench.search("knapsack", copies=True, **options)
    for save in (1, 4, 5, 6):
        assert bench.stopped(save).search("knapsack", **options).candidates == whole.candidates
    again = bench.search("knapsack", share=0.45, **options)
    assert again.evaluations <= 6
