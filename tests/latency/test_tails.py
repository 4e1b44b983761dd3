"""Percentiles of single runs: numbers worked out by hand, and how often their interval holds the true ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compressor.latency.paired import PairSession, PairSessions, Timing, burst_of, in_turns
from compressor.latency.request import Turns
from compressor.latency.tails import percentile_interval

SESSIONS, PAIRS, RUNS = 12, 10, 20
TAIL = 1.5


def sessions_of(ratio: float, seed: int) -> list[PairSession]:
    """Sessions in which one run in twenty takes `TAIL` times as long."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(SESSIONS):
        pairs = []
        for _ in range(PAIRS):
            times = 2.0 * np.array([[1.0], [ratio]]) * (1 + 0.02 * rng.random((2, RUNS)))
            times = np.where(rng.random(times.shape) < 0.05, TAIL * times, times)
            pairs.append((burst_of(times[0].tolist()), burst_of(times[1].tolist())))
        found.append(pairs)
    return found


def test_equal_sessions_have_no_noise() -> None:
    dense, slim = [np.full(500, 2.0)] * 4, [np.full(500, 1.0)] * 4
    centre, half = percentile_interval(dense, slim, 99, 0.05, absolute=False)
    assert (math.exp(centre), half) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))


def test_two_sessions_by_hand() -> None:
    """Left out in turn, the slim network's percentile is 1 and then 2: each is log(2)/2 from their mean."""
    dense, slim = [np.full(1000, 2.0)] * 2, [np.full(1000, 2.0), np.full(1000, 1.0)]
    centre, half = percentile_interval(dense, slim, 50, 0.05, absolute=False)
    assert math.exp(centre) == pytest.approx(0.75)  # the median of both is 1.5
    scatter = (math.log(0.5) - centre) ** 2 + (math.log(1.0) - centre) ** 2
    assert half == pytest.approx(12.7062 * math.sqrt(scatter / 2), rel=1e-4)  # Student's t of one degree of freedom


@pytest.mark.parametrize(("runs", "known"), [(249, False), (260, True)])
def test_too_few_runs_beyond_it_tell_nothing(runs: int, known: bool) -> None:
    times = [np.linspace(1.0, 2.0, runs)] * 4
    assert math.isfinite(percentile_interval(times, times, 99, 0.05, absolute=False)[1]) == known


def test_the_interval_holds_the_ratio_of_the_percentiles() -> None:
    held, halves = 0, []
    for seed in range(40):
        ratio = PairSessions(sessions_of(0.5, seed)).ratio(0.05, 0.0, 99)
        held += ratio.low <= 0.5 <= ratio.high
        halves.append(ratio.high / ratio.value - 1)
        assert ratio.dense_ms == pytest.approx(2.0 * TAIL, rel=0.03)
    assert held >= 36
    assert np.median(halves) < 0.02


def test_milliseconds_have_the_noise_that_both_networks_share() -> None:
    slowed = [1.0, 1.3, 1.1, 1.2]  # of each session
    dense, slim = ([np.full(500, own * factor) for factor in slowed] for own in (2.0, 1.0))
    share, own = (percentile_interval(dense, slim, 99, 0.05, absolute=absolute) for absolute in (False, True))
    assert math.exp(share[0]) == math.exp(own[0]) == pytest.approx(0.5)
    assert share[1] == pytest.approx(0.0, abs=1e-12)
    scatter = math.log(1.3 / 1.2) ** 2  # only the slowest session matters
    assert own[1] == pytest.approx(3.18245 * math.sqrt(0.75 * scatter), rel=1e-4)


def measured(percentile: float, **target: float) -> Timing:
    left = iter(sessions_of(0.5, 3) * 6)
    turns = Turns(percentile=percentile, **target)
    return in_turns(lambda: next(left), "made up", "1", turns, batch=8, streams=2)


def test_a_percentile_is_timed_until_it_is_decided() -> None:
    timing = measured(99, target=0.9)
    assert timing.ratio.verdict(0.9) == "kept"
    assert timing.ratio.sessions < 60
    assert timing.tails[1] == pytest.approx(timing.slim.p99_ms / timing.slim.median_ms)
    assert timing.tails[0] == pytest.approx(TAIL, rel=0.03)
    assert (timing.slim.batch, timing.slim.streams) == (8, 2)
    assert timing.slim.inputs_per_s == pytest.approx(16e3 / timing.slim.mean_ms)


def test_a_percentile_in_milliseconds_is_the_slim_networks_own() -> None:
    timing = measured(99, target=0.1, limit_ms=2.0)  # the share does not count
    slim_ms = timing.ratio.value * timing.ratio.dense_ms
    assert slim_ms == pytest.approx(timing.slim.p99_ms)
    assert timing.ratio.verdict(2.0 / timing.ratio.dense_ms) == "kept"
    assert timing.ratio.verdict(1.2 / timing.ratio.dense_ms) == "missed"
