"""Base class of all budgets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.parse import format_value

Floats = npt.NDArray[np.float64]


class Budget(ABC):
    """A cost and its limit; subclasses are frozen dataclasses, so that `dataclasses.replace` can tighten one.

    Attributes:
        name: `latency`, `macs`, `params`, `memory`, or `package.module:function`.
        unit: Unit of `target`, `dense` and every prediction: ms, MACs, params, bytes, or empty for a function.
        target: Largest allowed cost.
        dense: Cost of the dense network.
    """

    name: str
    unit: str
    target: float
    dense: float

    @abstractmethod
    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the cost of each candidate, (N,) from widths (N, G)."""

    def kept(self, widths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return whether each candidate is within the limit, (N,) from (N, G)."""
        return np.asarray(self.predict(widths) <= self.target)

    def format(self, value: float) -> str:
        """Format a cost for display, such as `4.32 ms`."""
        return format_value(self.name, value)

    def __str__(self) -> str:
        share = self.target / self.dense if self.dense else float("nan")
        return f"{self.name} <= {self.format(self.target)} ({share:.0%} of {self.format(self.dense)})"
