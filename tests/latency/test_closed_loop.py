"""The closed loop: search by the table, measure, refit, search on; with devices that do not keep to their table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from compressor.budgets.base import parse_budget
from compressor.budgets.costs import LatencyBudget
from compressor.budgets.limits import reachable, resolve
from compressor.core.errors import CompressorError
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace

Truth = Callable[[np.ndarray], np.ndarray]


def search(space: PruningSpace, table: LatencyTable, target: float) -> np.ndarray:
    """The widest of many uniform candidates that the table lets through."""
    candidates = np.stack([space.round(space.dense_widths * share) for share in np.linspace(0.02, 1, 200)])
    fits = table.curve(space)(candidates) <= target
    return candidates[np.flatnonzero(fits)[-1]] if fits.any() else candidates[0]


def rounds(
    space: PruningSpace, table: LatencyTable, target: float, device: Callable[[np.ndarray], float]
) -> tuple[int, float]:
    """How many rounds it took to keep the target as measured, and the time measured last."""
    for count in range(1, 9):
        widths = search(space, table, target)
        measured = device(widths)
        if measured <= target:
            return count, measured
        predicted = float(table.curve(space)(widths[None])[0])
        table = table.refit([(predicted, measured)])
        reachable([_budget(space, table, target)], space)
    raise AssertionError(f"missed {target} ms eight times, at last by {measured} ms")


def _budget(space: PruningSpace, table: LatencyTable, target: float) -> LatencyBudget:
    (budget,) = resolve([parse_budget("latency", f"{target}ms")], space, table)
    assert isinstance(budget, LatencyBudget)
    return budget


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8, 0.95])
def test_a_device_slower_than_its_table(
    space: PruningSpace, table: LatencyTable, truth: Truth, share: float
) -> None:
    target = share * 1.5 * float(truth(space.dense_widths)[0])
    count, measured = rounds(space, table, target, lambda widths: 1.5 * float(truth(widths)[0]))
    assert count <= 3
    assert 0.7 * target < measured <= target


def test_a_device_that_keeps_its_table_needs_two_rounds_at_most(
    space: PruningSpace, table: LatencyTable, truth: Truth
) -> None:
    target = 0.6 * float(truth(space.dense_widths)[0])
    count, measured = rounds(space, table, target, lambda widths: float(truth(widths)[0]))
    assert count <= 2
    assert measured > 0.8 * target


def test_a_noisy_device(space: PruningSpace, table: LatencyTable, truth: Truth) -> None:
    rng = np.random.default_rng(0)
    target = 0.7 * float(truth(space.dense_widths)[0])

    def device(widths: np.ndarray) -> float:
        return float(np.median(truth(widths)[0] * (1 + 0.2 * rng.standard_normal(51))))

    count, measured = rounds(space, table, target, device)
    assert count <= 4
    assert measured <= target


def test_a_target_out_of_reach_is_said_when_it_is_known(
    space: PruningSpace, table: LatencyTable, truth: Truth
) -> None:
    smallest = float(truth(space.min_widths)[0])
    reachable([_budget(space, table, 1.2 * smallest)], space)
    with pytest.raises(CompressorError, match=r"cannot be reached: latency"):
        rounds(space, table, 1.2 * smallest, lambda widths: 3 * float(truth(widths)[0]))
