"""Each part of the joint method that is on changes what a search does; what cannot act says so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.recipe import Recipe
from compressor.search.base import create_agent
from compressor.search.environment import PruningEnv
from compressor.search.joint_learner import Learner
from compressor.search.joint_settings import ENVIRONMENT_MODEL, JointSettings
from compressor.search.method import never_acted, without_effect
from compressor.search.records import Candidate, Episode, Limits, Transition
from compressor.search.schedule import Schedule, epochs_in_search, epochs_until, share_epochs
from compressor.training.classification import Classification
from tests.search.fake_space import FakeEvaluator, FakeSpace, FakeTrainer, macs_budget

BASE: dict[str, Any] = {
    "fill_episodes": 8, "episodes_per_epoch": 4, "updates_per_episode": 1, "hidden": 16, "decoder_updates": 3,
    "near_share": 0.4, "proposals": 16, "shortlist": 2, "batch": 16, "warm_start": False,
    "actor_rate": 0.01, "critic_rate": 0.01,
}  # fmt: skip
"""Learns fast enough that another policy is seen in the widths of a few episodes."""

ROUNDS: dict[str, Any] = {"train": True, "schedule": Schedule(0, 3, 0)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trajectory(tmp_path_factory, {}, 16)


def trajectory(
    folders: pytest.TempPathFactory, settings: dict[str, Any], context: int
) -> list[dict[str, Any]]:
    """What a search of three joint rounds logs, but for its times."""
    from tests.search.bench import Bench

    bench = Bench(folders.mktemp("search"))
    space = FakeSpace([64, 96, 64, 64])
    bench.search("joint", settings={**BASE, **settings}, context_size=context, space=space, **ROUNDS)
    return [{key: value for key, value in line.items() if key != "seconds"} for line in bench.log_lines]


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({}, 0),
        ({"decoder_updates": 6}, 16),
        ({"proposals": 1}, 16),
        ({"replay": 20}, 16),
        ({"near_share": 0.0}, 16),
        ({"warm_start": True}, 16),
        ({"returns": "bootstrapped"}, 16),
        ({"store_asked": False}, 16),
        ({"scale_rewards": False}, 16),
        ({"favour": "policy"}, 16),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_every_part_changes_the_search(
    settings: dict[str, Any],
    context: int,
    whole: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A replay of 20 holds transitions of the last rounds only."""
    assert trajectory(tmp_path_factory, settings, context) != whole


def test_a_search_repeats_itself(
    whole: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert trajectory(tmp_path_factory, {}, 16) == whole


def distance_at_last(context: int, seed: int) -> float:
    """How far the policy's ratio is from the best one, which has moved from 0.2 to 0.8 while the weights trained.

    One group; in each of four rounds ten random ratios a, rewarded with 1 - 4 (a - best)^2.
    """
    space = FakeSpace([64])
    env = PruningEnv(space, [macs_budget(space, 1.0)], FakeEvaluator(space, [1]), context_size=context)
    settings = JointSettings(
        hidden=32, actor_rate=3e-3, critic_rate=3e-3, decoder_updates=50, entropy=0.02, updates_per_episode=4
    )
    learner, generator = Learner(env, settings, seed=seed), np.random.default_rng(seed)
    for epoch in range(4):
        learner.begin_epoch(epoch)
        best = 0.2 + 0.2 * epoch
        seen = np.concatenate([np.full(9, 0.5), env.context]).astype(np.float32)
        for ratio in map(float, generator.random(10)):
            reward = 1 - 4 * (ratio - best) ** 2
            step = Transition(seen, ratio, seen, reward, True, ratio)
            learner.remember(Episode((step,), Candidate((32,), reward, reward, {}, "joint", epoch)))
        learner.sac.replay_buffer.standardise()
        learner.learn(10)
    now = np.concatenate([np.full(9, 0.5), env.context]).astype(np.float32)
    return abs(learner.policy(deterministic=True)(now, None) - 0.8)  # type: ignore[arg-type]


def test_the_environment_model_helps_where_the_reward_drifts() -> None:
    """Without it the policy is torn between the rewards of all epochs; with it, it follows the last one."""
    assert distance_at_last(context=16, seed=0) < 0.6 * distance_at_last(context=0, seed=0)


def test_alignment_pulls_what_the_favoured_plan_drops() -> None:
    """The same epoch with and without: other weights, and less norm in what the plan removes."""
    from compressor.data import load_data
    from compressor.pruning.space import PruningSpace
    from compressor.training.loop import Trainer, TrainSettings
    from compressor.training.losses import Alignment
    from tests.search.test_real_parts import Residual

    digits = load_data("digits", seed=0)
    dropped = []
    for beta in (0.0, 0.3):
        torch.manual_seed(0)
        model = Residual()
        space = PruningSpace(model, torch.zeros(1, 3, 32, 32))
        plan = space.uniform(0.5)
        trainer = Trainer(
            model,
            Classification.of(digits),
            TrainSettings(batch_size=64, learning_rate=0.1),
            epochs=1,
            seed=1,
        )
        trainer.regulariser = Alignment(space, plan, beta=beta) if beta else None
        stats = trainer.run_epoch()
        assert (stats.regulariser > 0) == bool(beta)
        dropped.append(float(Alignment(space, plan, beta=1.0)(model).detach()))
    assert dropped[1] < 0.9 * dropped[0]


def joint(epochs: int, *, share: float = 1 / 3, pretrained: bool = True, **settings: Any) -> Any:
    """The joint agent as a recipe of so many epochs makes it, and the recipe."""
    recipe = Recipe(
        model="resnet18", data="cifar10", weights="default" if pretrained else "none", epochs=epochs,
        search={"epochs_share": share, "settings": settings},
    ).resolved()  # fmt: skip
    schedule = share_epochs(epochs_in_search(epochs, share), pretrained=pretrained)
    agent = create_agent(
        "joint", schedule=schedule, settings=settings, context_size=recipe.search.context_size,
        trainer=FakeTrainer() if schedule.total else None, alignment=partial(print),
    )  # fmt: skip
    return agent, recipe


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("share", [0.2, 1 / 3, 0.6, 0.9])
def test_too_few_joint_epochs_are_told_with_how_many_it_takes(share: float, pretrained: bool) -> None:
    enough = epochs_until(2, share, pretrained=pretrained)
    assert enough is not None
    agent, recipe = joint(enough, share=share, pretrained=pretrained)
    assert agent.context_size == 128
    assert list(without_effect(agent, recipe)) == []
    agent, recipe = joint(enough - 1, share=share, pretrained=pretrained)
    assert agent.context_size == 0
    (note,) = without_effect(agent, recipe)
    assert f"the {ENVIRONMENT_MODEL} (it learns how rewards change from one joint epoch to the next" in note
    assert note.endswith(f"of the epochs for the search, --epochs {enough} or more.")


def test_a_search_without_training_says_what_is_idle() -> None:
    agent, recipe = joint(6, share=0.0)
    (note,) = without_effect(agent, recipe)
    assert "the search has no joint epochs" in note
    assert "the alignment of the weights (no epoch of training follows" in note
    assert "--set search.epochs_share=0.5" in note


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gamma": 0.9}, "search.settings.gamma (returns is 'episode'"),
    ],
)
def test_settings_without_effect_are_told(settings: dict[str, Any], expected: str) -> None:
    assert expected in " ".join(without_effect(*joint(20, **settings)))


@pytest.mark.parametrize(
    ("agent", "search", "expected"),
    [
        ("uniform", {"context_size": 128}, "search.context_size (only the joint agent"),
        ("stepwise", {"align_weight": 0.01}, "search.align_weight (only the joint agent"),
        ("knapsack", {"align": "channel"}, "search.align (only the joint agent"),
        ("stepwise", {"settings": {"near_share": 0.0, "proposals": 9}}, "proposals (near_share is 0"),
        ("constrained", {"settings": {"action": "channel", "near_share": 0.3}}, "near_share (action is"),
        ("joint", {"align": "channel", "align_weight": 0}, "search.align (search.align_weight is 0"),
    ],
)  # fmt: skip
def test_fields_of_other_agents_are_told(agent: str, search: dict[str, Any], expected: str) -> None:
    recipe = Recipe(model="resnet18", agent=agent, search=search).resolved()
    made = create_agent(agent, settings=recipe.search.settings, context_size=recipe.search.context_size or 0)
    assert made.context_size == 0
    assert expected in " ".join(without_effect(made, recipe))


@pytest.mark.parametrize("agent", ["constrained", "stepwise", "knapsack", "uniform", "random"])
def test_defaults_have_nothing_without_effect(agent: str) -> None:
    recipe = Recipe(model="resnet18", agent=agent).resolved()
    assert recipe.search.context_size is None  # a joint search that takes this recipe up has its model
    assert list(without_effect(create_agent(agent), recipe)) == []


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"learning_rate": 0.1}, "training.learning_rate (the search trains no epochs"),
        ({"learning_rate": 0.1, "one_schedule": True}, None),
        (
            {"finetune_learning_rate": 0.1, "one_schedule": True},
            "training.finetune_learning_rate (training.one_schedule",
        ),
        ({"finetune_learning_rate": 0.1}, None),
    ],
)
def test_learning_rates_that_nothing_reads_are_told(training: dict[str, Any], expected: str | None) -> None:
    recipe = Recipe(model="resnet18", data="cifar10", agent="uniform", training=training).resolved()
    told = list(without_effect(create_agent("uniform"), recipe))
    assert told == [] if expected is None else expected in told[0]


def test_a_limit_that_comes_before_the_second_round_is_told(tmp_path: Path) -> None:
    from tests.search.bench import Bench

    agent, _ = joint(20)
    late = Limits(max_seconds=1e-9)
    result = Bench(tmp_path).search("joint", settings=BASE, context_size=16, limits=late, **ROUNDS)
    (note,) = never_acted(agent, result)
    assert note.startswith(
        "The environment model was idle: no round of episodes followed the first joint epoch."
    )
    assert list(never_acted(create_agent("uniform"), result)) == []
