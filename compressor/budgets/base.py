"""What every budget has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.parse import format_value

Floats = npt.NDArray[np.float64]


class Budget(ABC):
    """One cost and its limit; subclasses are frozen dataclasses, so that `dataclasses.replace` tightens one.

    Attributes:
        name: `latency`, `macs`, `params`, `memory`, or `package.module:function`.
        unit: Unit of `target`, `dense` and every prediction: ms, MACs, params, bytes, or empty for a function.
        target: The most that is allowed.
        dense: The cost of the network as it is.
    """

    name: str
    unit: str
    target: float
    dense: float

    @abstractmethod
    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """The cost of each candidate, (N,) from widths (N, G)."""

    def kept(self, widths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Whether each candidate is within the limit, (N,) from (N, G)."""
        return np.asarray(self.predict(widths) <= self.target)

    def format(self, value: float) -> str:
        """A cost as a person would write it, such as `4.32 ms`."""
        return format_value(self.name, value)

    def __str__(self) -> str:
        share = self.target / self.dense if self.dense else float("nan")
        return f"{self.name} <= {self.format(self.target)} ({share:.0%} of {self.format(self.dense)})"
