"""Rewards compose, and say which budget they miss."""

from __future__ import annotations

import pytest

from compressor.env.reward import ProductReward, SoftFactor, accuracy_reward
from compressor.errors import CompressorError


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
