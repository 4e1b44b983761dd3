"""A search that continues that of another target: what is known is free, and a stop changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.core.agents import AGENTS
from compressor.core.records import Checkpoint
from compressor.search.inherit import inherit
from compressor.search.records import Limits, SearchResult
from tests.search.bench import Bench, Killed, brief

LIMITS = Limits(max_evaluations=40)


def search(name: str, folder: Path, share: float, **options: Any) -> tuple[SearchResult, Bench]:
    folder.mkdir(exist_ok=True)
    bench = Bench(folder)
    result = bench.search(name, limits=LIMITS, share=share, settings=brief(name), **options)
    return result, bench


@dataclass(frozen=True)
class Inherited:
    """A search of each target: the second knows the plans of the first, and has a copy of its files after each save."""

    first: SearchResult
    second: SearchResult
    known: int
    bench: Bench


@pytest.fixture(scope="module", params=sorted(AGENTS))
def inherited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Inherited]:
    name, folder = request.param, tmp_path_factory.mktemp("searches")
    first, _ = search(name, folder / "first", 0.7)
    (folder / "next").mkdir()
    known = inherit(Checkpoint(folder / "first/agent.pt"), Checkpoint(folder / "next/agent.pt"))
    second, bench = search(name, folder / "next", 0.4, copies=True)
    return name, Inherited(first, second, known, bench)


def test_the_next_target_needs_a_part_of_the_plans_and_is_as_good(
    inherited: tuple[str, Inherited], tmp_path: Path
) -> None:
    name, both = inherited
    first, second, bench = both.first, both.second, both.bench
    assert both.known >= 1
    alone, _ = search(name, tmp_path / "alone", 0.4)
    assert bench.env.bounds.feasible(np.array(list(second.widths.values())))[0]
    assert second.evaluations <= max(8, 0.5 * first.evaluations)
    if name != "random":  # with fewer random plans the best is worse
        assert second.reward >= alone.reward - 0.02
    assert len(bench.log_lines) == len(second.candidates)  # its own only
    assert all(line["round"] >= 1 for line in bench.log_lines)
    assert second.seconds < first.seconds + 60


def test_a_stopped_next_search_ends_as_one_that_was_not(inherited: tuple[str, Inherited]) -> None:
    name, both = inherited
    again, _ = search(name, both.bench.stopped(1).folder, 0.4)
    assert (again.widths, again.evaluations) == (both.second.widths, both.second.evaluations)


def test_without_a_finished_search_nothing_is_inherited(tmp_path: Path) -> None:
    assert inherit(Checkpoint(tmp_path / "agent.pt"), Checkpoint(tmp_path / "own.pt")) == 0
    with pytest.raises(Killed):
        search("knapsack", tmp_path, 0.7, kill_after=2)
    assert inherit(Checkpoint(tmp_path / "agent.pt"), Checkpoint(tmp_path / "own.pt")) == 0
    assert not (tmp_path / "own.pt").exists()


def test_trained_weights_are_inherited(tmp_path: Path) -> None:
    from compressor.search.schedule import Schedule

    bench = Bench(tmp_path)
    first = bench.search("knapsack", limits=LIMITS, share=0.7, train=True, schedule=Schedule(warmup=3))
    (tmp_path / "next").mkdir()
    inherit(Checkpoint(tmp_path / "agent.pt"), Checkpoint(tmp_path / "next/agent.pt"))
    following = Bench(tmp_path / "next")
    second = following.search("knapsack", limits=LIMITS, share=0.5, train=True, schedule=Schedule(warmup=3))
    assert len(first.training) == len(second.training) == 3
    assert bench.trainer is not None
    assert following.trainer is not None
    assert float(following.trainer.weight) == float(bench.trainer.weight)
    assert second.evaluations < first.evaluations
