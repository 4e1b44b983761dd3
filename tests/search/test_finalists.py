"""The final choice: the best few plans are scored as they would be delivered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.core.records import Checkpoint, EpisodeLog
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.records import Limits, SearchResult
from tests.search.bench import WORTH, brief
from tests.search.fake_space import FakeEvaluator, FakePlan, FakeSpace, macs_budget


class Delivering(FakeEvaluator):
    """Delivered networks are the worse, the wider their third group is: the opposite of what candidates say."""

    asked: list[tuple[int, ...]]

    def delivered(self, plan: FakePlan) -> float:
        widths = tuple(plan.widths.values())
        self.asked.append(widths)
        return 1.0 - widths[2] / 64


def searched(
    folder: Path, name: str = "random", evaluations: int = 60, share: float = 0.5
) -> tuple[SearchResult, list[tuple[int, ...]]]:
    space = FakeSpace([16, 24, 16, 32], granularity=2)
    evaluator: Any = Delivering(space, WORTH)
    evaluator.asked = []
    result = create_agent(name, settings=brief(name)).search(
        PruningEnv(space, [macs_budget(space, share)], evaluator),
        evaluator,
        Limits(max_evaluations=evaluations, use_all=True),
        log=EpisodeLog(folder / "log.jsonl"),
        checkpoint=Checkpoint(folder / "state.pt"),
    )
    return result, evaluator.asked


@pytest.mark.parametrize("name", ["random", "knapsack", "constrained"])  # learning agents share one choice
def test_the_best_as_delivered_is_the_result(name: str, tmp_path: Path) -> None:
    result, asked = searched(tmp_path, name)
    assert len(asked) == len(set(asked)) == 3
    rewards = {each.widths: each.reward for each in result.candidates}
    if name in ("random", "knapsack"):  # the others' are the best by their model of the reward
        assert asked == sorted(asked, key=lambda widths: -rewards[widths])
    assert len({widths[2] for widths in asked}) > 1
    assert tuple(result.widths.values()) == min(asked, key=lambda widths: (widths[2], -sum(widths)))
    assert [each.widths for each in result.finalists] == asked
    assert [each.accuracy for each in result.finalists] == [1.0 - widths[2] / 64 for widths in asked]
    scored = {each.widths: each.accuracy for each in result.candidates}
    assert result.accuracy == scored[tuple(result.widths.values())]  # as the search sees it


def test_short_searches_have_fewer_finalists(tmp_path: Path) -> None:
    for evaluations, number in ((39, 0), (40, 2), (60, 3), (100, 5)):
        folder = tmp_path / str(evaluations)
        folder.mkdir()
        assert len(searched(folder, evaluations=evaluations)[1]) == number


def test_a_later_round_starts_from_the_result_and_has_no_finalists(tmp_path: Path) -> None:
    first, _ = searched(tmp_path)
    widths = tuple(first.widths.values())
    assert max(first.candidates, key=lambda each: each.reward).widths != widths
    second, asked = searched(tmp_path, share=0.502)  # it has room for the last result as it is
    assert not asked
    assert not second.finalists
    again = [each for each in second.candidates if each.round == 1 and each.phase == "final"]
    assert widths in [each.widths for each in again]


def test_a_finished_search_gives_the_same_finalists(tmp_path: Path) -> None:
    first, _ = searched(tmp_path)
    second, asked = searched(tmp_path)
    assert not asked
    assert second.finalists == first.finalists
    assert second.widths == first.widths
