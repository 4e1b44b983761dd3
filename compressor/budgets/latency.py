"""Latency budget in milliseconds on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compressor.budgets.base import Budget, BudgetSpec, CostSources, register_budget
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    import numpy.typing as npt

    from compressor.budgets.base import Floats
    from compressor.latency.operators import LatencyCurve


@register_budget
@dataclass(frozen=True)
class LatencyBudget(Budget):
    """Milliseconds for one input, predicted by the device's table.

    Attributes:
        curve: The table's prediction for this space.
        estimated: Whether the table is an estimate; the number must then be labelled as such.
    """

    curve: LatencyCurve
    target: float
    dense: float
    estimated: bool = False
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
        return cls(table.curve(sources.space), spec.limit(dense), dense, table.estimated)

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the predicted milliseconds, (N,) from widths (N, G)."""
        return self.curve(np.atleast_2d(widths))

    @classmethod
    def format(cls, value: float) -> str:
        return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"
