"""The constrained agent's minibatches, whatever number of steps a rollout has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.search.constrained_learner import LagrangianPpo, minibatch_size
from compressor.search.constrained_settings import ConstrainedSettings
from tests.search.fake_space import FakeSpace


@given(st.integers(1, 600), st.integers(1, 128))
def test_minibatches_of_any_rollout(steps: int, most: int) -> None:
    size = minibatch_size(steps, most)
    parts = [min(size, steps - start) for start in range(0, steps, size)]
    assert 1 <= size <= most
    assert sum(parts) == steps
    if (
        parts[-1] < size
    ):  # only where nothing divides the rollout, and then in as few minibatches as there can be
        assert not any(steps % other == 0 for other in range(2, min(most, steps) + 1))
        assert len(parts) == -(-steps // most)
    if most > 1 and size == 1:
        assert steps == 1


def test_minibatches_by_hand() -> None:
    assert [minibatch_size(steps, 64) for steps in (1, 48, 104, 67)] == [1, 48, 52, 34]


@pytest.mark.parametrize(("steps", "size"), [(1, 1), (2, 2), (64, 64), (67, 34), (131, 44)])
def test_an_update_of_any_rollout(steps: int, size: int, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    ppo = LagrangianPpo(1, 1, steps, 1, ConstrainedSettings(target_kl=1.0))
    assert ppo.batch_size == size
    before = [parameter.clone() for parameter in ppo.policy.parameters()]
    for _ in range(steps):
        step = ppo.act(np.ones(1, np.float32))
        ppo.rollout_buffer.add_with_costs(np.ones(1, np.float32), step, 1.0, np.ones(1), True)
    ppo.rollout_buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1))
    ppo.train()
    after = list(ppo.policy.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert [str(each.message) for each in recwarn] == []


def test_one_group_and_one_episode_in_an_update(bench: Any) -> None:
    settings = {"episodes_per_update": 1, "evaluations": 30}
    result = bench.search("constrained", settings=settings, space=FakeSpace([16], granularity=2))
    assert sum(c.phase == "policy" for c in result.candidates) > 5
    # MACs rise with the width, and so does the accuracy: half the channels are half the MACs.
    assert result.widths == {"g0": 8}
