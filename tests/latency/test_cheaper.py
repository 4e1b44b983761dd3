"""The cheaper precision of each operator: the best of all sequences, conversions included."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from compressor.latency.cheaper import CheaperOperators
from compressor.latency.fit import Floats

OPERATORS, CANDIDATES = 6, 40


class Given:
    """Surfaces with given times (N, operators); none for operators without channels."""

    def __init__(self, times: Floats) -> None:
        self._times = times

    def __call__(self, c_in: Any, c_out: Any) -> Floats:
        return self._times * (np.asarray(c_out) > 0)


def operators(floats: Floats, int8: Floats, to_int8: tuple[float, float], to_float: tuple[float, float]) -> Any:
    elements = np.arange(1.0, floats.shape[1] + 1)
    return CheaperOperators(Given(floats), Given(int8), elements, to_int8, to_float)


def summed(
    plan: tuple[int, ...], times: Floats, c_in: Floats, to_int8: tuple[float, float], to_float: tuple[float, float]
) -> float:
    """The sum of a plan's times, (2, operators), and conversions."""
    total = sum(times[each, place] for place, each in enumerate(plan))
    for place in range(1, len(plan)):
        if plan[place] != plan[place - 1]:
            once, each = to_int8 if plan[place] else to_float
            total += once + each * c_in[place] * (place + 1)
    return float(total)


def test_it_is_the_best_of_all_sequences() -> None:
    rng = np.random.default_rng(0)
    floats, int8 = rng.uniform(0.1, 1.0, (2, CANDIDATES, OPERATORS))
    c_in = rng.integers(1, 9, (CANDIDATES, OPERATORS)).astype(float)
    to_int8, to_float = (0.1, 0.004), (0.05, 0.008)
    priced = operators(floats, int8, to_int8, to_float)
    found, chosen = priced(c_in, c_in), priced.in_int8(c_in, c_in)
    assert len({tuple(row) for row in chosen.tolist()}) > 10
    for row in range(CANDIDATES):
        times = np.stack([floats[row], int8[row]])
        every = {
            plan: summed(plan, times, c_in[row], to_int8, to_float)
            for plan in itertools.product((0, 1), repeat=OPERATORS)
        }
        best = min(every, key=every.__getitem__)
        assert tuple(chosen[row].astype(int).tolist()) == best
        assert found[row].sum() == pytest.approx(every[best])


def test_a_conversion_belongs_to_the_operator_that_reads() -> None:
    floats, int8 = np.asarray([[1.0, 5.0, 1.0]]), np.asarray([[5.0, 1.0, 5.0]])
    found = operators(floats, int8, (0.5, 0.01), (0.25, 0.02))(np.full((1, 3), 10.0), np.full((1, 3), 4.0))
    assert found.tolist() == [[1.0, 1.0 + 0.5 + 0.01 * 20, 1.0 + 0.25 + 0.02 * 30]]


def test_expensive_conversions_leave_one_precision() -> None:
    floats, int8 = np.asarray([[1.0, 5.0, 1.0]]), np.asarray([[5.0, 4.0, 5.0]])
    ones = np.ones((1, 3))
    assert not operators(floats, int8, (1.0, 0.0), (1.0, 0.0)).in_int8(ones, ones).any()
    assert operators(floats, int8, (0.1, 0.0), (0.1, 0.0)).in_int8(ones, ones).tolist() == [[False, True, False]]


def test_nothing_is_converted_for_what_is_not_there() -> None:
    floats, int8 = np.asarray([[1.0, 9.0, 5.0]]), np.asarray([[5.0, 9.0, 1.0]])
    c_in, c_out = np.asarray([[8.0, 0.0, 8.0]]), np.asarray([[8.0, 0.0, 8.0]])
    priced = operators(floats, int8, (0.5, 0.0), (0.5, 0.0))
    assert priced(c_in, c_out).tolist() == [[1.0, 0.0, 1.5]]
    assert priced.in_int8(c_in, c_out).tolist() == [[False, False, True]]


def test_one_operator() -> None:
    ones = np.ones((2, 1))
    priced = operators(np.asarray([[1.0], [2.0]]), np.asarray([[2.0], [1.0]]), (9.0, 9.0), (9.0, 9.0))
    assert priced(ones, ones).tolist() == [[1.0], [1.0]]
    assert priced.in_int8(ones, ones).tolist() == [[False], [True]]
