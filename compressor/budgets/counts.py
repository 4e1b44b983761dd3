"""Budgets that are counted: multiply-adds, parameters, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.budgets.base import Budget, Floats

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of a weight or an activation."""


@dataclass(frozen=True)
class MacsBudget(Budget):
    """Multiply-adds of one input as fvcore counts them: one multiply-add is one."""

    space: PruningSpace
    target: float
    dense: float
    name: str = "macs"
    unit: str = "MACs"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """Exact: equals fvcore's count of the built network."""
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
        """Exact: equals the parameter count of the built network."""
        return np.asarray(self.space.params(np.atleast_2d(widths)), dtype=np.float64)


@dataclass(frozen=True)
class MemoryBudget(Budget):
    """Bytes of the weights and of the activations that are alive at once, at most, for one image.

    What a residual branch keeps for its addition is counted while it is kept (`compressor.pruning.liveness`); the
    runtime's own workspace and its code are not, so the process will take more.
    """

    space: PruningSpace
    target: float
    dense: float
    precision: str = "fp32"
    name: str = "memory"
    unit: str = "bytes"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """`bytes of an element x (parameters + most elements of activations alive at once)`."""
        return memory_bytes(self.space, widths, self.precision)


def memory_bytes(space: PruningSpace, widths: npt.NDArray[Any], precision: str = "fp32") -> Floats:
    """Bytes that `MemoryBudget` counts, (N,) from widths (N, G)."""
    rows = np.atleast_2d(np.asarray(widths, dtype=np.int64))
    elements = np.asarray(space.activations(rows), dtype=np.float64) + np.asarray(space.params(rows))
    return np.asarray(BYTES[precision] * elements, dtype=np.float64)
