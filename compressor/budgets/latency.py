"""Latency budget in milliseconds on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.base import Budget, Floats
from compressor.latency.curve import LatencyCurve


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

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the predicted milliseconds, (N,) from widths (N, G)."""
        return self.curve(np.atleast_2d(widths))
