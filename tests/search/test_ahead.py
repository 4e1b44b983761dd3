"""Scoring ahead on several workers changes how long a search takes, and nothing that it finds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.core.records import Checkpoint, EpisodeLog
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.records import Limits, SearchResult
from compressor.search.session import SearchSession
from tests.search.bench import brief
from tests.search.fake_space import FakeEvaluator, FakeSpace, macs_budget


class Several(FakeEvaluator):
    """Scores batches, and counts how large they are."""

    workers = 3

    def __init__(self, space: FakeSpace, worth: list[float]) -> None:
        super().__init__(space, worth)
        self.batches: list[int] = []

    def many(self, plans: Sequence[Any], floors: Sequence[float | None], remember: bool) -> list[float]:
        assert not remember
        self.batches.append(len(plans))
        return [self(plan, floor=floor) for plan, floor in zip(plans, floors, strict=True)]


class LaterSeveral(Several):
    """Its workers start when it has scored a few plans."""

    @property
    def workers(self) -> int:  # type: ignore[override]
        return 3 if self.evaluations > 7 else 1


class GivesUp(FakeEvaluator):
    """One worker, whose estimate of a plan that it gives up depends on when it does."""

    def __call__(self, plan: Any, *, floor: float | None = None) -> float:
        accuracy = super().__call__(plan)
        return accuracy if floor is None or accuracy >= floor else accuracy * (1.0 - 0.5 * (floor - accuracy))


class SeveralGiveUp(Several, GivesUp):
    """Two workers that do so."""

    workers = 2


def search(
    name: str, evaluator_kind: type[FakeEvaluator], folder: Path, most: int
) -> tuple[SearchResult, Any]:
    space = FakeSpace([16, 24, 16, 32], granularity=2)
    evaluator = evaluator_kind(space, [5.0, 1.0, 1.0, 4.0])
    env = PruningEnv(space, [macs_budget(space, 0.5)], evaluator)  # type: ignore[arg-type]
    result = create_agent(name, seed=3, settings=brief(name)).search(
        env,
        evaluator,
        Limits(max_evaluations=most, use_all=True),  # type: ignore[arg-type]
        log=EpisodeLog(folder / "log.jsonl"),
        checkpoint=Checkpoint(folder / "state.pt"),
    )
    return result, evaluator


@pytest.mark.parametrize(
    ("name", "most", "share"),
    [
        ("random", 40, 0.7),
        ("knapsack", 40, 0.7),
        ("constrained", 40, 0.7),
        ("constrained", 24, 0.5),  # known plans leave evaluations for more near the best
        ("joint", 24, 0.45),
    ],
)
def test_the_same_candidates_with_any_number_of_workers(
    name: str, most: int, share: float, tmp_path: Path
) -> None:
    alone, _ = search(name, FakeEvaluator, tmp_path / "one", most)
    several, evaluator = search(name, Several, tmp_path / "three", most)
    assert several.candidates == alone.candidates
    assert several.evaluations == alone.evaluations
    assert several.widths == alone.widths
    # Most candidates were scored in batches, and few of those in vain.
    assert sum(evaluator.batches) >= share * alone.evaluations
    assert evaluator.evaluations <= 1.6 * alone.evaluations


@pytest.mark.parametrize("name", ["random", "knapsack", "joint"])
def test_the_same_candidates_where_workers_start_in_the_middle(name: str, tmp_path: Path) -> None:
    alone, _ = search(name, FakeEvaluator, tmp_path / "one", 24)
    later, evaluator = search(name, LaterSeveral, tmp_path / "three", 24)
    assert later.candidates == alone.candidates
    assert later.widths == alone.widths
    assert 0 < sum(evaluator.batches) < alone.evaluations


@pytest.mark.parametrize(("name", "most"), [("stepwise", 40), ("constrained", 40)])
def test_estimates_of_plans_given_up_agree_too(name: str, most: int, tmp_path: Path) -> None:
    alone, _ = search(name, GivesUp, tmp_path / "one", most)
    several, _ = search(name, SeveralGiveUp, tmp_path / "two", most)
    assert any(candidate.given_up for candidate in alone.candidates)
    assert several.candidates == alone.candidates
    assert several.widths == alone.widths


def choice(
    kind: type[FakeEvaluator],
    shortlist: Sequence[list[int]],
    more: Sequence[list[int]],
    folder: Path,
    most: int,
) -> tuple[SearchResult, Any]:
    space = FakeSpace([16, 24, 16, 32], granularity=2)
    evaluator = kind(space, [5.0, 1.0, 1.0, 4.0])
    env = PruningEnv(space, [macs_budget(space, 0.5)], evaluator)  # type: ignore[arg-type]
    run = SearchSession(
        create_agent("random"),
        env,
        evaluator,  # type: ignore[arg-type]
        Limits(max_evaluations=most),
        EpisodeLog(folder / "log.jsonl"),
        Checkpoint(folder / "state.pt"),
    )
    return run.choose(iter(shortlist), iter([more])), evaluator


@given(
    st.lists(st.lists(st.integers(1, 8), min_size=4, max_size=4), min_size=2, max_size=14),
    st.integers(1, 12),
    st.integers(0, 14),
)
@settings(max_examples=60, deadline=None)
def test_the_same_choice_with_one_and_two_workers(rows: list[list[int]], most: int, cut: int) -> None:
    plans = [[2 * a, 2 * b, 2 * c, 2 * d] for a, b, c, d in rows]
    first, more = [[4, 4, 4, 4], *plans[:cut]], plans[cut:]
    with tempfile.TemporaryDirectory() as folder:
        alone, one = choice(GivesUp, first, more, Path(folder) / "one", most)
        several, two = choice(SeveralGiveUp, first, more, Path(folder) / "two", most)
    assert several.candidates == alone.candidates
    assert several.widths == alone.widths
    assert several.evaluations == alone.evaluations == one.evaluations
    # In vain are what a limit leaves in hand and what a floor that rose asks for again: beside each at most one.
    assert two.evaluations <= 2 * alone.evaluations


def test_the_best_few_are_scored_side_by_side(tmp_path: Path) -> None:
    falling = [[16, 4, 4, 16], [14, 4, 4, 14], [12, 4, 4, 12], [10, 4, 4, 10], [8, 4, 4, 8]]
    result, evaluator = choice(SeveralGiveUp, falling, [], tmp_path, 10)
    assert [candidate.given_up for candidate in result.candidates] == [False, True, True, True, True]
    assert evaluator.batches == [2, 2]
    assert evaluator.evaluations == 5  # each once, though all but the first are given up
    rising, evaluator = choice(SeveralGiveUp, falling[::-1], [], tmp_path / "rising", 10)
    assert list(rising.widths.values()) == falling[0]
    assert evaluator.evaluations == 5  # what earns more than the floor serves a higher one as well


def test_nothing_is_drawn_for_one_worker() -> None:
    space = FakeSpace([16, 24])
    env = PruningEnv(space, [macs_budget(space, 0.5)], FakeEvaluator(space, [1.0, 1.0]))  # type: ignore[arg-type]
    env.ahead(pytest.fail("a proposal was drawn") for _ in range(1))
    assert env.evaluations == 0


def test_what_is_scored_ahead_counts_when_it_is_asked_for() -> None:
    space = FakeSpace([16, 24])
    evaluator = Several(space, [1.0, 1.0])
    env = PruningEnv(space, [macs_budget(space, 0.5)], evaluator)  # type: ignore[arg-type]
    rows = [[8, 8], [6, 8], [8, 8], [4, 4], [2, 2]]
    env.ahead(rows)
    assert (env.evaluations, evaluator.batches) == (0, [3])
    assert not env.known([8, 8])
    scores = [env.score(row).accuracy for row in rows]
    assert (env.evaluations, evaluator.evaluations) == (4, 4)
    assert scores[0] == scores[2]
    env.ahead([[3, 3]])
    env.weights_moved()
    env.score([3, 3])
    assert evaluator.evaluations == 6  # what was scored on other weights is not used
