"""The joint agent: its phases, its resume, and that it learns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.core.records import Checkpoint
from compressor.search.joint_settings import JointSettings, plan_episodes
from compressor.search.records import Limits, SearchResult
from compressor.search.schedule import Schedule, share_epochs
from tests.search.bench import Bench
from tests.search.fake_space import FakeSpace

SMALL: dict[str, Any] = {
    "warm_start": False,
    "fill_episodes": 12,
    "episodes_per_epoch": 6,
    "updates_per_episode": 1,
    "hidden": 32,
    "proposals": 64,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchResult, Path]:
    """A search without training that has ended, and its folder."""
    folder = tmp_path_factory.mktemp("plain")
    return Bench(folder).search("joint", settings=SMALL), folder


def test_phases_and_epochs(bench: Bench) -> None:
    result = bench.search("joint", train=True, schedule=Schedule(1, 2, 1), settings=SMALL)
    assert bench.trainer is not None
    assert bench.trainer.epoch == 4
    phases = [(line["phase"], line["epoch"]) for line in bench.log_lines]
    assert phases[:12] == [("fill", 1)] * 12
    assert {epoch for phase, epoch in phases if phase in ("joint", "near")} == {1, 2}
    assert phases.count(("policy", 1)) == phases.count(("policy", 2)) == phases.count(("policy", 4)) == 1
    assert phases[-1] == ("final", 4)
    assert result.reward == max(c.reward for c in result.candidates if c.phase == "final")
    target = bench.env.budgets[0].target
    assert all(candidate.costs["macs"] <= target for candidate in result.candidates)
    assert set(result.timing) == {"evaluation", "training", "agent", "total"}
    assert sum(result.timing.values()) == pytest.approx(2 * result.timing["total"], rel=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [Schedule(), Schedule(0, 1, 0), Schedule(1, 0, 0), Schedule(0, 0, 1)],
    ids=["0", "joint", "warm", "aligned"],
)
def test_short_schedules(bench: Bench, schedule: Schedule) -> None:
    result = bench.search("joint", train=True, schedule=schedule, settings=SMALL)
    assert bench.trainer is not None
    assert bench.trainer.epoch == schedule.total
    assert result.evaluations > 10


def test_no_worse_than_uniform_and_better_than_its_fill(new_bench: Any) -> None:
    uniform = new_bench("uniform").search("uniform")
    result = new_bench("joint").search("joint", settings={**SMALL, "episodes_per_epoch": 16})
    fill = max(c.reward for c in result.candidates if c.phase == "fill")
    assert result.reward >= fill > uniform.reward


def test_a_met_budget_prunes_nothing(bench: Bench) -> None:
    result = bench.search("joint", share=1.0, settings=SMALL)
    assert list(result.widths.values()) == [16, 24, 16, 32]
    assert result.evaluations == 1


def test_killed_anywhere_it_ends_the_same(new_bench: Any) -> None:
    options: dict[str, Any] = {
        "train": True,
        "schedule": Schedule(1, 2, 1),
        "settings": {**SMALL, "episodes_per_epoch": 14},
    }
    bench = new_bench("whole")
    whole = bench.search("joint", copies=True, **options)
    saves = bench.checkpoint.saved
    assert saves >= 8
    for save in range(1, saves, 2):
        stopped = bench.stopped(save)
        torch.rand(save)  # another process has other global generators
        again = stopped.search("joint", **options)
        assert again.candidates == whole.candidates, f"killed after save {save}"
        assert (again.widths, again.accuracy, again.evaluations) == (
            whole.widths,
            whole.accuracy,
            whole.evaluations,
        )
        assert len(stopped.log_lines) == len(whole.candidates)


def test_interrupted_between_saves(plain: tuple[SearchResult, Path], bench: Bench) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.search("joint", settings=SMALL, fail_after=9)
    assert bench.search("joint", settings=SMALL).candidates == plain[0].candidates


def test_the_same_seed_twice(plain: tuple[SearchResult, Path], new_bench: Any) -> None:
    torch.rand(7)
    second = new_bench("b").search("joint", settings=SMALL, seed=0)
    third = new_bench("c").search("joint", settings=SMALL, seed=6)
    assert plain[0].candidates == second.candidates != third.candidates


def test_a_finished_search_is_not_repeated(bench: Bench) -> None:
    whole = bench.search("joint", train=True, schedule=Schedule(0, 1, 0), settings=SMALL)
    again = bench.search("joint", train=True, schedule=Schedule(0, 1, 0), settings=SMALL)
    assert bench.evaluator.evaluations == 0
    assert (again.widths, again.reward, again.evaluations) == (whole.widths, whole.reward, whole.evaluations)


def test_tightened_budgets_search_on(new_bench: Any) -> None:
    options: dict[str, Any] = {"train": True, "schedule": Schedule(0, 1, 1), "settings": SMALL}
    bench = new_bench("straight")
    first = bench.search("joint", **options)
    second = bench.search("joint", share=0.45, copies=True, **options)
    for save in (1, 3, 5):  # killed within the second round, it goes on there
        assert bench.stopped(save).search("joint", share=0.45, **options).candidates == second.candidates
    target = bench.env.budgets[0].target
    assert bench.env.costs(list(second.widths.values()))["macs"] <= target
    assert second.evaluations <= 10 < first.evaluations
    assert second.candidates[: len(first.candidates)] == first.candidates
    assert bench.trainer is not None
    assert bench.trainer.epoch == 2
    third = bench.search("joint", share=0.4, **options)
    assert third.evaluations <= 10


def test_states_of_others_are_refused(plain: tuple[SearchResult, Path], bench: Bench) -> None:
    shutil.copytree(plain[1], bench.folder, dirs_exist_ok=True)
    with pytest.raises(CompressorError, match="is of another pruning space"):
        bench.search("joint", settings=SMALL, space=FakeSpace([16, 24, 16, 32], granularity=4))
    with pytest.raises(CompressorError, match="is of the agent joint, not of uniform"):
        bench.search("uniform")
    with pytest.raises(CompressorError, match="is of a search without training, not with"):
        bench.search("joint", settings=SMALL, train=True)
    state = bench.checkpoint.load()
    assert state is not None
    bench.checkpoint.save({**state, "format": 0})
    with pytest.raises(CompressorError, match="has format 0, expected 6"):
        bench.search("joint", settings=SMALL)


@pytest.mark.parametrize("most", [1, 2, 5, 12, 40])
def test_evaluations_are_a_limit(new_bench: Any, most: int) -> None:
    for use_all in (False, True):
        limits = Limits(max_evaluations=most, use_all=use_all)
        result = new_bench(f"{most}{use_all}").search(
            "joint", limits=limits, train=True, schedule=Schedule(0, 2, 1), settings=SMALL
        )
        assert result.evaluations <= most
        if use_all:
            assert result.evaluations >= most * 0.6


def test_a_warm_start_measures_the_groups_first(plain: tuple[SearchResult, Path], new_bench: Any) -> None:
    cold, _ = plain
    warm_bench = new_bench("warm")
    warm = warm_bench.search("joint", settings={**SMALL, "warm_start": True}, copies=True)
    assert [candidate.phase for candidate in warm.candidates[:9]] == ["sensitivity"] * 8 + ["fill"]
    fills = [[c.reward for c in result.candidates if c.phase == "fill"] for result in (cold, warm)]
    assert fills[1][1] > max(fills[0])  # the first plan after the uniform one is the knapsack's
    for save in (1, 2):
        again = warm_bench.stopped(save).search("joint", settings={**SMALL, "warm_start": True})
        assert again.candidates == warm.candidates


def test_episode_plan() -> None:
    plan = plan_episodes(JointSettings(), 3, Limits(), groups=12)
    assert (plan.fill, plan.rounds, plan.per_round, plan.blocks) == (20, 3, 10, 1)
    assert plan.block_episodes(0) == 9
    plan = plan_episodes(JointSettings(), 2, Limits(max_evaluations=400, use_all=True), groups=12)
    assert 25 + plan.fill + 2 * plan.per_round + 1 + plan.reserve in (399, 400)
    assert sum(plan.block_episodes(block) for block in range(plan.blocks)) == plan.per_round - 1
    assert [block for block in range(2 * plan.blocks) if plan.ends_round(block)] == [
        plan.blocks - 1,
        2 * plan.blocks - 1,
    ]


def test_bad_settings() -> None:
    with pytest.raises(CompressorError, match="expected 'episode' or 'bootstrapped'"):
        JointSettings(returns="all")  # type: ignore[arg-type]
    with pytest.raises(CompressorError, match="fill_episodes is 0, expected 1 or more"):
        JointSettings(fill_episodes=0)


def test_shares_of_epochs() -> None:
    for pretrained in (True, False):
        for epochs in range(60):
            schedule = share_epochs(epochs, pretrained=pretrained)
            assert schedule.total == epochs
            assert not pretrained or schedule.warmup == 0
    assert share_epochs(2, pretrained=True) == Schedule(0, 2, 0)
    with pytest.raises(CompressorError, match="for -1 epochs"):
        share_epochs(-1, pretrained=True)


def test_weights_are_written_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"train": True, "schedule": Schedule(1, 2, 1), "settings": SMALL}
    saved: list[str] = []
    save = Checkpoint.save

    def noted(checkpoint: Checkpoint, state: Any) -> None:
        save(checkpoint, state)
        saved.append(checkpoint.path.name)
        if "weights" in saved[-1]:
            shutil.copytree(checkpoint.path.parent, tmp_path / saved[-1])

    bench = Bench(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", noted)
        whole = bench.search("joint", **options)
    assert sorted(name for name in saved if "weights" in name) == [f"agent-weights-{i}.pt" for i in (1, 2, 3, 4)]
    assert saved.count("agent.pt") > 6
    assert [path.name for path in bench.folder.glob("*weights*")] == ["agent-weights-4.pt"]

    for epoch in (1, 3, 4):  # killed when the weights are written and the checkpoint does not name them yet
        again = Bench(tmp_path / f"agent-weights-{epoch}.pt").search("joint", **options)
        assert (again.candidates, again.widths) == (whole.candidates, whole.widths)

    (bench.folder / "agent-weights-4.pt").unlink()
    with pytest.raises(CompressorError, match=r"agent-weights-4\.pt, the weights of the search, is missing"):
        bench.search("joint", **options)
