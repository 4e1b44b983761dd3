"""The joint agent's switches: each turns off what it says and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.core.errors import CompressorError
from compressor.recipe import load_recipe, shipped_recipes
from compressor.search.joint_settings import JointSettings, plan_episodes
from compressor.search.records import Limits, SearchResult
from compressor.search.schedule import Schedule, share_epochs
from tests.search.bench import Bench
from tests.search.fake_space import FakeEvaluator, FakePlan

SMALL: dict[str, Any] = {
    "fill_episodes": 12, "episodes_per_epoch": 6, "updates_per_episode": 1, "hidden": 32, "decoder_updates": 5,
    "proposals": 64,
}  # fmt: skip
TRAINED: dict[str, Any] = {"train": True, "schedule": Schedule(1, 2, 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, SearchResult]:
    """A search as these settings ask for it, with a copy of its files after each save."""
    bench = Bench(tmp_path_factory.mktemp("searches") / "whole")
    return bench, bench.search("joint", settings=SMALL, copies=True, **TRAINED)


def phases(bench: Bench) -> list[str]:
    return [line["phase"] for line in bench.log_lines]


def test_the_favoured_plan_may_be_the_policys(bench: Bench) -> None:
    bench.search("joint", settings={**SMALL, "favour": "policy"}, **TRAINED)
    policys = [line["widths"] for line in bench.log_lines if line["phase"] == "policy"]
    assert "favoured" not in phases(bench)
    assert len(policys) == 3  # two rounds, and one on the final weights
    state = bench.checkpoint.load()
    assert state is not None
    assert state["own"]["favoured"] == policys[1]


def test_without_rescoring_the_best_ever_is_taken(whole: tuple[Bench, SearchResult], bench: Bench) -> None:
    result = bench.search("joint", settings={**SMALL, "rescore": False}, **TRAINED)
    assert phases(bench).count("final") == 1
    earlier = [line for line in bench.log_lines if line["phase"] not in ("final", "sensitivity")]
    assert list(result.widths.values()) == max(earlier, key=lambda line: line["reward"])["widths"]
    assert sum(candidate.phase == "final" for candidate in whole[1].candidates) > 1


def test_rewards_may_stay_as_they_are(bench: Bench) -> None:
    bench.search("joint", settings={**SMALL, "scale_rewards": False})
    state = bench.checkpoint.load()
    assert state is not None
    replay = state["own"]["learner"]["sac"]["replay"]
    assert (replay["centre"], replay["scale"]) == (0.0, 1.0)


class EarlyGiver(FakeEvaluator):
    """Gives up as soon as it may, with any estimate below the floor."""

    gave_up = 0

    def __call__(self, plan: FakePlan, *, floor: float | None = None) -> float:
        whole = super().__call__(plan)
        if floor is None or whole >= floor:
            return whole
        self.gave_up += 1
        return float(np.random.default_rng(self.gave_up).uniform(0, floor * 0.999))


@pytest.mark.parametrize("seed", range(2))
def test_giving_up_early_changes_nothing_but_the_cost(
    whole: tuple[Bench, SearchResult], new_bench: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = new_bench("late").search("joint", settings=SMALL, seed=seed, **TRAINED) if seed else whole[1]
    monkeypatch.setattr("tests.search.bench.FakeEvaluator", EarlyGiver)
    bench = new_bench("early")
    early = bench.search("joint", settings=SMALL, seed=seed, **TRAINED)
    assert bench.evaluator.gave_up > 0
    assert (early.widths, early.reward, early.accuracy) == (late.widths, late.reward, late.accuracy)
    given_up = [candidate for candidate in early.candidates if candidate.given_up]
    assert {candidate.phase for candidate in given_up} <= {
        "favoured",
        "final",
    }  # never one that the replay holds
    assert sum(line.get("given_up", False) for line in bench.log_lines) == len(given_up)


def test_every_epoch_of_training_is_told_once(whole: tuple[Bench, SearchResult]) -> None:
    bench, result = whole
    assert [(each["phase"], each["epoch"]) for each in result.training] == [
        ("warmup", 1), ("joint", 2), ("joint", 3), ("aligned", 4)
    ]  # fmt: skip
    assert bench.stopped(5).search("joint", settings=SMALL, **TRAINED).training == result.training


def test_curves(new_bench: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    new_bench("a").search(
        "joint",
        settings=SMALL,
        context_size=16,
        curves=tmp_path / "curves",
        **TRAINED,
    )
    events = EventAccumulator(str(tmp_path / "curves")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "search/reward", "favoured/g0", "favoured/g3", "agent/decoder_loss", "agent/z_norm", "agent/z_change", "z/0",
        "agent/actor_loss", "agent/critic_loss", "training/regulariser",
    } <= tags  # fmt: skip
    assert all(0 < event.value <= 1 for event in events.Scalars("favoured/g0"))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("gamma", "high", "gamma is 'high', expected a number, such as 1.0"),
        ("fill_episodes", 2.5, "fill_episodes is 2.5, expected a whole number"),
        ("warm_start", 1, "warm_start is 1, expected true or false"),
        ("returns", "all", "returns is 'all', expected 'episode' or 'bootstrapped'"),
        ("favour", "none", "favour is 'none', expected 'best' or 'policy'"),
        ("actor_rate", 0, "actor_rate is 0, expected more than 0"),
        ("shortlist", 0, "shortlist is 0, expected 1 or more"),
        ("near_share", 75, "near_share is 75, expected 0 to 1"),
    ],
)
def test_settings_that_are_refused(bench: Bench, name: str, value: Any, expected: str) -> None:
    with pytest.raises(CompressorError, match=expected):
        bench.search("joint", settings={name: value})


@pytest.mark.parametrize("name", sorted(name for name in shipped_recipes() if name.startswith("joint/")))
def test_recipes_of_the_experiments_are_whole(name: str) -> None:
    recipe = load_recipe(shipped_recipes()[name]).resolved()
    assert recipe.epochs in (100, 200)
    if recipe.agent == "joint":
        JointSettings(**recipe.search.settings)
        assert (recipe.search.context_size == 0) == name.endswith("no-environment")
    else:
        assert (recipe.budgets.flops, recipe.search.epochs_share) == ("100%", 0)


def test_the_papers_own_recipe_has_its_numbers() -> None:
    recipe = load_recipe(shipped_recipes()["joint/paper"]).resolved()
    settings = JointSettings(**recipe.search.settings)
    assert (settings.actor_rate, settings.critic_rate, settings.entropy, settings.tau) == (
        1e-4,
        1e-3,
        0.1,
        0.005,
    )
    assert (settings.batch, settings.replay, settings.hidden, settings.decoder_updates) == (
        64,
        10_000,
        300,
        100,
    )
    assert (settings.episodes_per_epoch, recipe.search.context_size) == (10, 128)
    epochs = round(200 * float(recipe.search.epochs_share or 0))
    schedule = share_epochs(epochs, pretrained=False)
    assert (schedule.warmup, schedule.joint, schedule.aligned, 200 - epochs) == (10, 70, 60, 60)
    plan = plan_episodes(settings, schedule.joint, Limits(max_evaluations=recipe.search.max_evaluations), 27)
    assert (plan.points, plan.fill, plan.rounds, plan.per_round) == (0, 100, 70, 10)
    assert share_epochs(3, pretrained=False) == Schedule(1, 2, 0)
    assert share_epochs(3, pretrained=True) == Schedule(0, 2, 1)
