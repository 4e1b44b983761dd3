"""Lagrange multipliers that rise while a cost exceeds its budget, and the policy loss with these weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Multipliers:
    """One multiplier for each budget: nu = softplus(p), initially 1, with its own optimizer.

    Args:
        number: Number of budgets.
        rate: Learning rate of Adam.
    """

    def __init__(self, number: int, rate: float) -> None:
        self._raw = torch.full((number,), math.log(math.e - 1.0), requires_grad=True)
        self._optimizer = torch.optim.Adam([self._raw], lr=rate)

    @property
    def values(self) -> Tensor:
        """Return the multipliers, (budgets,), above 0, without gradient."""
        return torch.nn.functional.softplus(self._raw.detach())

    def step(self, costs: Sequence[float], budgets: Sequence[float]) -> None:
        """Take one step on -nu * (mean cost - budget): if the budget is exceeded, nu rises.

        Args:
            costs: Mean cost of the episodes since the last step, one for each budget.
            budgets: Limits in the same unit.
        """
        excess = torch.tensor([cost - budget for cost, budget in zip(costs, budgets, strict=True)])
        self._optimizer.zero_grad()
        torch.autograd.backward(-(torch.nn.functional.softplus(self._raw) * excess).sum())
        self._optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {"raw": self._raw.detach().clone(), "optimizer": copy.deepcopy(self._optimizer.state_dict())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        with torch.no_grad():
            self._raw.copy_(state["raw"])
        self._optimizer.load_state_dict(state["optimizer"])


def lagrangian_loss(
    ratio: Tensor, advantages: Tensor, cost_advantages: Tensor, multipliers: Tensor, clip: float
) -> Tensor:
    """Return the policy's loss: mean of (-min(r A, clip(r) A) + sum of nu r A_C) / (1 + sum of nu).

    Args:
        ratio: (N,), probability of each action now over its probability when it was taken.
        advantages: (N,), of the reward.
        cost_advantages: (N, budgets), of the costs.
        multipliers: (budgets,).
        clip: Clipping of the ratio, 0.2 for [0.8, 1.2]; the costs' part is not clipped.
    """
    clipped = torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    gain = torch.min(ratio * advantages, clipped * advantages)
    loss = -gain + ratio * (cost_advantages @ multipliers)
    return loss.mean() / (1.0 + multipliers.sum())
