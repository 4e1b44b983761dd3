"""The limits of a run in absolute numbers, and widths that meet all of them, if there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.budgets.base import Budget, BudgetSpec, CachedValues, CostSources, budget_class
from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace

Widths = NDArray[np.int64]

TOLERANCE = 1e-9
"""Relative tolerance of a target, for floating point rounding."""

MAX_EVALUATED_WIDTHS = 9
"""Widths per group that are considered if a budget must build a network for each evaluation."""


def resolve(
    specs: Sequence[BudgetSpec],
    space: PruningSpace,
    table: LatencyTable | None = None,
    callers: Mapping[str, CachedValues] | None = None,
    precision: str = "fp32",
) -> list[Budget]:
    """Return budgets with absolute limits, in the order of `specs`.

    Args:
        specs: Requested budgets; shares refer to the dense network's cost.
        space: Provides the counts of the dense network and of every candidate.
        table: Latency table of the device; required for a latency budget.
        callers: Cached values of functions and of energy, by name; missing ones are created.
        precision: Precision of the device, for the memory budget.

    Raises:
        CompressorError: A cost is limited twice, a latency budget has no table, or a user-defined function fails.
    """
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise CompressorError(f"The budget {name} is given twice.", "Give each cost one limit.")
    sources = CostSources(space, table, precision, callers or {})
    kinds = [FunctionBudget if spec.is_function else budget_class(spec.name) for spec in specs]
    return [kind.create(spec, sources) for kind, spec in zip(kinds, specs, strict=True)]


def reachable(budgets: Sequence[Budget], space: PruningSpace, other_agent: str | None = None) -> None:
    """Refuse budgets that even the smallest network of the space misses, or that no network was found to meet.

    Args:
        budgets: Budgets with absolute limits.
        space: Pruning space of the dense network.
        other_agent: Agent that removes blocks, if that of the recipe does not.

    Raises:
        CompressorError: The message gives the limit, the reachable value, the dense value, and a remedy.
    """
    smallest = np.asarray(space.smallest_row)[None]
    counted = [budget for budget in budgets if not isinstance(budget, FunctionBudget)]
    missed = [(budget, float(budget.predict(smallest)[0])) for budget in counted]
    missed = [(budget, least) for budget, least in missed if least > budget.target * (1 + TOLERANCE)]
    if not missed:
        if len(counted) < len(budgets):  # a function's cost may fall where a width grows: a search is needed
            keeping_widths(choices_for(space, budgets), np.asarray(space.dense_row), budgets)
        return
    keeps_blocks = bool(not space.depth and space.blocks)
    smallest_is = "with all blocks" if keeps_blocks else "of this space"
    flags = f"{f'--agent {other_agent} ' if other_agent else ''}--set pruning.depth=auto"
    problems = "; ".join(
        f"{budget.title} <= {budget.format(budget.target)} was requested, the smallest network {smallest_is} needs "
        f"{budget.format(least)} ({least / budget.dense:.0%} of the dense {budget.format(budget.dense)})"
        for budget, least in missed
    )
    raise CompressorError(
        f"The budget cannot be reached: {problems}.",
        "Raise the budget, allow smaller widths (pruning.min_share, --granularity 1), "
        f"{f'let whole blocks go ({flags}), ' if keeps_blocks else ''}or start from a smaller model.",
    )


def choices_for(space: PruningSpace, budgets: Sequence[Budget]) -> tuple[Widths, ...]:
    """Return the widths to consider for each group, ascending: all legal ones, fewer if evaluations are expensive.

    If a search may remove blocks, each of them follows with 0 and 1.
    """
    choices = [np.asarray(space.choices(i), dtype=np.int64) for i in range(space.columns)]
    if any(isinstance(budget, FunctionBudget) for budget in budgets):
        choices = [_thinned(legal) for legal in choices]
    return tuple(choices)


def _thinned(legal: Widths) -> Widths:
    """Return at most `MAX_EVALUATED_WIDTHS` of a group's legal widths, evenly spaced, both ends included."""
    at = np.linspace(0, len(legal) - 1, min(MAX_EVALUATED_WIDTHS, len(legal))).round().astype(np.int64)
    return legal[np.unique(at)]


def shares(budgets: Sequence[Budget], widths: Widths) -> NDArray[np.float64]:
    """Return predicted / target of each budget, (budgets, N), for widths (N, G)."""
    found = [np.asarray(budget.predict(widths), dtype=np.float64) / budget.target for budget in budgets]
    return np.stack(found) if found else np.zeros((1, len(widths)))


def excess(budgets: Sequence[Budget], widths: Widths) -> NDArray[np.float64]:
    """Return the largest predicted / target of the budgets, (N,), for widths (N, G); at most 1 if all are met."""
    return np.asarray(shares(budgets, widths).max(axis=0))


def kept(budgets: Sequence[Budget], widths: Widths) -> NDArray[np.bool_]:
    """Return whether all budgets are met, (N,), for widths (N, G); functions are called only if the others are met."""
    expensive = [budget for budget in budgets if isinstance(budget, FunctionBudget)]
    cheap = [budget for budget in budgets if not isinstance(budget, FunctionBudget)]
    keeping = excess(cheap, widths) <= 1.0 + TOLERANCE
    for budget in expensive:
        if keeping.any():
            keeping[keeping] = excess([budget], widths[keeping]) <= 1.0 + TOLERANCE
    return keeping


def keeping_widths(choices: Sequence[Widths], dense: Widths, budgets: Sequence[Budget]) -> Widths:
    """Return widths (G,) that meet all budgets: the smallest ones, or the best found if these miss a budget.

    A cost need not fall with a width. If the smallest network misses a budget, coordinate descent starts from it and
    from the dense network.

    Raises:
        CompressorError: No such widths were found. If each budget can be met alone, the message names two that cannot
            be met together.
    """
    found, best = _search(choices, dense, budgets)
    if found:
        return best
    if len(budgets) > 1:
        alone = {id(budget): _search(choices, dense, [budget]) for budget in budgets}
        missed = [budget for budget in budgets if not alone[id(budget)][0]]
        if not missed:
            for pair in combinations(budgets, 2):
                if not (nearest := _search(choices, dense, pair))[0]:
                    raise CompressorError(_contradiction(pair, alone, nearest[1]), _CONTRADICTION_HINT)
        budgets, best = missed or list(budgets), alone[id(missed[0])][1] if missed else best
    raise CompressorError(
        f"No widths meet the budgets: the best network found needs {_costs(budgets, best)}.",
        "Loosen the budget, or lower the minimum widths.",
    )


_CONTRADICTION_HINT = "Loosen one of the two."


def _contradiction(pair: Sequence[Budget], alone: dict[int, tuple[bool, Widths]], nearest: Widths) -> str:
    first, second = pair
    texts = []
    for own, other in ((first, second), (second, first)):
        widths = alone[id(own)][1]
        texts.append(
            f"a network with {own.name} <= {_amount(own, own.target)} has {other.name} "
            f"{_amount(other, _cost(other, widths))}, where {_amount(other, other.target)} is the limit"
        )
    return (
        f"The budgets {first.name} and {second.name} contradict each other: {'; '.join(texts)}; "
        f"the nearest network found needs {_costs(pair, nearest)}."
    )


def _cost(budget: Budget, widths: Widths) -> float:
    return float(np.asarray(budget.predict(widths[None]))[0])


def _costs(budgets: Sequence[Budget], widths: Widths) -> str:
    return ", ".join(
        f"{_amount(b, _cost(b, widths))} of {b.name} (limit {b.target:.6g})" for b in budgets
    )


def _amount(budget: Budget, value: float) -> str:
    return f"{value:.6g} {budget.unit}".rstrip()


def _search(choices: Sequence[Widths], dense: Widths, budgets: Sequence[Budget]) -> tuple[bool, Widths]:
    """Return whether widths were found that meet the budgets, and the best ones found."""
    smallest: Widths = np.array([legal[0] for legal in choices], dtype=np.int64)
    for widths in (smallest, dense):
        if kept(budgets, widths[None])[0]:
            return True, widths.copy()
    best = smallest
    for start in (smallest, dense):
        found = _descend(choices, start.copy(), budgets)
        if kept(budgets, found[None])[0]:
            return True, found
        best = min(best, found, key=lambda widths: float(excess(budgets, widths[None])[0]))
    return False, best


def _descend(choices: Sequence[Widths], widths: Widths, budgets: Sequence[Budget]) -> Widths:
    """Minimise the excess by coordinate descent until no step improves.

    If evaluations are expensive, it stops as soon as all budgets are met.
    """
    enough = 1.0 if any(isinstance(budget, FunctionBudget) for budget in budgets) else 0.0
    value = float(excess(budgets, widths[None])[0])
    improved = True
    while improved and value > enough:
        improved = False
        for i, legal in enumerate(choices):
            rows = np.repeat(widths[None], len(legal), axis=0)
            rows[:, i] = legal
            costs = excess(budgets, rows)
            if costs.min() < value - TOLERANCE:
                widths, value, improved = rows[int(costs.argmin())], float(costs.min()), True
    return widths
