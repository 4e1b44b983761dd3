"""Budgets with exact counts: multiply-adds, parameters, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.base import Budget, Floats

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes per weight or activation, by precision."""


@dataclass(frozen=True)
class MacsBudget(Budget):
    """Multiply-adds of one input as fvcore counts them: one multiply-add is one."""

    space: PruningSpace
    target: float
    dense: float
    name: str = "macs"
    unit: str = "MACs"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the multiply-adds; they equal fvcore's count of the built network."""
        return np.asarray(self.space.macs(np.atleast_2d(widths)), dtype=np.float64)


@dataclass(frozen=True)
class ParamsBudget(Budget):
    """Parameters of the network."""

    space: PruningSpace
    target: float
    dense: float
    name: str = "params"
    unit: str = "params"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return the parameter count; it equals that of the built network."""
        return np.asarray(self.space.params(np.atleast_2d(widths)), dtype=np.float64)


@dataclass(frozen=True)
class MemoryBudget(Budget):
    """Peak memory of weights and live activations for one image, in bytes.

    The input of a residual branch is counted until its addition (`pruning.counts.Activations`). The runtime's
    workspace and code are not counted, so that the process needs more.
    """

    space: PruningSpace
    target: float
    dense: float
    precision: str = "fp32"
    name: str = "memory"
    unit: str = "bytes"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Return bytes per element x (parameters + peak number of live activation elements)."""
        return memory_bytes(self.space, widths, self.precision)


def memory_bytes(space: PruningSpace, widths: npt.NDArray[Any], precision: str = "fp32") -> Floats:
    """Return the bytes that `MemoryBudget` counts, (N,) from widths (N, G)."""
    rows = np.atleast_2d(np.asarray(widths, dtype=np.int64))
    elements = np.asarray(space.activations(rows), dtype=np.float64) + np.asarray(space.params(rows))
    return np.asarray(BYTES[precision] * elements, dtype=np.float64)
