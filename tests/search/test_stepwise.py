"""Rewards after every group: the Q-network learns from them, and the agent keeps limits and resumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.search.records import Limits
from compressor.search.stepwise import DoubleDqn, Dueling

SMALL: dict[str, Any] = {"episodes": 12, "hidden": 32, "proposals": 64}


def test_dueling_by_hand() -> None:
    network = Dueling(2, 3, 4)
    seen = torch.randn(5, 2)
    hidden = network.body(seen)
    expected = (
        network.value(hidden) + network.advantage(hidden) - network.advantage(hidden).mean(1, keepdim=True)
    )
    assert torch.allclose(network(seen), expected)
    assert torch.allclose(network(seen).mean(1, keepdim=True), network.value(hidden), atol=1e-6)


def test_two_steps_are_learned() -> None:
    # Action 1 first costs 1 but opens a reward of 10; action 0 earns 2 at once and nothing later.
    dqn = DoubleDqn(2, 2, hidden=32, rate=3e-3, gamma=0.9, tau=0.05, capacity=100, seed=0)
    start, rich, poor = (np.array(s, dtype=np.float32) for s in ([0, 0], [1, 0], [0, 1]))
    for action in (0, 1):
        dqn.remember(start, action, -1.0 if action else 2.0, rich if action else poor, False)
        dqn.remember(rich, action, 10.0, start, True)
        dqn.remember(poor, action, 0.0, start, True)
    dqn.learn(600, 32)
    q = dqn.online(torch.from_numpy(start)[None])[0].tolist()
    assert q == pytest.approx([2.0, -1.0 + 0.9 * 10.0], abs=0.7)
    assert dqn.act(start, epsilon=0.0) == 1


def test_stepwise_beats_uniform_within_its_limits(new_bench: Any) -> None:
    uniform = new_bench("uniform").search("uniform")
    bench = new_bench("stepwise")
    result = bench.search(
        "stepwise", settings={"hidden": 32}, limits=Limits(max_evaluations=50, use_all=True)
    )
    assert result.evaluations <= 50
    assert result.reward > uniform.reward
    target = bench.env.budgets[0].target
    plans = [candidate for candidate in result.candidates if candidate.phase != "sensitivity"]
    assert len(plans) < len(result.candidates)
    assert all(candidate.costs["macs"] <= target for candidate in plans)


def test_killed_anywhere_it_ends_the_same(new_bench: Any) -> None:
    bench = new_bench("whole")
    whole = bench.search("stepwise", settings=SMALL, copies=True)
    for save in (6, 14):
        assert bench.stopped(save).search("stepwise", settings=SMALL).candidates == whole.candidates
    again = bench.search("stepwise", settings=SMALL, share=0.45)
    assert again.evaluations <= 10
    assert bench.env.bounds.feasible(np.array([list(again.widths.values())]))[0]


def test_the_warm_start_begins_with_the_knapsacks_plan_and_stays_near_the_best(new_bench: Any) -> None:
    knapsack = new_bench("knapsack").search("knapsack")
    solved = next(candidate for candidate in knapsack.candidates if candidate.phase == "sensitivities")
    result = new_bench("stepwise").search("stepwise", settings={**SMALL, "near_share": 1.0})
    played = [candidate for candidate in result.candidates if candidate.phase == "stepwise"]
    near = [candidate for candidate in result.candidates if candidate.phase == "near"]
    assert played[0].widths == solved.widths
    assert len(near) == 10 * 4  # as many as the other episodes have groups
    assert {candidate.widths for candidate in played[1:-1]} <= {candidate.widths for candidate in near}
    best = max(near, key=lambda candidate: candidate.reward)
    assert best.reward > solved.reward
    assert result.reward >= best.reward


@pytest.mark.parametrize(("most", "begins"), [(6, "saliency1.0"), (14, "saliency1.0"), (15, "sensitivities")])
def test_with_few_evaluations_it_begins_with_the_knapsacks_plan_all_the_same(
    new_bench: Any, most: int, begins: str
) -> None:
    knapsack = new_bench("knapsack").search("knapsack")
    solved = next(candidate for candidate in knapsack.candidates if candidate.phase == begins)
    limits = Limits(max_evaluations=most, use_all=True)
    result = new_bench("stepwise").search("stepwise", settings={"hidden": 32}, limits=limits)
    first = next(candidate for candidate in result.candidates if candidate.phase == "stepwise")
    assert first.widths == solved.widths
    assert result.reward >= solved.reward
    assert most - 1 <= result.evaluations <= most


def test_without_room_for_an_episode_it_takes_the_plan_that_it_would_begin_with(new_bench: Any) -> None:
    knapsack = new_bench("knapsack").search("knapsack", limits=Limits(max_evaluations=1))
    bench = new_bench("stepwise")
    result = bench.search("stepwise", settings={"hidden": 32}, limits=Limits(max_evaluations=3))
    assert result.widths == knapsack.widths
    result = bench.search("stepwise", settings={"hidden": 32}, limits=Limits(max_evaluations=60))
    again = bench.search("stepwise", settings={"hidden": 32}, limits=Limits(max_evaluations=3), share=0.45)
    ratios = np.array(list(again.widths.values())) / np.array(list(result.widths.values()))
    assert ratios.max() - ratios.min() < 0.3  # the result, scaled


def test_the_papers_own_measures_nothing_and_acts_by_thresholds(new_bench: Any) -> None:
    paper = {**SMALL, "actions": "alpha", "warm_start": False, "near_share": 0.0}
    result = new_bench("paper").search("stepwise", settings=paper)
    assert {candidate.phase for candidate in result.candidates} == {"stepwise", "final"}
    with pytest.raises(CompressorError, match="actions is 'beta', expected 'shares' or 'alpha'"):
        new_bench("wrong").search("stepwise", settings={"actions": "beta"})
