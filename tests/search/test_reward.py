"""Rewards compose, and say which budget they miss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from compressor.core.errors import CompressorError
from compressor.search.environment import PruningEnv
from compressor.search.reward import ProductReward, SoftFactor, accuracy_needed, accuracy_reward, soft_reward
from tests.search.fake_space import FakeSpace, macs_budget


def test_accuracy_alone() -> None:
    assert accuracy_reward(0.9, {"latency": 3.0}) == 0.9


def test_soft_factors_multiply() -> None:
    reward = ProductReward(factors=(SoftFactor("latency", 5.0, -0.07), SoftFactor("macs", 2.0, -1.0)))
    assert reward(0.9, {"latency": 2.5, "macs": 4.0}) == pytest.approx(0.9 * 2**0.07 / 2)
    assert reward(0.9, {"latency": 5.0, "macs": 2.0}) == pytest.approx(0.9)


def test_unknown_cost() -> None:
    with pytest.raises(
        CompressorError, match=r"cost of latency, which is no budget here \(there are: macs\)"
    ):
        ProductReward(factors=(SoftFactor("latency", 5.0, -0.07),))(0.9, {"macs": 1.0})


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan")])
def test_bad_target(target: float) -> None:
    with pytest.raises(CompressorError, match="needs a target above 0"):
        SoftFactor("latency", target, -0.07)


@dataclass(frozen=True)
class Target:
    name: str
    target: float


BUDGETS: Any = [Target("macs", 10.0), Target("latency", 5.0)]


def test_soft_rewards_are_relative_to_their_budgets() -> None:
    reward = soft_reward({"latency": -0.5, "macs": 0.0}, BUDGETS)
    assert reward(0.8, {"latency": 1.25, "macs": 9.0}) == pytest.approx(0.8 * 2)
    assert soft_reward({"latency": 0.0}, BUDGETS) is accuracy_reward
    with pytest.raises(
        CompressorError, match=r"weighs params, which has no budget here \(there are: macs, latency\)"
    ):
        soft_reward({"params": -1.0}, BUDGETS)


def test_the_accuracy_that_a_reward_needs() -> None:
    costs = {"latency": 1.25, "macs": 9.0}
    reward = soft_reward({"latency": -0.5}, BUDGETS)
    needed = accuracy_needed(reward, 1.0, costs)
    assert needed == pytest.approx(0.5)
    assert reward(needed, costs) == pytest.approx(1.0)
    assert accuracy_needed(accuracy_reward, 0.7, {}) == pytest.approx(0.7)
    assert accuracy_needed(lambda accuracy, costs: accuracy**2, 0.7, {}) is None
    assert accuracy_needed(ProductReward(base=lambda accuracy, costs: accuracy - 1), 0.7, {}) is None


def test_a_hopeless_network_is_given_up_and_not_remembered() -> None:
    space = FakeSpace([8, 8])
    asked: list[float | None] = []

    def evaluate(plan: Any, floor: float | None = None) -> float:
        asked.append(floor)
        return 0.2 if floor is not None and floor > 0.6 else 0.6

    env = PruningEnv(
        space, [macs_budget(space, 0.5)], evaluate, soft_reward({"macs": -1.0}, [Target("macs", 1e6)])
    )
    # Rewards are 0.6 * 1e6 / cost: earning 1.5 times that needs an accuracy of 0.9.
    best = 1.5 * 0.6 * 1e6 / env.costs([4, 4])["macs"]
    hopeless = env.score([4, 4], reward_floor=best)
    assert (hopeless.given_up, hopeless.accuracy) == (True, 0.2)
    assert asked == [pytest.approx(0.9)]
    whole = env.score([4, 4])
    assert (whole.given_up, whole.accuracy, env.evaluations) == (False, 0.6, 2)
    assert env.score([4, 4], reward_floor=best).given_up is False  # known in full already
    assert env.evaluations == 2
