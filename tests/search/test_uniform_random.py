"""The agents that learn nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compressor.core.agents import AGENTS, agent_class
from compressor.core.errors import CompressorError
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.proposals import (
    fitted_widths,
    grown,
    random_widths,
    scaled_widths,
    uniform_or_cheapest,
    uniform_widths,
)
from compressor.search.records import Limits
from compressor.search.schedule import Schedule
from tests.search.bench import Bench, brief
from tests.search.fake_space import FakeBudget, FakeEvaluator, FakeSpace, macs_budget


def test_uniform_by_hand() -> None:
    # MACs / 576 of widths (8 r, 8 r): 24 r + 64 r r + 80 r; of 168 half is 84: r = 5/8 gives 90, r = 4/8
    # gives 68.
    space = FakeSpace([8, 8])
    env = PruningEnv(space, [macs_budget(space, 0.5)], FakeEvaluator(space, [1, 1]))
    assert uniform_widths(env.bounds).tolist() == [4, 4]


def test_uniform_where_costs_rise_and_fall() -> None:
    # Expensive below 4 and above 6 channels: bisection between two such widths finds nothing, the scan does.
    space = FakeSpace([8, 8])
    budget = FakeBudget("latency", 8.0, lambda w: np.where((w < 4) | (w > 6), 9.0, 1.0).sum(axis=1))
    env = PruningEnv(space, [budget], FakeEvaluator(space, [1, 1]))
    assert uniform_widths(env.bounds).tolist() == [6, 6]


def test_uniform_where_no_ratio_serves() -> None:
    space = FakeSpace([8, 8])
    budget = FakeBudget("odd", 1.0, lambda w: np.where(w[:, 0] == w[:, 1], 5.0, 0.5))
    env = PruningEnv(space, [budget], FakeEvaluator(space, [1, 1]))
    with pytest.raises(CompressorError, match="No single ratio") as refused:
        uniform_widths(env.bounds)
    assert "--agent knapsack" in refused.value.hint
    with pytest.raises(CompressorError, match="No single ratio"):
        agent_class("uniform")().check(space, [budget])
    agent_class("knapsack")().check(space, [budget])
    assert env.bounds.feasible(uniform_or_cheapest(env))[0]


def test_random_widths_fill_the_budget() -> None:
    space = FakeSpace([16, 24, 16, 32])
    env = PruningEnv(space, [macs_budget(space, 0.5)], FakeEvaluator(space, [1, 1, 1, 1]))
    drawn = [random_widths(env, np.random.default_rng(seed)) for seed in range(20)]
    shares = [env.costs(widths)["macs"] / env.budgets[0].target for widths in drawn]
    assert max(shares) <= 1.0
    assert min(shares) > 0.85
    assert len({tuple(widths) for widths in drawn}) == 20


def test_widths_grow_until_no_step_fits() -> None:
    # Widths 2, 4, 6, 8; a channel takes 1 ms in the first group and 2 ms in the second. One factor for both stops at
    # 18 ms of 20, because 8 of both take 24; 8 of the first alone still fit.
    space = FakeSpace([8, 8], granularity=2)
    budget = FakeBudget("latency", 20.0, lambda w: w[:, 0] + 2.0 * w[:, 1])
    env = PruningEnv(space, [budget], FakeEvaluator(space, [1, 1]))
    assert scaled_widths(env, np.array([0.5, 0.5])).tolist() == [6, 6]
    assert fitted_widths(env, np.array([0.5, 0.5])).tolist() == [8, 6]
    assert grown(env, np.array([2, 2])).tolist() == [8, 6]
    assert grown(env, np.array([4, 8])).tolist() == [4, 8]  # 20 ms: nothing is left


def test_uniform_agent(bench: Bench) -> None:
    result = bench.search("uniform")
    assert result.evaluations == 1
    assert result.best.widths == dict(result.widths)
    assert (
        len({width / dense for width, dense in zip(result.widths.values(), [16, 24, 16, 32], strict=True)})
        <= 3
    )
    line = bench.log_lines[0]
    assert set(line) == {
        "episode", "epoch", "phase", "round", "widths", "costs", "reward", "accuracy", "seconds"
    }  # fmt: skip
    assert line["widths"] == list(result.widths.values())


def test_random_agent_is_no_worse_than_uniform(new_bench: Any) -> None:
    uniform = new_bench("uniform").search("uniform")
    result = new_bench("random").search("random", settings={"evaluations": 30})
    assert result.reward > uniform.reward
    assert result.evaluations <= 30
    assert len(result.candidates) >= 30
    front = result.front("macs")
    assert [c.costs["macs"] for c in front] == sorted(c.costs["macs"] for c in front)
    assert front[-1].accuracy == max(c.accuracy for c in result.candidates)


def test_limits_are_kept(new_bench: Any) -> None:
    result = new_bench("few").search("random", limits=Limits(max_evaluations=7))
    assert result.evaluations <= 7
    result = new_bench("all").search("random", limits=Limits(max_evaluations=80, use_all=True))
    assert 70 <= result.evaluations <= 80
    assert new_bench("time").search("random", limits=Limits(max_seconds=1e-6)).evaluations == 1


@pytest.mark.parametrize(
    ("name", "left"), [("random", 0), ("knapsack", 0), ("constrained", 0), ("joint", 0), ("stepwise", 5)]
)
def test_comparisons_are_at_equal_evaluations(bench: Bench, name: str, left: int) -> None:
    """Where all are to be used, plans that are known already leave none over; stepwise plays whole episodes."""
    result = bench.search(name, limits=Limits(max_evaluations=45, use_all=True), settings=brief(name))
    assert 45 - left <= result.evaluations <= 45


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_training_comes_before_the_search(bench: Bench, name: str) -> None:
    result = bench.search(name, train=True, schedule=Schedule(1, 2, 1))
    assert bench.trainer is not None
    assert bench.trainer.epoch == 4
    assert {candidate.epoch for candidate in result.candidates} == {4}


def test_random_agent_resumes(new_bench: Any) -> None:
    options: dict[str, Any] = {"train": True, "schedule": Schedule(2), "settings": {"evaluations": 25}}
    whole_bench = new_bench("whole")
    whole = whole_bench.search("random", copies=True, **options)
    for save in (1, 2, 3, 4, 5):
        bench = whole_bench.stopped(save)
        again = bench.search("random", **options)
        assert (again.widths, again.accuracy) == (whole.widths, whole.accuracy)
        assert again.candidates == whole.candidates
        assert [line["episode"] for line in bench.log_lines] == list(range(len(whole.candidates)))


def test_names() -> None:
    assert {"joint", "uniform", "random"} <= set(AGENTS)
    for name in AGENTS:
        assert agent_class(name).name == name
    with pytest.raises(CompressorError, match=r"no agent called 'unifrom'. Did you mean: uniform"):
        agent_class("unifrom")
    with pytest.raises(CompressorError, match=r"no setting 'evalutions'. Its settings are: evaluations"):
        create_agent("random", settings={"evalutions": 3})
    for name in ("random", "knapsack"):
        with pytest.raises(
            CompressorError, match="evaluations is 'many', expected a whole number, such as 50"
        ):
            create_agent(name, settings={"evaluations": "many"})


@pytest.mark.parametrize(
    "limits", [{"max_evaluations": 0}, {"max_seconds": 0.0}, {"max_seconds": float("nan")}]
)
def test_bad_limits(limits: dict[str, Any]) -> None:
    with pytest.raises(CompressorError, match="expected"):
        Limits(**limits)
