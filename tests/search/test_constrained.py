"""The constrained agent: its loss, multipliers and cost critics by hand, and searches that meet their budgets."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from compressor.budgets.base import parse_budget
from compressor.budgets.limits import resolve
from compressor.core.agents import AGENTS
from compressor.core.errors import CompressorError
from compressor.core.records import Checkpoint, EpisodeLog
from compressor.data import load_data
from compressor.pruning.space import PruningSpace
from compressor.search.base import create_agent
from compressor.search.constrained import best_feasible
from compressor.search.constrained_episodes import LayerActions, plan_of_masks
from compressor.search.constrained_learner import (
    CostRolloutBuffer,
    LagrangianPpo,
    Multipliers,
    Step,
    centred,
    lagrangian_loss,
)
from compressor.search.constrained_settings import ConstrainedSettings
from compressor.search.environment import PruningEnv
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.records import Limits
from compressor.training.classification import Classification
from compressor.training.loop import BriefTraining, TrainSettings
from tests.search.bench import Killed
from tests.search.fake_space import FakeEvaluator, FakeSpace, macs_budget
from tests.search.test_real_parts import Residual

SMALL: dict[str, Any] = {"evaluations": 40, "episodes_per_update": 4}


def test_loss_by_hand() -> None:
    ratio, advantages = torch.tensor([1.5, 0.5]), torch.tensor([2.0, -1.0])
    # -min(3, 2.4) + 0.5 * 1.5 * 1 = -1.65 and -min(-0.5, -0.8) + 0.5 * 0.5 * -2 = 0.3; their mean over 1 + 0.5.
    one = lagrangian_loss(ratio, advantages, torch.tensor([[1.0], [-2.0]]), torch.tensor([0.5]), 0.2)
    assert float(one) == pytest.approx(-0.45)
    # A second budget at nu = 1.5: 2.85 and 0.3; their mean over 1 + 2.
    costs = torch.tensor([[1.0, 2.0], [-2.0, 0.0]])
    assert float(lagrangian_loss(ratio, advantages, costs, torch.tensor([0.5, 1.5]), 0.2)) == pytest.approx(
        0.525
    )


def test_multipliers_rise_with_excess_and_fall_without() -> None:
    multipliers = Multipliers(2, rate=0.1)
    assert multipliers.values.tolist() == pytest.approx([1.0, 1.0])
    multipliers.step(
        [60.0, 40.0], [50.0, 50.0]
    )  # Adam's first step moves p by its rate: softplus(0.5413 +- 0.1)
    assert multipliers.values.tolist() == pytest.approx([1.064364, 0.937961], abs=1e-5)
    again = Multipliers(2, rate=0.1)
    again.load_state_dict(multipliers.state_dict())
    again.optimizer.load_state_dict(deepcopy(multipliers.optimizer.state_dict()))
    for each in (multipliers, again):
        each.step([55.0, 70.0], [50.0, 50.0])
    assert again.values.tolist() == multipliers.values.tolist()


def test_advantages_of_costs_by_hand() -> None:
    box = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    buffer = CostRolloutBuffer(
        4, box, box, device="cpu", gamma=0.5, gae_lambda=0.5, budgets=2, cost_lambda=1.0
    )
    told = [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (4.0, 0.0)]
    costs = [(0.0, 0.0), (10.0, 1.0), (0.0, 0.0), (6.0, 0.0)]
    for number, (value, cost) in enumerate(zip(told, costs, strict=True)):
        step = Step(np.zeros(1, np.float32), torch.zeros(1), torch.tensor(value), torch.zeros(1))
        buffer.add_with_costs(
            np.zeros(1, np.float32), step, float(number % 2), np.array(cost), number % 2 == 0
        )
    buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1))
    assert buffer.costs[0].advantages[:, 0].tolist() == [
        4.0,
        8.0,
        0.0,
        2.0,
    ]  # 0.5 * 10 - 1, 10 - 2, 0.5 * 6 - 3, ...
    assert buffer.costs[0].returns[:, 0].tolist() == [5.0, 10.0, 3.0, 6.0]
    assert buffer.costs[1].advantages[:, 0].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert buffer.advantages[:, 0].tolist() == [
        0.25,
        1.0,
        0.25,
        1.0,
    ]  # gamma 0.5 and lambda 0.5, of a reward of 1
    batch = next(iter(buffer.get(4)))
    order = np.argsort(batch.cost_returns[:, 0].numpy())
    assert batch.cost_returns[order, 0].tolist() == [3.0, 5.0, 6.0, 10.0]
    assert batch.cost_advantages[order, 0].tolist() == [0.0, 4.0, 2.0, 8.0]


def test_centred_by_hand() -> None:
    costs = torch.tensor([[1.0], [3.0], [5.0]])
    assert centred(costs, scale=False).flatten().tolist() == [-2.0, 0.0, 2.0]
    assert centred(costs, scale=True).flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0])


@pytest.mark.parametrize(("nu", "up"), [(-8.0, True), (4.0, False)])
def test_policy_follows_reward_or_cost_as_the_multiplier_says(nu: float, up: bool) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    settings = ConstrainedSettings(rate=0.01, target_kl=1.0)
    ppo = LagrangianPpo(1, 1, 64, 1, settings)
    with torch.no_grad():
        ppo.multipliers._raw.fill_(nu)
    state = np.zeros(1, np.float32)
    before = float(ppo.act(state, deterministic=True).action[0])
    for _ in range(3):  # the reward is the action, and so is the cost
        ppo.rollout_buffer.reset()
        for _ in range(64):
            step = ppo.act(state)
            ppo.rollout_buffer.add_with_costs(
                state, step, float(step.action[0]), step.action.astype(float), True
            )
        ppo.rollout_buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1))
        ppo.train()
    moved = float(ppo.act(state, deterministic=True).action[0]) - before
    assert moved > 0.05 if up else moved < -0.05


def test_best_feasible() -> None:
    rewards = [0.9, 0.5, 0.7]
    assert best_feasible(rewards, np.array([False, True, True])) == 2
    assert best_feasible(rewards, np.array([False, False, False])) is None


def test_plan_of_masks() -> None:
    plan = plan_of_masks(["a", "b"], [np.array([0.2, 0.9, 0.6]), np.array([0.5, 0.5])], np.array([2, 1]))
    assert dict(plan.keep) == {"a": (1, 2), "b": (0,)}


def test_it_learns_to_meet_the_budget_from_the_dense_network(new_bench: Any) -> None:
    uniform = new_bench("uniform").search("uniform")
    bench = new_bench("constrained")
    settings = {"start": "dense", "first_deviation": 0.2, "evaluations": 96, "near_share": 0.0}
    result = bench.search("constrained", settings=settings, limits=Limits(max_evaluations=96))
    target = bench.env.budgets[0].target
    costs = [c.costs["macs"] / target for c in result.candidates if c.phase == "policy"]
    assert np.mean(costs[:16]) > 1.3  # near the dense network, of twice the budget
    assert 0.7 < np.mean(costs[-32:]) < 1.15
    assert result.evaluations <= 96
    assert result.reward > uniform.reward
    assert bench.env.bounds.feasible(np.array([list(result.widths.values())]))[0]


def test_without_a_feasible_episode_the_nearest_are_scaled(bench: Any) -> None:
    settings = {"start": "dense", "first_deviation": 0.01, "evaluations": 16}
    result = bench.search("constrained", settings=settings)
    target = bench.env.budgets[0].target
    assert all(c.costs["macs"] > target for c in result.candidates if c.phase == "policy")
    assert bench.env.bounds.feasible(np.array([list(result.widths.values())]))[0]


def test_killed_anywhere_it_ends_the_same(new_bench: Any) -> None:
    bench = new_bench("whole")
    whole = bench.search("constrained", settings=SMALL, seed=4, copies=True)
    assert new_bench("twice").search("constrained", settings=SMALL, seed=4).candidates == whole.candidates
    for save in (1, 4, 7):
        assert bench.stopped(save).search("constrained", settings=SMALL, seed=4).candidates == whole.candidates
    again = bench.search("constrained", settings=SMALL, seed=4, share=0.45)
    assert again.evaluations <= 8
    assert bench.env.bounds.feasible(np.array([list(again.widths.values())]))[0]


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_a_kill_in_the_warm_up_is_nothing_to_any_agent(new_bench: Any, name: str) -> None:
    from compressor.search.schedule import Schedule

    options = {"train": True, "schedule": Schedule(2), "limits": Limits(max_evaluations=12)}
    whole = new_bench("whole").search(name, **options)
    bench = new_bench("killed")
    with pytest.raises(Killed):
        bench.search(name, kill_after=1, **options)
    assert bench.search(name, **options).candidates == whole.candidates


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_states_of_other_agents_are_refused(bench: Any, name: str) -> None:
    other = "random" if name == "uniform" else "uniform"
    bench.search(other, limits=Limits(max_evaluations=2))
    with pytest.raises(CompressorError, match=f"is of the agent {other}, not of {name}"):
        bench.search(name)


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_an_accuracy_that_is_no_number_ends_any_search(
    bench: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEvaluator, "__call__", lambda *_: float("nan"))
    with pytest.raises(CompressorError, match="gave an accuracy of nan, expected a number from 0 to 1"):
        bench.search(name)


def test_settings() -> None:
    agent = create_agent("constrained", settings={"paper": True, "evaluations": 400})
    assert (agent.settings.evaluations, agent.settings.gamma, agent.settings.rate) == (400, 0.99, 3e-4)
    assert agent.settings.finetune_iterations == (0, 32, 128)
    assert create_agent("constrained").settings == ConstrainedSettings()
    for wrong in (
        {"action": "filter"},
        {"rate": 0},
        {"finetune_iterations": [1, 2]},
        {"evaluations": "many"},
    ):
        with pytest.raises(CompressorError, match=next(iter(wrong))):
            create_agent("constrained", settings=wrong)


def test_soft_masks_of_zero_and_one_are_the_slim_network() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    space = PruningSpace(model, torch.zeros(1, 3, 32, 32))
    plan = space.uniform(0.5)
    masks = [np.isin(np.arange(g.width), plan.keep[g.name]).astype(float) for g in space.groups]
    images = torch.rand(2, 3, 32, 32)
    slim = space.apply(plan)(images)
    assert torch.allclose(space.soften(masks)(images), slim, atol=1e-5)
    assert not torch.allclose(model(images), slim, atol=1e-2)


@pytest.mark.parametrize("action", ["layer", "channel"])
def test_on_a_real_network_with_training_of_each_candidate(tmp_path: Path, action: str) -> None:
    torch.manual_seed(0)
    digits, model = load_data("digits", seed=0), Residual()
    space = PruningSpace(model, torch.zeros(1, 3, 32, 32))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    budgets = resolve([parse_budget("macs", "50%"), parse_budget("params", "60%")], space)
    calls: list[int] = []
    train = BriefTraining(Classification.of(digits), TrainSettings(batch_size=16, learning_rate=0.05), seed=0)

    def brief(network: Any, steps: int) -> None:
        calls.append(steps)
        train(network, steps)

    scoring = Scoring(bn_batches=1, batch_size=32)
    evaluator = Evaluator(space, Classification.of(digits), scoring, search_images=50, brief=brief)
    env = PruningEnv(space, budgets, evaluator)
    settings = {
        "action": action,
        "evaluations": 40,
        "episodes_per_update": 4,
        "finetune_iterations": [0, 1, 2],
    }
    agent = create_agent("constrained", seed=2, settings=settings)
    log, checkpoint = EpisodeLog(tmp_path / "episodes.jsonl"), Checkpoint(tmp_path / "agent.pt")
    result = agent.search(env, evaluator, Limits(), log=log, checkpoint=checkpoint)
    assert set(calls) == {1, 2}
    # All final candidates have had the last third's training, whenever they were found.
    final = [c for c in result.candidates if c.phase == "final"]
    assert len(final) > 1
    assert calls[-len(final) :] == [2] * len(final)
    assert result.accuracy == evaluator.score(space.apply(result.best), steps=2)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert env.bounds.feasible(np.array([list(result.widths.values())]))[0]
    assert {name: len(kept) for name, kept in result.best.keep.items()} == dict(result.widths)
    again = agent.search(env, evaluator, Limits(), log=log, checkpoint=checkpoint)
    assert (again.best, again.reward) == (result.best, result.reward)


def test_without_a_budget_nothing_is_pruned(tmp_path: Path) -> None:
    space = FakeSpace([16, 24], granularity=2)
    evaluator = FakeEvaluator(space, [1.0, 2.0])
    env = PruningEnv(space, [], evaluator)  # type: ignore[arg-type]
    result = create_agent("constrained").search(
        env,
        evaluator,  # type: ignore[arg-type]
        Limits(),
        log=EpisodeLog(tmp_path / "log.jsonl"),
        checkpoint=Checkpoint(tmp_path / "state.pt"),
    )
    assert list(result.widths.values()) == [16, 24]


def test_no_action_keeps_the_plan_that_it_is_added_to_also_above_the_cap() -> None:
    space = FakeSpace([20, 20])
    env = PruningEnv(space, [macs_budget(space, 0.5)], FakeEvaluator(space, [1, 1]))
    actions = LayerActions(env, fold=True)
    actions.centre(np.array([6, 16]))
    ratios = [actions.ratio(group, np.zeros(1, dtype=np.float32), cap=0.5) for group in range(2)]
    assert ratios == pytest.approx([0.7, 0.2])
    assert actions.ratio(1, np.array([0.4], dtype=np.float32), cap=0.5) == pytest.approx(0.4)  # mirrored
