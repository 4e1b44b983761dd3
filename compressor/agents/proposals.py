"""Widths at the budget, without an agent: uniform ones, random ones, and those near given ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.agents.search_run import Policy
    from compressor.env.bounds import LegalWidths, Widths
    from compressor.env.environment import Observation, PruningEnv

_BISECTIONS = 24
_SCANNED = 65


def scaled_widths(env: PruningEnv, shape: NDArray[np.float64]) -> Widths:
    """The widest legal network whose kept ratios are proportional to `shape` and that keeps all budgets.

    Args:
        shape: (G,), above 0; ratios above 1 are dense.

    Returns:
        (G,) legal widths; the cheapest ones known where no factor keeps the budgets.
    """
    widths = _scaled(env, shape)
    return env.bounds.cheapest.copy() if widths is None else widths


def uniform_widths(env: PruningEnv) -> Widths:
    """The same ratio for every group, as large as the budgets allow, each width rounded to a legal one.

    Raises:
        CompressorError: no single ratio keeps the budgets, though other widths do.
    """
    widths = _scaled(env, np.ones(len(env.bounds.dense)))
    if widths is None:
        raise CompressorError(
            "No single ratio for all groups keeps the budgets, though other widths do.",
            "Choose another agent.",
        )
    return widths


def _scaled(env: PruningEnv, shape: NDArray[np.float64]) -> Widths | None:
    """By bisection; where costs rise and fall so much that its lower end is dear, by a scan first."""
    dense = env.bounds.dense

    def at(factor: float) -> Widths:
        return np.asarray(env.space.round(np.clip(factor * shape, 0.0, 1.0) * dense), dtype=np.int64)

    def feasible(factor: float) -> bool:
        return bool(env.bounds.feasible(at(factor))[0])

    low, high = 0.0, float(1.0 / shape.min())
    if feasible(high):
        return at(high)
    if not feasible(low):
        factors = np.linspace(0.0, high, _SCANNED)
        kept = env.bounds.feasible(np.stack([at(float(factor)) for factor in factors]))
        if not kept.any():
            return None
        low = float(factors[kept][-1])
        high = low + high / (_SCANNED - 1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return at(low)


def near_widths(
    env: PruningEnv, widths: Widths, generator: np.random.Generator, spread: float, share: float
) -> Widths:
    """Random widths near given ones, scaled to the budgets.

    Args:
        spread: standard deviation of the change's logarithm; 0.3 changes a ratio by about a third.
        share: share of the groups that change, before scaling changes all.
    """
    change = spread * generator.standard_normal(len(widths)) * (generator.random(len(widths)) < share)
    return scaled_widths(env, widths / env.bounds.dense * np.exp(change))


def random_widths(env: PruningEnv, generator: np.random.Generator) -> Widths:
    """Random widths at the budget: uniform ones, changed by a random amount that itself is random."""
    return near_widths(env, env.bounds.dense, generator, spread=float(generator.uniform(0.1, 0.8)), share=1.0)


def follow(widths: Widths) -> Policy:
    """The policy that asks for these widths (G,) in one episode; the bounds may move them."""
    wanted = iter(np.asarray(widths).tolist())

    def policy(observation: Observation, legal: LegalWidths) -> float:
        return 1.0 - float(next(wanted)) / legal.dense

    return policy
