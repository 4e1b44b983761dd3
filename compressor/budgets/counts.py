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
    """Bytes of the weights and of the largest layer's input and output for one image.

    A simple measure, and honest about it: activations that a residual branch keeps alive meanwhile, the
    runtime's own workspace and its code are not in it, so the process will take more. It orders candidates
    rightly and bounds what the network itself must hold.
    """

    space: PruningSpace
    target: float
    dense: float
    precision: str = "fp32"
    name: str = "memory"
    unit: str = "bytes"

    def predict(self, widths: npt.NDArray[Any]) -> Floats:
        """`bytes of an element x (parameters + largest of a layer's input and output elements)`."""
        return memory_bytes(self.space, widths, self.precision)


def memory_bytes(space: PruningSpace, widths: npt.NDArray[Any], precision: str = "fp32") -> Floats:
    """Bytes that `MemoryBudget` counts, (N,) from widths (N, G)."""
    rows = np.atleast_2d(np.asarray(widths, dtype=np.int64))
    peak = np.zeros(len(rows))
    for layer in space.layers:
        inputs = np.asarray(layer.in_channels(rows), dtype=np.float64) * float(np.prod(layer.in_hw))
        outputs = np.asarray(layer.out_channels(rows), dtype=np.float64) * float(np.prod(layer.out_hw))
        peak = np.maximum(peak, inputs + outputs)
    return BYTES[precision] * (peak + np.asarray(space.params(rows), dtype=np.float64))
