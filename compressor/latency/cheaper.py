"""Operators in FP32 or in INT8, whichever is faster at their widths, with the conversions between them.

What an operator takes in either precision is known from a table in that precision. Where one operator is in another
precision than the one before it, the value between them is converted. The precisions of all operators with the smallest
sum are found by dynamic programming along the order of execution (Viterbi's algorithm), for many candidates at once.

That order stands for the graph of the network: a value that a branch takes past other operators is not looked at, and
neighbours that a runtime fuses are priced one by one. Both change whole networks by little, and the correction for
whole networks is fitted to such that were measured in mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from compressor.latency.fit import Floats

Prices = Callable[[npt.ArrayLike, npt.ArrayLike], Floats]
"""Milliseconds of operators from their input and output channels, all (N, operators)."""

Line = Sequence[float]
"""Milliseconds of a conversion, and of each element that it converts."""


class CheaperOperators:
    """A network's operators in their cheaper precisions.

    Args:
        floats, int8: Milliseconds of the operators in either precision. The network's input is a float, whose
            conversion is part of the first operator's time in INT8.
        elements: Elements of one input channel of each operator, of all inputs of a batch, (operators,).
        to_int8, to_float: Milliseconds of the conversions.
    """

    def __init__(self, floats: Prices, int8: Prices, elements: Floats, to_int8: Line, to_float: Line) -> None:
        self._floats, self._int8, self._elements = floats, int8, elements
        self._to_int8, self._to_float = to_int8, to_float

    def __call__(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> Floats:
        """Milliseconds from the channel counts of each operator of each candidate, all (N, operators).

        A conversion belongs to the operator that reads the value.
        """
        times, into = self._times(c_in, c_out)
        chosen = _cheapest(times, into)
        own: Floats = np.where(chosen, times[1], times[0])
        own[:, 1:] += np.where(_switched(chosen), np.where(chosen, into[1], into[0])[:, 1:], 0.0)
        return own

    def in_int8(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which operators are in INT8, (N, operators); one without channels has the precision before it."""
        return _cheapest(*self._times(c_in, c_out))

    def _times(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Return, for floats and INT8, the operators' milliseconds and those of converting what they read into it.

        Both are (2, N, operators). Nothing is converted for an operator that is not there.
        """
        times = np.stack([self._floats(c_in, c_out), self._int8(c_in, c_out)])
        elements = np.asarray(c_in, dtype=np.float64) * self._elements
        into = np.stack([once + each * elements for once, each in (self._to_float, self._to_int8)])
        return times, np.where(np.asarray(c_out) > 0, into, np.inf)


def _cheapest(times: Floats, into: Floats) -> npt.NDArray[np.bool_]:
    """Return the precisions (N, operators), True for INT8, with the smallest sum of times and conversions.

    Args:
        times, into: Milliseconds of the operators and of the conversions to floats and to INT8, (2, N, operators).
    """
    _, candidates, operators = times.shape
    least = times[:, :, 0]
    switched = np.zeros(times.shape, dtype=np.bool_)  # whether the operator before is best in the other precision
    for place in range(1, operators):
        other = least[::-1] + into[:, :, place]
        switched[:, :, place] = other < least
        least = np.minimum(other, least) + times[:, :, place]
    chosen = np.zeros((candidates, operators), dtype=np.bool_)
    now = (least[1] < least[0]).astype(np.int64)
    for place in range(operators - 1, -1, -1):
        chosen[:, place] = now
        now = now ^ switched[now, np.arange(candidates), place]
    return chosen


def _switched(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return whether each operator but the first is in another precision than the one before it, (N, operators - 1)."""
    return np.asarray(chosen[:, 1:] != chosen[:, :-1])
