"""Liveness analysis of activations: the minimum memory that a runtime needs for them.

A tensor is alive from the step that creates it to the last step that reads it. The input of a residual branch is thus
counted until its addition. An elementwise step (activation, batch-norm, addition) writes in place into an input that no
later step reads, as runtimes do. A view shares the memory of its base.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compressor.pruning.atoms import Labels
from compressor.pruning.counts import Affine
from compressor.pruning.groups import Resolved
from compressor.pruning.traffic import Traffic

Size = tuple[int, tuple[Affine, ...]]
"""Elements of a tensor: a constant times channel counts."""


class Activations:
    """Peak number of live activation elements, for any widths.

    Args:
        traffic: Trace of the dense network's activations; slim networks run the same steps.
        resolved: Groups and units of the labels.
    """

    def __init__(self, traffic: Traffic, resolved: Resolved) -> None:
        sizes = [_size(axes, resolved) for axes in traffic.sizes]
        lives = _lives(traffic, sizes)
        self._sizes = list(dict.fromkeys(sizes[piece] for piece in lives))
        column = {size: number for number, size in enumerate(self._sizes)}
        alive = np.zeros((max(1, len(traffic.steps)), len(self._sizes)))
        for piece, (first, last) in lives.items():
            alive[first : last + 1, column[sizes[piece]]] += 1
        self._alive = _largest(np.unique(alive, axis=0))

    def __call__(self, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the peak number of live elements, (N,) from widths (N, G)."""
        elements = np.empty((len(self._sizes), len(widths)))
        for row, (constant, factors) in zip(elements, self._sizes, strict=True):
            row[:] = constant
            for factor in factors:
                row *= factor(widths)
        return np.asarray((self._alive @ elements).max(axis=0), dtype=np.float64)


def _size(axes: list[int | Labels], resolved: Resolved) -> Size:
    constant, factors = 1, []
    for axis in axes:
        factor = resolved.affine(axis)
        if factor.is_constant:
            constant *= factor.constant
        else:
            factors.append(factor)
    return constant, tuple(factors)


def _lives(traffic: Traffic, sizes: list[Size]) -> dict[int, tuple[int, int]]:
    """Return the first and last step of each buffer; a result written in place shares its input's buffer."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, (reads, writes, _) in enumerate(traffic.steps):
        for piece in (*reads, *writes):
            first.setdefault(piece, number)
            last[piece] = number
    place = {piece: piece for piece in first}
    for number, (reads, writes, in_place) in enumerate(traffic.steps):
        if not in_place or len(writes) != 1 or first[writes[0]] != number or writes[0] in reads:
            continue
        for piece in reads:
            home = place[piece]
            if last[home] == number and sizes[piece] == sizes[writes[0]]:
                place[writes[0]] = home
                last[home] = last[writes[0]]
                break
    return {piece: (first[piece], last[piece]) for piece in first if place[piece] == piece}


def _largest(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows that no other row dominates: only these can be the peak."""
    kept = [
        row
        for number, row in enumerate(rows)
        if not any((other >= row).all() for place, other in enumerate(rows) if place != number)
    ]
    return np.array(kept)
