"""Widths at the budget that need no agent: uniform ones, random ones, and those near given ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.search.bounds import ActionBounds, LegalWidths, Widths
    from compressor.search.environment import Observation, PruningEnv
    from compressor.search.records import Policy

_SCANS = (65, 16, 16, 16)
"""Number of factors in each scan; all scans together resolve the factor to a few millionths."""

_EXPENSIVE_SCANS = (9, 5)
"""The same if each price is a call of a user's function: 14 calls, which resolve the factor to a thirtieth."""


_HALVINGS = 14

_FULL = 0.99
"""Share of a budget from which on widths are not grown further."""

_GROWN = 1 / 16
"""Share of a group's dense width by which it grows, at least, if its widths are closer than that."""


def scaled_widths(env: PruningEnv, shape: NDArray[np.float64]) -> Widths:
    """Return the widest legal network whose kept ratios are proportional to `shape` and that meets all budgets.

    Args:
        shape: (G,), above 0; ratios above 1 are dense. Blocks, which may follow, stay present or removed as they are.

    Returns:
        Legal widths (G,); the cheapest known ones if no factor meets the budgets.
    """
    widths = _scaled(env.bounds, shape)
    return env.bounds.cheapest.copy() if widths is None else widths


def uniform_widths(bounds: ActionBounds) -> Widths:
    """Return the same ratio for every group, as large as the budgets allow, each width rounded to a legal one.

    All blocks stay.

    Raises:
        CompressorError: No single ratio meets the budgets, though other widths do.
    """
    widths = _scaled(bounds, np.ones(len(bounds.dense)))
    if widths is None:
        raise CompressorError(
            "No single ratio for all groups keeps the budgets, though other widths do.",
            "Choose another agent, such as --agent knapsack.",
        )
    return widths


def uniform_or_cheapest(env: PruningEnv) -> Widths:
    """Return `uniform_widths`; if no single ratio meets the budgets because costs jump, the cheapest known widths."""
    return scaled_widths(env, np.ones(len(env.bounds.dense)))


def _scaled(bounds: ActionBounds, shape: NDArray[np.float64]) -> Widths | None:
    """Scan the factors on finer and finer grids, and return the widths of the largest one that meets the budgets."""
    groups = bounds.groups
    low, high = 0.0, float(1.0 / shape[:groups].min())
    best: Widths | None = None
    expensive = any(isinstance(budget, FunctionBudget) for budget in bounds.budgets)
    for number in _EXPENSIVE_SCANS if expensive else _SCANS:
        factors = np.linspace(low, high, number)
        wanted = np.clip(factors[:, None] * shape, 0.0, 1.0) * bounds.dense
        wanted[:, groups:] = shape[groups:]
        candidates = bounds.round(wanted)
        kept = np.flatnonzero(bounds.feasible(candidates))
        if not len(kept):
            break
        largest = int(kept[-1])
        best = candidates[largest]
        if largest == number - 1:
            break
        low, high = float(factors[largest]), float(factors[largest + 1])
    return best


def fitted_widths(env: PruningEnv, shape: NDArray[np.float64]) -> Widths:
    """Return `scaled_widths`, grown to use the budgets; the ratios are proportional to `shape` up to the last steps."""
    return grown(env, scaled_widths(env, shape))


def grown(env: PruningEnv, widths: Widths) -> Widths:
    """Return widths (G,) in which no group has room for another step within the budgets, or one budget is used up.

    One factor for all ratios stops where the first group's next step is too expensive, and leaves the rest unused: a
    tenth of the latency where steps are of a quarter of a group. The group that grows the least in proportion is first.
    """
    if any(isinstance(budget, FunctionBudget) for budget in env.budgets):
        return widths
    found, groups = widths.copy(), np.arange(len(widths))
    while env.bounds.excess(found[None])[0] < _FULL:
        rows = np.tile(found, (len(groups), 1))
        for group, choices in enumerate(env.bounds.choices):
            place = np.searchsorted(choices, max(found[group] + 1, found[group] + _GROWN * env.bounds.dense[group]))
            rows[group, group] = choices[min(int(place), len(choices) - 1)]
        wider = rows[groups, groups]
        growth = np.divide(wider, widths, out=np.full(len(groups), np.inf), where=widths > 0)
        growth[(wider <= found) | ~env.bounds.feasible(rows)] = np.inf
        if not np.isfinite(growth).any():
            break
        found = rows[int(growth.argmin())]
    return found


def near_widths(
    env: PruningEnv, widths: Widths, generator: np.random.Generator, spread: float, share: float
) -> Widths:
    """Return random widths near given ones, fitted to the budgets.

    Args:
        spread: Standard deviation of the change's logarithm; 0.3 changes a ratio by about a third.
        share: Share of the groups that change, before scaling changes all.
    """
    change = spread * generator.standard_normal(len(widths)) * (generator.random(len(widths)) < share)
    shape = _flipped(env, (widths / env.bounds.dense)[None], generator)[0]
    return fitted_widths(env, shape * np.exp(change * (np.arange(len(widths)) < env.bounds.groups)))


def near_rows(
    env: PruningEnv, centres: Widths, generator: np.random.Generator, spread: float, number: int
) -> Widths:
    """Return many random plans near each of given ones, scaled to the budgets by halving.

    Args:
        centres: Widths (C, G).
        spread: As for `near_widths`; each plan uses 0.5 to 1.5 times it, and any share of the groups.
        number: Number of plans drawn near each of the given ones.

    Returns:
        Different widths (N, G), N <= C * `number`.
    """
    shapes = np.vstack([_near_shapes(env, centre, generator, spread, number) for centre in centres])
    groups, found = env.bounds.groups, np.tile(env.bounds.cheapest, (len(shapes), 1))
    low, high = np.zeros(len(shapes)), 1.0 / shapes[:, :groups].min(axis=1)
    for _ in range(_HALVINGS):
        factors = (low + high) / 2
        wanted = np.clip(factors[:, None] * shapes, 0.0, 1.0) * env.bounds.dense
        wanted[:, groups:] = shapes[:, groups:]
        rows = env.bounds.round(wanted)
        kept = env.bounds.feasible(rows)
        found[kept] = rows[kept]
        low, high = np.where(kept, factors, low), np.where(kept, high, factors)
    return np.unique(found, axis=0)


def _near_shapes(
    env: PruningEnv, widths: Widths, generator: np.random.Generator, spread: float, number: int
) -> NDArray[np.float64]:
    """Return kept ratios (`number`, G) near those of widths (G,), before they are scaled to the budgets."""
    size = (number, len(widths))
    change = generator.standard_normal(size) * (
        generator.random(size) < generator.uniform(0.1, 1.0, (number, 1))
    )
    change[:, env.bounds.groups :] = 0.0
    shapes = widths / env.bounds.dense * np.exp(change * spread * generator.uniform(0.5, 1.5, (number, 1)))
    return _flipped(env, shapes, generator)


def _flipped(
    env: PruningEnv, shapes: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return kept ratios (N, columns) in which blocks are removed or put back: one of a row's, on average."""
    blocks = shapes.shape[1] - env.bounds.groups
    if not blocks:
        return shapes
    flips = generator.random((len(shapes), blocks)) < 1.0 / blocks
    shapes = shapes.copy()
    shapes[:, env.bounds.groups :] = np.abs(shapes[:, env.bounds.groups :] - flips)
    return shapes


def random_widths(env: PruningEnv, generator: np.random.Generator) -> Widths:
    """Return random widths at the budget: uniform ones, changed by a random amount that itself is random.

    Of the blocks, up to half are removed.
    """
    spread, start = float(generator.uniform(0.1, 0.8)), env.bounds.dense
    if blocks := len(start) - env.bounds.groups:
        start = start.copy()
        start[env.bounds.groups :] = generator.random(blocks) >= generator.uniform(0.0, 0.5)
    return near_widths(env, start, generator, spread=spread, share=1.0)


def follow(widths: Widths) -> Policy:
    """Return the policy that requests these widths (G,) in one episode; the bounds may change them."""
    wanted = iter(np.asarray(widths).tolist())

    def policy(observation: Observation, legal: LegalWidths) -> float:
        return 1.0 - float(next(wanted)) / legal.dense

    return policy


def followed(env: PruningEnv, widths: Widths) -> Widths:
    """Return the widths that an episode of `follow(widths)` ends with, without playing it."""
    found = env.bounds.dense.copy()
    for step, wanted in enumerate(np.asarray(widths).tolist()):
        legal = env.bounds.legal(step, found)
        ratio = float(np.float32(1.0 - float(wanted) / legal.dense))  # actions are float32
        found[step] = legal.width(legal.clip(ratio))
    return found
