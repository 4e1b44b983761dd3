"""Budgets that change after a search, and limits of time: what is known is not lost, and nothing is begun too late."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compressor.core.agents import AGENTS
from compressor.core.errors import CompressorError
from compressor.core.records import Checkpoint, EpisodeLog
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.proposals import fitted_widths
from compressor.search.records import Limits, SearchResult
from compressor.search.schedule import Schedule
from compressor.search.stepwise import DoubleDqn
from tests.search.bench import FragileCheckpoint, Killed, brief
from tests.search.fake_space import FakeBudget, FakeEvaluator, FakePlan, FakeSpace, FakeTrainer, macs_budget

SEARCHING = sorted(set(AGENTS) - {"uniform"})


class Rugged(FakeEvaluator):
    """Neighbouring plans differ, so that the best plan is seldom the optimum of any smooth values."""

    def __call__(self, plan: FakePlan, *, floor: float | None = None) -> float:
        self.evaluations += 1
        widths = np.array(list(plan.widths.values()))
        rough = np.sin(widths * np.arange(1, len(widths) + 1)).mean()
        smooth = float((self.worth * np.sqrt(widths / self.dense)).sum())
        return float(np.clip(0.9 * smooth + 0.05 * rough, 0.0, 1.0))


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("compressor.search.session.time", SimpleNamespace(perf_counter=lambda: self.now))


class Timed(FakeEvaluator):
    """Each plan takes a second."""

    clock: Clock
    begun: list[float]

    def __call__(self, plan: FakePlan, *, floor: float | None = None) -> float:
        self.begun.append(self.clock.now)
        self.clock.now += 1.0
        return super().__call__(plan, floor=floor)


def search(
    name: str,
    folder: Path,
    share: float,
    *,
    limits: Limits | None = None,
    kill_after: int | None = None,
    copies: bool = False,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> tuple[SearchResult, PruningEnv]:
    space = FakeSpace([16, 24, 16, 32, 32, 16], granularity=2)
    evaluator = Rugged(space, list(np.linspace(1, 3, 6)))
    env = PruningEnv(space, [macs_budget(space, share)], evaluator)
    agent = create_agent(name, seed=seed, settings=brief(name) | (settings or {}))
    result = agent.search(
        env,
        evaluator,
        limits or Limits(max_evaluations=40),
        log=EpisodeLog(folder / "episodes.jsonl"),
        checkpoint=FragileCheckpoint(folder / "agent.pt", kill_after, copies=copies),
    )
    return result, env


First = Callable[..., SearchResult]


@pytest.fixture(scope="module")
def first_round(tmp_path_factory: pytest.TempPathFactory) -> First:
    """A search within half of the cost by agent and seed; it is run once, and its folder is copied."""
    known: dict[tuple[str, int], tuple[SearchResult, Path]] = {}

    def run(name: str, folder: Path, seed: int = 0) -> SearchResult:
        if (name, seed) not in known:
            kept = tmp_path_factory.mktemp("first")
            known[name, seed] = search(name, kept, 0.5, seed=seed)[0], kept
        result, kept = known[name, seed]
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        return result

    return run


@pytest.mark.parametrize("name", SEARCHING)
@pytest.mark.parametrize("share", [0.495, 0.47, 0.51])
def test_a_changed_budget_does_not_cost_what_was_known(
    first_round: First, tmp_path: Path, name: str, share: float
) -> None:
    first = first_round(name, tmp_path)
    second, env = search(name, tmp_path, share)
    old = np.array(list(first.widths.values()))
    scaled = fitted_widths(env, old / env.bounds.dense)
    still = first.reward if env.bounds.feasible(old)[0] and not (scaled >= old).all() else 0.0
    assert second.reward >= max(env.score(scaled).reward, still)
    assert env.bounds.feasible(np.array(list(second.widths.values())))[0]


@pytest.mark.parametrize("name", SEARCHING)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_budget_that_widens_again_does_not_either(
    first_round: First, tmp_path: Path, name: str, seed: int
) -> None:
    """A miss, and then a plan that kept the budget by too much."""
    first_round(name, tmp_path, seed)
    second, _ = search(name, tmp_path, 0.47, seed=seed)
    third, env = search(name, tmp_path, 0.475, seed=seed)
    old = np.array(list(second.widths.values()))
    scaled = fitted_widths(env, old / env.bounds.dense)
    assert env.bounds.feasible(old)[0]
    assert third.reward >= (env.score(scaled) if (scaled >= old).all() else second).reward


@pytest.mark.parametrize("name", SEARCHING)
def test_a_loosened_budget_is_used_although_wider_plans_score_a_little_lower(
    monkeypatch: pytest.MonkeyPatch, first_round: First, tmp_path: Path, name: str
) -> None:
    """On few images a wider plan can score lower by chance: the plan that it contains is not chosen again."""
    first = first_round(name, tmp_path)
    narrow = tuple(first.widths.values())

    def noisy(self: FakeEvaluator, plan: FakePlan, *, floor: float | None = None) -> float:
        return 0.8 if tuple(plan.widths.values()) == narrow else 0.79

    monkeypatch.setattr(Rugged, "__call__", noisy)
    second, env = search(name, tmp_path, 0.7)
    assert tuple(second.widths.values()) != narrow
    assert env.bounds.feasible(np.array(list(second.widths.values())))[0]


@pytest.mark.parametrize(("name", "unscored"), [*((name, False) for name in SEARCHING), ("joint", True)])
def test_a_round_without_time_lives_on_what_was_known(
    first_round: First, tmp_path: Path, name: str, unscored: bool
) -> None:
    settings: dict[str, Any] = {"rescore": False} if unscored else {}
    first = search(name, tmp_path, 0.5, settings=settings)[0] if unscored else first_round(name, tmp_path)
    late = Limits(max_evaluations=40, max_seconds=1e-6)
    second, env = search(name, tmp_path, 0.47, limits=late, settings=settings)
    scaled = fitted_widths(env, np.array(list(first.widths.values())) / env.bounds.dense)
    assert second.evaluations <= 1
    assert (
        second.reward >= 0.97 * env.score(scaled).reward
    )  # or another known plan, which keeps the budget as it is


@pytest.mark.parametrize("name", SEARCHING)
def test_killed_in_a_later_round_it_ends_the_same(first_round: First, tmp_path: Path, name: str) -> None:
    first_round(name, tmp_path / "whole")
    whole, _ = search(name, tmp_path / "whole", 0.47, copies=True)
    stopped = [folder for save in (1, 2, 3, 5) if (folder := tmp_path / f"whole-{save}").exists()]
    assert stopped
    for folder in stopped:
        resumed, _ = search(name, folder, 0.47)
        assert resumed.candidates == whole.candidates
        assert resumed.widths == whole.widths


@pytest.mark.parametrize("name", SEARCHING)
def test_an_unfinished_search_does_not_go_on_within_other_budgets(tmp_path: Path, name: str) -> None:
    with pytest.raises(Killed):
        search(name, tmp_path, 0.5, kill_after=2)
    with pytest.raises(CompressorError, match="is of an unfinished search within macs <= "):
        search(name, tmp_path, 0.49)
    search(name, tmp_path, 0.5)


@pytest.mark.parametrize("name", SEARCHING)
def test_no_candidate_is_begun_after_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """But for the one that the result needs where no plan within the budgets was scored before."""
    for limit in (3.5, 9.5, 31.5):
        space = FakeSpace([16] * 8, granularity=2)
        evaluator = Timed(space, list(np.linspace(1, 3, 8)))
        evaluator.clock, evaluator.begun = Clock(monkeypatch), []
        env = PruningEnv(space, [macs_budget(space, 0.5)], evaluator)
        folder = tmp_path / str(limit)
        folder.mkdir()
        result = create_agent(name, settings=brief(name)).search(
            env,
            evaluator,
            Limits(max_evaluations=200, max_seconds=limit),
            log=EpisodeLog(folder / "episodes.jsonl"),
            checkpoint=Checkpoint(folder / "agent.pt"),
        )
        late = [begun for begun in evaluator.begun if begun >= limit]
        assert len(evaluator.begun) >= limit
        assert len(late) <= 1
        assert env.bounds.feasible(np.array(list(result.widths.values())))[0]


def test_training_ends_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Slow(FakeTrainer):
        def run_epoch(self, on_step: Callable[[int], None] | None = None) -> SimpleNamespace:
            clock.now += 10.0
            return super().run_epoch(on_step)

    for limit, epochs in ((5.0, 1), (25.0, 3), (65.0, 7)):
        clock.now = 0.0
        space, trainer = FakeSpace([16, 24, 16, 32], granularity=2), Slow()
        evaluator = FakeEvaluator(space, [5.0, 1.0, 1.0, 4.0], trainer)
        env = PruningEnv(space, [macs_budget(space, 0.5)], evaluator)
        folder = tmp_path / str(limit)
        folder.mkdir()
        agent: Any = create_agent(
            "joint", trainer=trainer, schedule=Schedule(2, 3, 4),
            settings=brief("joint") | {"warm_start": False, "fill_episodes": 4, "episodes_per_epoch": 2},
        )  # fmt: skip
        result = agent.search(
            env,
            evaluator,
            Limits(max_seconds=limit),
            log=EpisodeLog(folder / "episodes.jsonl"),
            checkpoint=Checkpoint(folder / "agent.pt"),
        )
        assert trainer.epoch == epochs
        assert len(result.training) == epochs


def test_stepwise_is_not_paid_for_budgets_that_ask_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as channels that are no multiples of 32, of which the dense network has none."""
    space = FakeSpace([32, 64, 32, 64], granularity=4)
    odd = FakeBudget("odd", 64.0, lambda widths: np.where(widths % 32, widths, 0).sum(axis=1))
    evaluator = FakeEvaluator(space, [1.0, 2.0, 3.0, 4.0])
    rewards: list[float] = []
    remember = DoubleDqn.remember

    def recorded(self: DoubleDqn, state: Any, action: int, reward: float, following: Any, last: bool) -> None:
        rewards.append(reward)
        remember(self, state, action, reward, following, last)

    monkeypatch.setattr(DoubleDqn, "remember", recorded)
    result = create_agent("stepwise").search(
        PruningEnv(space, [macs_budget(space, 0.5), odd], evaluator),
        evaluator,
        Limits(max_evaluations=40),
        log=EpisodeLog(tmp_path / "episodes.jsonl"),
        checkpoint=Checkpoint(tmp_path / "agent.pt"),
    )
    assert odd.predict(np.array([list(result.widths.values())]))[0] <= 64
    assert len(rewards) > 8
    assert -15.0 <= min(rewards) < max(rewards) <= 0.0
