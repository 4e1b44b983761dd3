"""A network's latency as a function of the widths of its groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

Floats = npt.NDArray[np.float64]

Operators = Callable[[Floats, Floats, bool], Floats]
"""(c_in, c_out, upper) -> milliseconds, all arrays (N, operators); `upper` asks for a non-decreasing bound
from above."""


class LatencyCurve:
    """Predicted milliseconds of any candidate of one space.

    Args:
        space: Its layers say how channels follow from widths.
        operators: The time of each operator from its channels.
        total: The whole network's time from the sum of the operators' times, never decreasing.
    """

    def __init__(self, space: PruningSpace, operators: Operators, total: Callable[[Floats], Floats]) -> None:
        self._inputs = _matrix([layer.in_channels for layer in space.layers], len(space.groups))
        self._outputs = _matrix([layer.out_channels for layer in space.layers], len(space.groups))
        self._operators = operators
        self._total = total
        self.names: tuple[str, ...] = tuple(layer.name for layer in space.layers)

    def __call__(self, widths: npt.ArrayLike) -> Floats:
        """Milliseconds (N,) from widths (N, G)."""
        return self._total(self.operators(widths).sum(axis=1))

    def envelope(self, widths: npt.ArrayLike) -> Floats:
        """A bound from above, (N,) from (N, G), that never falls when a width grows.

        Where channels fit the runtime's blocks it equals the prediction; elsewhere it counts the slower
        kernels in.
        """
        return self._total(self.operators(widths, upper=True).sum(axis=1))

    def operators(self, widths: npt.ArrayLike, *, upper: bool = False) -> Floats:
        """Milliseconds of each operator before the whole-network correction, (N, layers) from (N, G)."""
        rows = np.atleast_2d(np.asarray(widths, dtype=np.float64))
        return self._operators(_channels(rows, self._inputs), _channels(rows, self._outputs), upper)


def _matrix(functions: Sequence[Any], groups: int) -> tuple[Floats, Floats]:
    """Affine functions as one matrix (G, layers) and one constant (layers,)."""
    matrix, constant = np.zeros((groups, len(functions))), np.zeros(len(functions))
    for layer, function in enumerate(functions):
        constant[layer] = function.constant
        for group, times in function.terms:
            matrix[group, layer] += times
    return matrix, constant


def _channels(rows: Floats, affine: tuple[Floats, Floats]) -> Floats:
    matrix, constant = affine
    return np.asarray(rows @ matrix + constant)
