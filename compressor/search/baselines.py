"""Networks that need no search, scored like its candidates: dense, uniform pruning, and the published knapsack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError
from compressor.search.allocation import POWERS, Allocator
from compressor.search.proposals import uniform_widths

if TYPE_CHECKING:
    from compressor.search.environment import PruningEnv, Score

DENSE, UNIFORM, KNAPSACK = "dense", "uniform", "knapsack"


def baselines(env: PruningEnv) -> Iterator[tuple[str, Score]]:
    """Yield the scores of these networks within the environment's budgets; known plans cost nothing.

    The knapsack has the saliency of the channels as its value, to the power that scores best of those that the agents
    begin with, and is not refined. If each price is a call of a user's function, it would need thousands of calls, and
    is left out.
    """
    yield DENSE, env.score(env.bounds.dense)
    with suppress(CompressorError):  # no single ratio meets the budgets
        yield UNIFORM, env.score(uniform_widths(env.bounds))
    if any(isinstance(budget, FunctionBudget) for budget in env.budgets):
        return
    plans = map(Allocator(env).solve_saliency, POWERS)
    yield KNAPSACK, max((env.score(plan) for plan in plans), key=lambda score: score.accuracy)
