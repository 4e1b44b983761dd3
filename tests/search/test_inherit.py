"""A search that continues that of another target: what is known is free, and a stop changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from compressor.core.agents import AGENTS
from compressor.core.records import Checkpoint
from compressor.search.inherit import inherit
from compressor.search.records import Limits, SearchResult
from tests.search.bench import Bench, Killed, brief

LIMITS = Limits(max_evaluations=60)


def search(name: str, folder: Path, share: float, kill_after: int | None = None) -> tuple[SearchResult, Bench]:
    folder.mkdir(exist_ok=True)
    bench = Bench(folder)
    result = bench.search(name, limits=LIMITS, share=share, kill_after=kill_after, settings=brief(name))
    return result, bench


@pytest.fixture(scope="module")
def firsts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[SearchResult, Path]]:
    found = {}
    for name in AGENTS:
        folder = tmp_path_factory.mktemp(name)
        found[name] = search(name, folder, 0.7)[0], folder
    return found


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_the_next_target_needs_a_part_of_the_plans_and_is_as_good(
    firsts: dict[str, tuple[SearchResult, Path]], tmp_path: Path, name: str
) -> None:
    first, folder = firsts[name]
    (tmp_path / "next").mkdir()
    known = inherit(Checkpoint(folder / "agent.pt"), Checkpoint(tmp_path / "next/agent.pt"))
    assert known >= 1
    second, bench = search(name, tmp_path / "next", 0.4)
    alone, _ = search(name, tmp_path / "alone", 0.4)
    assert bench.env.bounds.feasible(np.array(list(second.widths.values())))[0]
    assert second.evaluations <= max(8, 0.5 * first.evaluations)
    if name != "random":  # with fewer random plans the best is worse
        assert second.reward >= alone.reward - 0.02
    assert len(bench.log_lines) == len(second.candidates)  # its own only
    assert all(line["round"] >= 1 for line in bench.log_lines)
    assert second.seconds < first.seconds + 60


@pytest.mark.parametrize("name", sorted(set(AGENTS) - {"uniform"}))
def test_a_stopped_next_search_ends_as_one_that_was_not(
    firsts: dict[str, tuple[SearchResult, Path]], tmp_path: Path, name: str
) -> None:
    _, folder = firsts[name]
    (tmp_path / "whole").mkdir()
    inherit(Checkpoint(folder / "agent.pt"), Checkpoint(tmp_path / "whole/agent.pt"))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    whole, _ = search(name, tmp_path / "whole", 0.4)
    with pytest.raises(Killed):
        search(name, tmp_path / "stopped", 0.4, kill_after=1)
    again, _ = search(name, tmp_path / "stopped", 0.4)
    assert (again.widths, again.evaluations) == (whole.widths, whole.evaluations)


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
