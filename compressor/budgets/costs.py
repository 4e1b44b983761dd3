"""Budgets whose costs are known for all widths at once: multiply-adds, parameters, memory, and predicted latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compressor.budgets.base import Budget, BudgetSpec, CostSources, register_budget
from compressor.core.conditions import UNLOADED, Conditions
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    import numpy.typing as npt

    from compressor.budgets.base import Floats
    from compressor.latency.operators import LatencyCurve
    from compressor.pruning.space import PruningSpace

BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "mixed": 4}
"""Bytes per weight or activation, by precision; in mixed precision the most, as for layers in FP32."""
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_COUNTS = {
    letter + kind: scale for letter, scale in _SCALES.items() for kind in ("", "macs", "flops", "params")
}
del _COUNTS[""]  # a plain number is more often a mistake than a count


@dataclass(frozen=True)
class _Count(Budget):
    space: PruningSpace
    target: float
    dense: float
    suffix: ClassVar[str] = ""
    units: ClassVar[Mapping[str, float]] = _COUNTS

    @classmethod
    def format(cls, value: float) -> str:
        for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= scale:
                return f"{value / scale:.3g} {letter}{cls.suffix}".rstrip()
        return f"{value:.0f} {cls.suffix}".rstrip()


@register_budget
@dataclass(frozen=True)
class MacsBudget(_Count):
    """Multiply-adds of one input as fvcore counts them: one multiply-add is one."""

    name: str = "macs"
    unit: str = "MACs"
    how = "counted"
    suffix = "MACs"
    example = "2G, 300M, 50% or 0.5x"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the multiply-adds; they equal fvcore's count of the built network."""
        return np.asarray(self.space.macs(np.atleast_2d(widths)), dtype=np.float64)


@register_budget
@dataclass(frozen=True)
class ParamsBudget(_Count):
    """Parameters of the network."""

    name: str = "params"
    unit: str = "params"
    how = "counted"
    example = "8M, 500K, 30% or 0.3x"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the parameter count; it equals that of the built network."""
        return np.asarray(self.space.params(np.atleast_2d(widths)), dtype=np.float64)


@register_budget
@dataclass(frozen=True)
class MemoryBudget(_Count):
    """Peak memory of weights and live activations for one image, in bytes.

    The input of a residual branch is counted until its addition (`pruning.counts.Activations`). The runtime's
    workspace and code are not counted, so that the process needs more.
    """

    precision: str = "fp32"
    name: str = "memory"
    unit: str = "bytes"
    suffix = "B"
    units: ClassVar[Mapping[str, float]] = {
        "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30
    }  # fmt: skip
    example = "20MB, 512KB, 16MiB, 50% or 0.5x"

    @classmethod
    def create(cls, spec: BudgetSpec, sources: CostSources) -> MemoryBudget:
        """Return the budget, counted in the precision of the device."""
        every = cls(sources.space, np.inf, np.nan, sources.precision)
        dense = float(every.predict(sources.space.dense_widths)[0])
        return dataclasses.replace(every, target=spec.limit(dense), dense=dense)

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return bytes per element x (parameters + peak number of live activation elements), (N,) from (N, G)."""
        rows = np.atleast_2d(np.asarray(widths, dtype=np.int64))
        elements = np.asarray(self.space.activations(rows), dtype=np.float64) + np.asarray(self.space.params(rows))
        return np.asarray(BYTES[self.precision] * elements, dtype=np.float64)


@register_budget
@dataclass(frozen=True)
class LatencyBudget(Budget):
    """Milliseconds of one run, of a batch, predicted by the device's table.

    Attributes:
        curve: The table's prediction for this space.
        estimated: Whether the table is an estimate; the number must then be labelled as such.
        conditions: Batch and streams of the table; it predicts medians.
    """

    curve: LatencyCurve
    target: float
    dense: float
    estimated: bool = False
    conditions: Conditions = UNLOADED
    name: str = "latency"
    unit: str = "ms"
    how = "measured"
    units: ClassVar[Mapping[str, float]] = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
    example = "5ms, 800us, 50% or 0.5x"

    @classmethod
    def create(cls, spec: BudgetSpec, sources: CostSources) -> LatencyBudget:
        """Return the budget; a share refers to the table's prediction for the dense network."""
        table = sources.table
        if table is None:
            raise CompressorError(
                "A latency budget needs a latency table.", "Give --device, or use --flops instead."
            )
        dense = table.dense_ms(sources.space)
        conditions = Conditions(table.fields.batch, streams=table.fields.streams)
        return cls(table.curve(sources.space), spec.limit(dense), dense, table.estimated, conditions)

    @property
    def title(self) -> str:
        return self.conditions.title

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the predicted milliseconds, (N,) from widths (N, G)."""
        return self.curve(np.atleast_2d(widths))

    @classmethod
    def format(cls, value: float) -> str:
        return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"
