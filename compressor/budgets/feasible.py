"""Widths that keep all budgets, if such can be found, and which budgets stand in the way if not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.budgets.base import Budget
    from compressor.pruning.space import PruningSpace

Widths = NDArray[np.int64]

TOLERANCE = 1e-9
"""Share of a target by which a prediction may exceed it: room for a float's last digit, not for a miss."""

PRICED_WIDTHS = 9
"""Widths of a group that are considered where a budget must build a network for each price."""


def choices_for(space: PruningSpace, budgets: Sequence[Budget]) -> tuple[Widths, ...]:
    """The widths of each group that are considered, ascending: all legal ones, fewer where each price is dear."""
    choices = [np.asarray(space.choices(i), dtype=np.int64) for i in range(len(space.groups))]
    if any(isinstance(budget, FunctionBudget) for budget in budgets):
        choices = [_thinned(legal) for legal in choices]
    return tuple(choices)


def _thinned(legal: Widths) -> Widths:
    """At most `PRICED_WIDTHS` of a group's legal widths, evenly spaced, both ends among them."""
    at = np.linspace(0, len(legal) - 1, min(PRICED_WIDTHS, len(legal))).round().astype(np.int64)
    return legal[np.unique(at)]


def shares(budgets: Sequence[Budget], widths: Widths) -> NDArray[np.float64]:
    """For widths (N, G), predicted / target of each budget, (budgets, N)."""
    found = [np.asarray(budget.predict(widths), dtype=np.float64) / budget.target for budget in budgets]
    return np.stack(found) if found else np.zeros((1, len(widths)))


def excess(budgets: Sequence[Budget], widths: Widths) -> NDArray[np.float64]:
    """For widths (N, G), the largest predicted / target of the budgets, (N,): 1 or less keeps all."""
    return np.asarray(shares(budgets, widths).max(axis=0))


def kept(budgets: Sequence[Budget], widths: Widths) -> NDArray[np.bool_]:
    """For widths (N, G), whether all budgets are kept, (N,); functions are asked only where the others are."""
    dear = [budget for budget in budgets if isinstance(budget, FunctionBudget)]
    cheap = [budget for budget in budgets if not isinstance(budget, FunctionBudget)]
    keeping = excess(cheap, widths) <= 1.0 + TOLERANCE
    for budget in dear:
        if keeping.any():
            keeping[keeping] = excess([budget], widths[keeping]) <= 1.0 + TOLERANCE
    return keeping


def keeping_widths(choices: Sequence[Widths], dense: Widths, budgets: Sequence[Budget]) -> Widths:
    """Widths (G,) that keep all budgets: the smallest ones, or where these cost too much, the best found.

    No cost need fall with a width: where the smallest network does not do, coordinate descent looks from it and
    from the dense one.

    Raises:
        CompressorError: none were found. Where each budget can be kept alone, the message names two that cannot be
            kept together.
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
                    raise CompressorError(_contradiction(pair, alone, nearest[1]), _LOOSEN)
        budgets, best = missed or list(budgets), alone[id(missed[0])][1] if missed else best
    raise CompressorError(
        f"No widths keep the budgets: the best network found needs {_costs(budgets, best)}.",
        "Loosen the budget, or lower the minimum widths.",
    )


_LOOSEN = "Loosen one of the two."


def _contradiction(pair: Sequence[Budget], alone: dict[int, tuple[bool, Widths]], nearest: Widths) -> str:
    first, second = pair
    texts = []
    for own, other in ((first, second), (second, first)):
        widths = alone[id(own)][1]
        texts.append(
            f"a network that keeps {own.name} <= {_amount(own, own.target)} has {other.name} "
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
        f"{_amount(b, _cost(b, widths))} of {b.name} (asked for {b.target:.6g})" for b in budgets
    )


def _amount(budget: Budget, value: float) -> str:
    return f"{value:.6g} {budget.unit}".rstrip()


def _search(choices: Sequence[Widths], dense: Widths, budgets: Sequence[Budget]) -> tuple[bool, Widths]:
    """Whether widths were found that keep the budgets, and the best ones found."""
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
    """Coordinate descent on the excess, until nothing improves; where prices are dear, until all budgets are kept."""
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
