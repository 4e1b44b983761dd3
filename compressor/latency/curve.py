"""A network's latency as a function of the widths of its groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

Floats = npt.NDArray[np.float64]

Operators = Callable[[Floats, Floats], Floats]
"""(c_in, c_out) -> milliseconds, all arrays (N, operators)."""

Total = Callable[[Floats, Floats, Floats], Floats]
"""(sum of operators, c_in, c_out) -> milliseconds of whole networks, (N,)."""


class LatencyCurve:
    """Predicted milliseconds of any candidate of one space.

    Args:
        space: Its layers define how channels follow from widths.
        operators: The time of each operator from its channels.
        total: The whole network's time from the sum of the operators' times (N,) and their input and output
            channels, each (N, layers).
    """

    def __init__(self, space: PruningSpace, operators: Operators, total: Total) -> None:
        self._inputs = _matrix([layer.in_channels for layer in space.layers], len(space.groups))
        self._outputs = _matrix([layer.out_channels for layer in space.layers], len(space.groups))
        self._operators = operators
        self._total = total
        self.names: tuple[str, ...] = tuple(layer.name for layer in space.layers)

    def __call__(self, widths: npt.ArrayLike) -> Floats:
        """Milliseconds (N,) from widths (N, G)."""
        c_in, c_out = self._channels(widths)
        return self._total(self._operators(c_in, c_out).sum(axis=1), c_in, c_out)

    def operators(self, widths: npt.ArrayLike) -> Floats:
        """Milliseconds of each operator before the whole-network correction, (N, layers) from (N, G)."""
        return self._operators(*self._channels(widths))

    def _channels(self, widths: npt.ArrayLike) -> tuple[Floats, Floats]:
        rows = np.atleast_2d(np.asarray(widths, dtype=np.float64))
        return _affine(rows, self._inputs), _affine(rows, self._outputs)


def _matrix(functions: Sequence[Any], groups: int) -> tuple[Floats, Floats]:
    """Affine functions as one matrix (G, layers) and one constant (layers,)."""
    matrix, constant = np.zeros((groups, len(functions))), np.zeros(len(functions))
    for layer, function in enumerate(functions):
        constant[layer] = function.constant
        for group, times in function.terms:
            matrix[group, layer] += times
    return matrix, constant


def _affine(rows: Floats, affine: tuple[Floats, Floats]) -> Floats:
    matrix, constant = affine
    return np.asarray(rows @ matrix + constant)
