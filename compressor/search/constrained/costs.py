"""Costs of plans for the cost critics and the multipliers: percent of the dense network's cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from compressor.search.candidate import Candidate
    from compressor.search.environment import PruningEnv


class Costs:
    """Costs of candidates by each budget.

    Args:
        env: Environment with the budgets and the dense network's costs.
        steps: Steps of an episode.
        excess: Whether an episode is charged only for what exceeds a budget.

    Attributes:
        budgets: Limits, in percent of the dense network's cost.
    """

    def __init__(self, env: PruningEnv, *, steps: int, excess: bool) -> None:
        self._names = [budget.name for budget in env.budgets]
        self._dense = np.array(dense_costs(env))
        self._steps, self._excess = steps, excess
        targets = np.array([float(budget.target) for budget in env.budgets])
        self.budgets: list[float] = (100.0 * targets / self._dense).tolist()

    def percent(self, candidate: Candidate) -> NDArray[np.float64]:
        """Return the percentage of the dense network's cost, (budgets,)."""
        return np.asarray(100.0 * np.array([candidate.costs[name] for name in self._names]) / self._dense)

    def terminal(self, candidate: Candidate) -> NDArray[np.float64]:
        """Return the cost of an episode's last step, (budgets,), from which the cost critics learn.

        The mean over the steps is the percentage kept, as in the paper. If only the excess is charged, it is in tens of
        percent, and a plan within the budget costs nothing, so that a multiplier that is still high does not drive the
        policy far below.
        """
        percent = self.percent(candidate)
        if self._excess:
            return np.asarray(np.maximum(percent - np.array(self.budgets), 0.0) / 10.0)
        return np.asarray(self._steps * percent)


def dense_costs(env: Any) -> list[float]:
    """Return the dense network's cost for each budget; the target if that cost is 0, so that shares are defined."""
    costs = env.costs(env.bounds.dense)
    return [
        costs[budget.name] if costs[budget.name] > 0 else float(budget.target) or 1.0
        for budget in env.budgets
    ]
