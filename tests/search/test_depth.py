"""Searches that may remove whole blocks: rows, bounds, proposals, and what every agent ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.budgets.base import parse_budget
from compressor.budgets.limits import resolve
from compressor.core.records import EpisodeLog
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from compressor.search.allocation import Allocator, Sensitivity, saliency_values
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.proposals import near_rows, random_widths, scaled_widths, uniform_widths
from compressor.search.records import Limits, SearchResult
from tests.search.bench import FragileCheckpoint, brief
from tests.search.fake_space import FakeBudget

WORTH = {"2": 0.0, "3": 0.4, "4": 0.05}
"""What the accuracy loses without each block."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.one(x))))


def network(blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    body = [Block() for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *body, nn.Conv2d(16, 10, 8)).eval()


class Evaluator:
    """Accuracy by the blocks that are left, and a little by the channels that are kept."""

    def __init__(self, space: PruningSpace) -> None:
        self.space, self.evaluations, self.plans = space, 0, list[ChannelPlan]()

    def __call__(self, plan: ChannelPlan, *, floor: float | None = None) -> float:
        self.evaluations += 1
        self.plans.append(plan)
        kept = np.mean([len(plan.keep[group.name]) / group.width for group in self.space.groups])
        return 0.9 - sum(WORTH[name] for name in plan.removed) - 0.3 * (1.0 - float(kept))

    def weights_moved(self) -> None:
        pass


def environment(share: str = "50%", **options: Any) -> PruningEnv:
    space = PruningSpace(network(), torch.zeros(1, 3, 8, 8), depth=True, **options)
    return PruningEnv(space, resolve([parse_budget("flops", share)], space), Evaluator(space))


def test_rows_and_bounds() -> None:
    env = environment()
    assert env.bounds.names == ("0", "2.one", "3.one", "4.one", "2", "3", "4")
    assert env.bounds.dense.tolist() == [16, 16, 16, 16, 1, 1, 1]
    assert [choices.tolist() for choices in env.bounds.choices[4:]] == [[0, 1]] * 3
    assert env.bounds.cheapest.tolist() == [2, 2, 2, 2, 0, 0, 0]
    # one network is one row, and is scored once
    first = env.score([16, 5, 16, 16, 0, 0, 1])
    assert first.widths == (16, 16, 16, 16, 0, 0, 1)
    assert env.known([16, 9, 3, 16, 0, 0, 1])
    assert env.score([16, 2, 16, 16, 0, 0, 1]) == first or env.evaluations == 1
    assert first.costs == {"macs": float(env.space.macs([16, 16, 16, 16, 0, 0, 1]))}
    plan = env.plan(first.widths)
    assert plan.removed == ("2", "3")
    assert env.space.row(plan).tolist() == list(first.widths)


def test_episodes_keep_the_budget() -> None:
    env, generator, removed = environment("30%"), np.random.default_rng(0), 0
    for _ in range(20):
        env.reset()
        last, info = False, dict[str, Any]()
        while not last:
            observation, _, last, _, info = env.step(np.array([generator.random()], dtype=np.float32))
            assert env.observation_space.contains(observation)
        row = np.array(info["score"].widths)
        assert env.bounds.feasible(row)[0]
        removed += int((row[4:] == 0).sum())
    assert removed


def test_proposals_scale_widths_and_not_blocks() -> None:
    env, generator = environment(), np.random.default_rng(0)
    assert uniform_widths(env.bounds)[4:].tolist() == [1, 1, 1]
    shape = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    row = scaled_widths(env, shape)
    assert row[4:].tolist() == [0, 1, 0]
    assert row[:4].min() > uniform_widths(env.bounds)[:4].max()  # what the blocks leave goes to the others
    rows = near_rows(env, row[None], generator, 0.3, 64)
    assert env.bounds.feasible(rows).all()
    assert len({tuple(each) for each in rows[:, 4:].tolist()}) > 3
    drawn = np.stack([random_widths(env, generator) for _ in range(30)])
    assert env.bounds.feasible(drawn).all()
    assert 0 < (drawn[:, 4:] == 0).mean() < 0.7


def test_the_value_of_a_block_is_measured(tmp_path: Path) -> None:
    env = environment()
    found = run("knapsack", env, tmp_path, Limits(max_evaluations=24))
    assert found.best.removed == ("2", "4") or found.best.removed == ("2",)
    measured = [tuple(plan.removed) for plan in env.evaluator_plans if len(plan.removed) == 1]  # type: ignore[attr-defined]
    assert {("2",), ("3",), ("4",)} <= set(measured)


def test_values_of_blocks_by_hand() -> None:
    env = environment()
    unused: Any = None
    sensitivity = Sensitivity(unused, Allocator(env).levels)
    sensitivity.losses = [[[0.5, 0.1]]] * 4 + [[[1.0, loss]] * 2 for loss in (0.0, 0.4, 0.05)]
    values = sensitivity.values()[4:]
    assert [value.round(4).tolist() for value in values] == [[-0.0001, 0.0], [-0.4, 0.0], [-0.05, 0.0]]
    saliency = env.saliency()
    assert saliency[4].tolist() == [pytest.approx(saliency[1].sum())]


@pytest.mark.parametrize(("share", "power", "gone"), [(0.7, 1.0, 4), (0.85, 0.25, 2)])
def test_blocks_go_where_widths_are_computed_in_steps(share: float, power: float, gone: int) -> None:
    """From the uniform plan on, no better plan is near; the best one lacks blocks and keeps all channels."""
    space = PruningSpace(network(blocks=12), torch.zeros(1, 3, 8, 8), depth=True)
    groups = len(space.groups)

    def in_steps_of_8(rows: np.ndarray) -> np.ndarray:
        wide = np.ceil(rows[:, :groups] / 8) / 2
        return np.asarray((rows[:, groups:] * (1 + wide[:, :1] * wide[:, 1:])).sum(axis=1))

    row = space.dense_row.copy()
    row[groups : groups + gone] = 0
    target = share * float(in_steps_of_8(space.dense_row[None])[0])
    env = PruningEnv(space, [FakeBudget("latency", target, in_steps_of_8)], Evaluator(space))
    allocator = Allocator(env)
    values = saliency_values(env.saliency(), allocator.levels, power)
    found = allocator.solve(values)
    assert env.bounds.feasible(np.stack([found, row])).all()
    assert allocator._value(found, values) >= allocator._value(row, values) * (1 - 1e-9)


def run(name: str, env: PruningEnv, folder: Path, limits: Limits, *, copies: bool = False) -> SearchResult:
    evaluator: Any = env._accuracies._evaluate
    env.evaluator_plans = evaluator.plans  # type: ignore[attr-defined]
    agent = create_agent(name, settings=brief(name))
    checkpoint = FragileCheckpoint(folder / "agent.pt", copies=copies)
    return agent.search(env, evaluator, limits, log=EpisodeLog(folder / "episodes.jsonl"), checkpoint=checkpoint)


@pytest.mark.parametrize("name", ["knapsack", "joint", "constrained", "stepwise", "random"])
def test_agents_find_the_block_that_nothing_needs(name: str, tmp_path: Path) -> None:
    """They keep the budget without the worthless block and with the one that is needed; the uniform plan has all."""
    env = environment(granularity=2)
    found = run(name, env, tmp_path, Limits(max_evaluations=45))
    assert "3" not in found.best.removed
    assert "2" in found.best.removed
    row = env.space.row(found.best)
    assert env.bounds.feasible(row)[0]
    assert found.widths["2"] == 0
    uniform = run("uniform", environment(granularity=2), tmp_path / "uniform", Limits())
    assert uniform.best.removed == ()
    assert found.accuracy > uniform.accuracy


def test_a_killed_search_ends_alike(tmp_path: Path) -> None:
    limits = Limits(max_evaluations=40)
    whole = run("joint", environment(granularity=2), tmp_path / "whole", limits, copies=True)
    again = run("joint", environment(granularity=2), tmp_path / "whole-3", limits)
    assert again.best == whole.best
    assert [each.widths for each in again.candidates] == [each.widths for each in whole.candidates]


def test_a_search_of_widths_is_not_continued_as_one_of_blocks(tmp_path: Path) -> None:
    run("random", environment(), tmp_path, Limits(max_evaluations=4))
    space = PruningSpace(network(), torch.zeros(1, 3, 8, 8))
    env = PruningEnv(space, resolve([parse_budget("flops", "50%")], space), Evaluator(space))
    with pytest.raises(Exception, match="another pruning space"):
        run("random", env, tmp_path, Limits(max_evaluations=4))
