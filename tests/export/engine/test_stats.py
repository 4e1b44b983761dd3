"""Percentiles, drift and the checks of run times, against numbers worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from export.engine.stats import LatencyStats, drift_of, percentile, summarise
from export.errors import ExportError


def test_percentile_is_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.9) == pytest.approx(4.6)
    assert percentile([7.0], 0.99) == 7.0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_percentile_agrees_with_numpy(share: float) -> None:
    values = [random.Random(3).expovariate(1.0) for _ in range(101)]
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-12)


def test_summary_of_known_times() -> None:
    stats = summarise([1.0, 2.0, 3.0, 4.0], runtime="onnxruntime", version="1.0", threads=2)
    assert (stats.median_ms, stats.mean_ms, stats.min_ms, stats.runs) == (2.5, 2.5, 1.0, 4)
    assert stats.std_ms == pytest.approx(math.sqrt(1.25))
    assert (stats.runtime, stats.version, stats.threads) == ("onnxruntime", "1.0", 2)
    assert LatencyStats(**stats.to_dict()) == stats


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert drift_of([1.0] * 5) == 0.0
    assert drift_of([2.0, 2.0, 9.0, 9.0, 3.0, 3.0]) == pytest.approx(0.5)
    assert summarise([1.0] * 9, runtime="r", version="v").steady
    assert not summarise([1.0] * 3 + [1.1] * 3 + [1.2] * 3, runtime="r", version="v").steady


@pytest.mark.parametrize("times", [[], [1.0, 0.0], [1.0, float("nan")], [-1.0]])
def test_impossible_times_are_refused(times: list[float]) -> None:
    with pytest.raises(ExportError, match=r"at least one timed run|positive milliseconds"):
        summarise(times, runtime="r", version="v")
