"""Rewards after every group: the Q-network learns from them, and the agent keeps limits and resumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compressor.agents.base import Limits
from compressor.agents.dueling import DoubleDqn, Dueling
from tests.agents.bench import Killed

SMALL: dict[str, Any] = {"episodes": 12, "hidden": 32}


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
        "stepwise", settings={"hidden": 32}, limits=Limits(max_evaluations=150, use_all=True)
    )
    assert result.evaluations <= 150
    assert result.reward > uniform.reward
    target = bench.env.budgets[0].target
    assert all(candidate.costs["macs"] <= target for candidate in result.candidates)


def test_killed_anywhere_it_ends_the_same(new_bench: Any) -> None:
    whole = new_bench("whole").search("stepwise", settings=SMALL)
    for kill in (1, 6, 12):
        bench = new_bench(f"killed{kill}")
        with pytest.raises(Killed):
            bench.search("stepwise", settings=SMALL, kill_after=kill)
        assert bench.search("stepwise", settings=SMALL).candidates == whole.candidates
    again = bench.search("stepwise", settings=SMALL, share=0.45)
    assert again.evaluations <= 10
    assert bench.env.bounds.feasible(np.array([list(again.widths.values())]))[0]
