"""Resolves requested budgets to absolute limits, and checks that some network can meet them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compressor.budgets.base import Budget
from compressor.budgets.counts import MacsBudget, MemoryBudget, ParamsBudget, memory_bytes
from compressor.budgets.energy import EnergyBudget, EnergyMeter, find_counters
from compressor.budgets.feasible import choices_for, keeping_widths
from compressor.budgets.function import CachedValues, FunctionBudget, FunctionCaller
from compressor.budgets.latency import LatencyBudget
from compressor.budgets.parse import BudgetSpec
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace


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
    return [_resolved(spec, space, table, callers or {}, precision) for spec in specs]


def _resolved(
    spec: BudgetSpec,
    space: PruningSpace,
    table: LatencyTable | None,
    callers: Mapping[str, CachedValues],
    precision: str,
) -> Budget:
    if spec.is_function:
        caller = callers.get(spec.name) or FunctionCaller(spec.name, space)
        dense = caller.value(tuple(space.dense_widths.tolist()))
        target = _target(spec, dense)
        if target <= 0:
            raise CompressorError(
                f"--budget {spec.text}: the dense network's value is {dense:g}, so that a share of it is not a limit.",
                f"Write an absolute limit: {spec.name}<=VALUE.",
            )
        return FunctionBudget(caller, target, dense, spec.name)
    if spec.name == "energy":
        meter = callers.get(spec.name) or EnergyMeter(space, find_counters("local"))
        dense = meter.value(tuple(space.dense_widths.tolist()))
        return EnergyBudget(meter, _target(spec, dense), dense)
    if spec.name == "latency":
        if table is None:
            raise CompressorError(
                "A latency budget needs a latency table.", "Give --device, or use --flops instead."
            )
        dense = table.dense_ms(space)
        return LatencyBudget(table.curve(space), _target(spec, dense), dense, table.estimated)
    everything = np.asarray(space.dense_widths)[None]
    if spec.name == "memory":
        dense = float(memory_bytes(space, everything, precision)[0])
        return MemoryBudget(space, _target(spec, dense), dense, precision)
    kinds: dict[str, Callable[..., Budget]] = {"macs": MacsBudget, "params": ParamsBudget}
    dense = float(getattr(space, spec.name)(everything)[0])
    return kinds[spec.name](space, _target(spec, dense), dense)


def _target(spec: BudgetSpec, dense: float) -> float:
    return spec.value * dense if spec.relative else spec.value


def reachable(budgets: Sequence[Budget], space: PruningSpace) -> None:
    """Refuse budgets that even the smallest network of the space misses, or that no network was found to meet.

    Raises:
        CompressorError: The message gives the limit, the reachable value, the dense value, and a remedy.
    """
    smallest = np.asarray(space.min_widths)[None]
    counted = [budget for budget in budgets if not isinstance(budget, FunctionBudget)]
    missed = [(budget, float(budget.predict(smallest)[0])) for budget in counted]
    missed = [(budget, least) for budget, least in missed if least > budget.target * (1 + 1e-9)]
    if not missed:
        if len(counted) < len(
            budgets
        ):  # a function's cost may fall where a width grows: a search is needed
            keeping_widths(choices_for(space, budgets), np.asarray(space.dense_widths), budgets)
        return
    problems = "; ".join(
        f"{budget.name} <= {budget.format(budget.target)} was requested, the smallest network of this space needs "
        f"{budget.format(least)} ({least / budget.dense:.0%} of the dense {budget.format(budget.dense)})"
        for budget, least in missed
    )
    raise CompressorError(
        f"The budget cannot be reached: {problems}.",
        "Raise the budget, allow smaller widths (pruning.min_share, --granularity 1), or start from a smaller model.",
    )
