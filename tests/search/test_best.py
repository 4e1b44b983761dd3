"""Every agent takes the best plan that keeps the budgets, whatever it was scored for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.core.records import Checkpoint, EpisodeLog
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.records import Limits
from tests.search.bench import brief
from tests.search.fake_space import FakeEvaluator, FakePlan, FakeSpace, macs_budget

ONE_GROUP = (16, 24, 16, 8)
"""What the measurement of the last group scores: it alone at a quarter."""


class OneGroupAlone(FakeEvaluator):
    """No group alone matters, two together do: what is fitted to single groups misleads."""

    def __call__(self, plan: FakePlan, *, floor: float | None = None) -> float:
        accuracy = super().__call__(plan, floor=floor)
        widths = tuple(plan.widths.values())
        if sum(width != dense for width, dense in zip(widths, self.dense, strict=True)) < 2:
            return 0.99 if widths == ONE_GROUP else 0.98
        return 0.5 * accuracy


@pytest.mark.parametrize("share", [0.65, 0.6])
@pytest.mark.parametrize("name", ["joint", "constrained", "stepwise", "knapsack"])
def test_the_measurement_of_a_group_is_the_result_where_it_is_best_and_keeps_the_budgets(
    name: str, share: float, tmp_path: Path
) -> None:
    space = FakeSpace([16, 24, 16, 32], granularity=2)
    evaluator: Any = OneGroupAlone(space, [1.0, 1.0, 1.0, 1.0])
    env = PruningEnv(space, [macs_budget(space, share)], evaluator)
    result = create_agent(name, settings=brief(name)).search(
        env,
        evaluator,
        Limits(max_evaluations=30),
        log=EpisodeLog(tmp_path / "log.jsonl"),
        checkpoint=Checkpoint(tmp_path / "state.pt"),
    )
    assert "sensitivity" in {each.phase for each in result.candidates if each.widths == ONE_GROUP}
    kept = bool(env.bounds.feasible(np.array(ONE_GROUP))[0])
    assert kept == (share == 0.65)
    assert (tuple(result.widths.values()) == ONE_GROUP) == kept
    assert (result.accuracy == 0.99) == kept
