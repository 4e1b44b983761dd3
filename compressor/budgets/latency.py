"""A budget in milliseconds on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.base import Budget, Floats
from compressor.latency.curve import LatencyCurve


@dataclass(frozen=True)
class LatencyBudget(Budget):
    """Milliseconds for one input, as the device's table predicts them.

    Attributes:
        curve: The table's prediction for this space.
        estimated: Whether the table is an estimate; the number must then be called one.
    """

    curve: LatencyCurve
    target: float
    dense: float
    estimated: bool = False
    name: str = "latency"
    unit: str = "ms"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Predicted milliseconds."""
        return self.curve(np.atleast_2d(widths))
