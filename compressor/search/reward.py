"""Reward of an episode: the accuracy, times optional soft factors for costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.budgets.base import Budget

Reward = Callable[[float, Mapping[str, float]], float]
"""Maps the accuracy in 0..1 and the predicted cost of each budget by name, in its own unit, to the reward."""


def accuracy_reward(accuracy: float, costs: Mapping[str, float]) -> float:
    """Return the accuracy alone: the action bounds enforce the budgets, so nothing is weighed against it."""
    return accuracy


@dataclass(frozen=True)
class SoftFactor:
    """`(cost / target) ** weight`: with a negative weight, a network cheaper than the target earns more.

    MnasNet's form (arXiv 1807.11626, section 3), whose weight of -0.07 makes halving the latency worth 5 % of
    accuracy.

    Attributes:
        name: Budget whose cost is read.
        target: Target in the budget's unit, above 0.
        weight: Exponent; 0 has no effect.
    """

    name: str
    target: float
    weight: float

    def __post_init__(self) -> None:
        if not self.target > 0:
            raise CompressorError(
                f"The reward's factor for {self.name} needs a target above 0, got {self.target}.",
                "Give its budget a value.",
            )

    def __call__(self, accuracy: float, costs: Mapping[str, float]) -> float:
        if self.name not in costs:
            known = ", ".join(sorted(costs)) or "none"
            raise CompressorError(
                f"The reward reads the cost of {self.name}, which is no budget here (there are: {known}).",
                f"Add a budget for {self.name}, or remove the factor.",
            )
        return float((costs[self.name] / self.target) ** self.weight)


@dataclass(frozen=True)
class ProductReward:
    """The product of `base` and all `factors`; `accuracy * (latency / target) ** w` is the usual one.

    >>> reward = ProductReward(factors=(SoftFactor("latency", target=5.0, weight=-0.07),))
    >>> round(reward(0.9, {"latency": 2.5}), 4)
    0.9448
    """

    base: Reward = accuracy_reward
    factors: Sequence[Reward] = ()

    def __call__(self, accuracy: float, costs: Mapping[str, float]) -> float:
        value = self.base(accuracy, costs)
        for factor in self.factors:
            value *= factor(accuracy, costs)
        return value


def soft_reward(weights: Mapping[str, float], budgets: Sequence[Budget]) -> Reward:
    """Return the accuracy times a soft factor for each budget with a weight other than 0, relative to its target.

    Args:
        weights: Exponents by the name of a budget.
        budgets: Budgets of the run.

    Raises:
        CompressorError: A weight has no budget.
    """
    targets = {budget.name: float(budget.target) for budget in budgets}
    wanted = {name: weight for name, weight in weights.items() if weight}
    if missing := sorted(set(wanted) - set(targets)):
        raise CompressorError(
            f"The reward weighs {missing[0]}, which has no budget here (there are: {', '.join(targets) or 'none'}).",
            "Add one; 100% requires no pruning, and is the reference of its factor.",
        )
    if not wanted:
        return accuracy_reward
    return ProductReward(factors=[SoftFactor(name, targets[name], weight) for name, weight in wanted.items()])


def accuracy_needed(reward: Reward, best: float, costs: Mapping[str, float]) -> float | None:
    """Return the accuracy below which a network of these costs earns less than `best`; None if it is not known.

    It is known for the accuracy alone and for its product with soft factors, which do not depend on it. A margin of
    one rounding error keeps networks that earn the same.
    """
    if reward is accuracy_reward:
        return best - 1e-9
    if isinstance(reward, ProductReward) and reward.base is accuracy_reward:
        factor = reward(1.0, costs)
        return best / factor - 1e-9 if factor > 0 else None
    return None
