"""Scoring ahead on several workers changes how long a search takes, and nothing that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from compressor.agents.base import Limits, SearchResult
from compressor.agents.registry import create_agent
from compressor.env.environment import PruningEnv
from compressor.run_dir import Checkpoint, EpisodeLog
from tests.env.fake_space import FakeEvaluator, FakeSpace, macs_budget


class Several(FakeEvaluator):
    """Scores batches, and counts how large they are."""

    workers = 3

    def __init__(self, space: FakeSpace, worth: list[float]) -> None:
        super().__init__(space, worth)
        self.batches: list[int] = []

    def many(self, plans: Sequence[Any], remember: bool = True) -> list[float]:
        self.batches.append(len(plans))
        return [self(plan) for plan in plans]


def search(
    name: str, evaluator_kind: type[FakeEvaluator], folder: Path, most: int
) -> tuple[SearchResult, Any]:
    space = FakeSpace([16, 24, 16, 32], granularity=2)
    evaluator = evaluator_kind(space, [5.0, 1.0, 1.0, 4.0])
    env = PruningEnv(space, [macs_budget(space, 0.5)], evaluator)  # type: ignore[arg-type]
    result = create_agent(name, seed=3).search(
        env,
        evaluator,
        Limits(max_evaluations=most, use_all=True),  # type: ignore[arg-type]
        log=EpisodeLog(folder / "log.jsonl"),
        checkpoint=Checkpoint(folder / "state.pt"),
    )
    return result, evaluator


@pytest.mark.parametrize(
    ("name", "most", "share"),
    [("random", 40, 0.7), ("knapsack", 40, 0.7), ("constrained", 40, 0.7), ("joint", 24, 0.45)],
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
