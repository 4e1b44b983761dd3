"""Times two networks in turns until their ratio decides whether a target is met.

    timing = in_turns(run_session, "tensorrt", "10.3.0", Turns(target=0.5))
    timing.ratio.value, timing.ratio.low, timing.ratio.high, timing.ratio.verdict(0.5)

On a loaded machine a network's time varies by tens of per cent within seconds, while the ratio of two networks that are
timed shortly after one another hardly varies. Two networks therefore alternate in short bursts. A *session* is a number
of burst pairs in two freshly started processes. The placement of a network in memory changes its time by some per cent,
so that only sessions, and not the pairs within one, are independent measurements. Each session gives one number, the
median ratio of its pairs. Estimate and interval are those of the trimmed mean of the sessions' logarithms (Tukey and
McLaughlin 1963; Wilcox, Introduction to Robust Estimation and Hypothesis Testing, chapter 4): one outlier widens the
interval but does not shift the estimate. The interval is examined several times, after `LOOKS` sessions, which would
turn an error of 5 % into one of 15 or 20 %. The error is therefore divided among the looks in proportion to their
sessions (alpha spending, Lan and DeMets 1983, combined by Bonferroni's inequality, which needs no distribution). All
intervals together have a confidence of 95 %.

With another percentile than the median, the ratio is that of the percentiles of all single runs (`latency.tails`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from compressor.core.conditions import MEDIAN
from compressor.core.intervals import known_ends
from compressor.core.progress import bar
from compressor.latency.machine import Floats
from compressor.latency.request import Turns
from compressor.latency.tails import percentile_interval, percentile_ms
from export.engine.bench import LatencyStats, summarise

Verdict = Literal["kept", "missed", "undecided"]

ERROR = 0.05
"""Probability that any of the intervals misses the ratio, over all looks."""

LOOKS = (4, 8, 12, 18, 27, 40, 60)
"""Numbers of sessions after which the interval is examined."""

WITHIN = 0.01
"""Relative distance from the target within which an interval is precise enough."""

PRECISE = 0.05
"""Largest half width, as a share of the ratio, of an interval that ends a measurement beside the target: the ratio is
reported, and the table is refitted with it."""

TRIMMED = 0.2
"""Share of the sessions that is trimmed at either end."""

FAST = 0.1
"""Quantile of a burst's runs that is taken as the time of an undisturbed run."""

QUIET = 0.1
"""Quantile of a network's bursts that is taken as its quiet level."""

QUIET_TOLERANCE = 0.1
"""A pair counts if both of its bursts exceed the quiet level of their network by no more than this share."""

FEWEST_COUNTED_PAIRS = 3
"""Fewest counted pairs of a session; a session with fewer is ignored."""

SHORTEST_S, LONGEST_S = 0.8, 4.0
"""Limits of the total burst time of one session, in seconds. Within them it equals the start-up time of its processes,
which is long on a loaded machine."""

FEWEST_PAIRS, MOST_PAIRS = 6, 150
COUNTED_MS, FEWEST_COUNTED, MOST_COUNTED = 12.0, 4, 100
"""Approximate total time of a burst's counted runs, and limits of their number."""

DROPPED_MS = 2.5
"""Time at the start of a burst that is not counted: the caches refill after the other network's burst."""

MANY, TAIL = 1.5, 3.0
"""Ratios of the 90th and the 99th percentile to the median from which the machine is reported as loaded."""


@dataclass(frozen=True)
class Burst:
    """Consecutive runs of one network, without the first ones.

    Attributes:
        fast_ms: Time of an undisturbed run: the lower decile, of CPU time if one thread is used.
        median_ms: Median on the same clock.
        wall_ms: Wall-clock time of each run, in order.
    """

    fast_ms: float
    median_ms: float
    wall_ms: tuple[float, ...]


def burst_of(wall_ms: Sequence[float], own_ms: Sequence[float] | None = None) -> Burst:
    """Summarise the runs of a burst.

    Args:
        wall_ms: Wall-clock time of each run.
        own_ms: CPU time of the thread, which excludes time spent in other processes; None if it is unknown, or if the
            runtime uses several threads.
    """
    used = np.asarray(wall_ms if own_ms is None else own_ms)
    return Burst(float(np.quantile(used, FAST)), float(np.median(used)), tuple(wall_ms))


PairSession = Sequence[tuple[Burst, Burst]]
"""Pairs of bursts (dense, slim) of two processes."""


@dataclass(frozen=True)
class Ratio:
    """The slim network's time as a share of the dense one's.

    Attributes:
        value: The estimate.
        low, high: Its interval, with a confidence of 95 % over all looks; 0 and infinity where nothing is known yet.
        dense_ms: Quiet level of the dense network during the measurement, or the percentile of its runs.
        bursts: Number of bursts of both networks.
        sessions: Number of sessions (pairs of processes).
        undisturbed: Share of the pairs that counted as undisturbed.
        seconds: Duration of the measurement.
    """

    value: float
    low: float
    high: float
    dense_ms: float
    bursts: int = 0
    sessions: int = 0
    undisturbed: float = 1.0
    seconds: float = 0.0

    def verdict(self, target: float) -> Verdict:
        """Decide whether the slim network takes no more than this share of the dense one's time.

        "kept" if the estimate meets the target and the interval ends at most `WITHIN` above it; "missed" if the whole
        interval lies above it; else "undecided".
        """
        if self.value <= target and self.high <= (1 + WITHIN) * target:
            return "kept"
        return "missed" if self.low > target else "undecided"

    def settled(self, target: float) -> bool:
        """Whether measuring can stop: the whole interval is near the target, or it is decided and precise."""
        near = self.low >= (1 - WITHIN) * target and self.high <= (1 + WITHIN) * target
        precise = self.high <= (1 + PRECISE) ** 2 * self.low
        return near or (precise and self.verdict(target) != "undecided")

    def together(self, value: float, low: float, high: float) -> Ratio:
        """Combine with another measurement of the same networks; weights follow from the widths of the intervals."""
        halves = [math.log(each[1] / each[0]) / 2 for each in ((self.low, self.high), (low, high)) if each[0] > 0]
        if len(halves) < 2 or not all(map(math.isfinite, halves)):
            return self
        weights = np.asarray(halves) ** -2.0
        centre = float(weights @ np.log([self.value, value]) / weights.sum())
        half = float(weights.sum() ** -0.5)
        return replace(self, value=math.exp(centre), low=math.exp(centre - half), high=math.exp(centre + half))


def in_words(verdict: Verdict) -> str:
    """Return a verdict as text for the terminal."""
    return "cannot be decided on this machine now" if verdict == "undecided" else verdict


def interval_in_words(low: float | None, high: float | None, digits: str = ".3f") -> str:
    """Return a 95 % interval as text for the terminal: "0.480-0.530", or "not known" (`known_ends`).

    Args:
        low, high: Its ends; None or infinite if they are not known.
        digits: Format of an end.
    """
    ends = known_ends(low, high)
    return "not known" if ends is None else f"{ends[0]:{digits}}-{ends[1]:{digits}}"


def error_at(look: int) -> float:
    """Return the share of `ERROR` that is spent on the interval after `LOOKS[look]` sessions."""
    return ERROR * LOOKS[look] / sum(LOOKS)


def trimmed_interval(values: Sequence[float], error: float) -> tuple[float, float]:
    """Return the trimmed mean of some values and the half width of its interval, infinite for a single value.

    Args:
        values: One or more values.
        error: Probability that the interval misses, such as 0.05.
    """
    from scipy.stats import t

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count, cut = len(ordered), int(TRIMMED * len(ordered))
    centre = float(ordered[cut : count - cut].mean())
    if count < 2:
        return centre, float("inf")
    inside = count - 2 * cut
    winsorised = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    deviation = float(winsorised.std(ddof=1)) / ((1 - 2 * cut / count) * count**0.5)
    return centre, float(t.ppf(1 - error / 2, inside - 1)) * deviation


@dataclass
class PairSessions:
    """All sessions of two networks.

    Attributes:
        all: Burst pairs of each session.
    """

    all: list[PairSession] = field(default_factory=list)

    def ratio(
        self, error: float = ERROR, seconds: float = 0.0, percentile: float = MEDIAN, absolute: bool = False
    ) -> Ratio:
        """Estimate the ratio from all sessions so far.

        Args:
            error: Probability that the interval misses.
            seconds: Duration of the measurement, for the record.
            percentile: Percentile of single runs that is compared; at the median, undisturbed runs are.
            absolute: Whether a percentile's interval is that of the slim network's time; see `latency.tails`.
        """
        if percentile != MEDIAN:
            return self._percentiles(error, seconds, percentile, absolute)
        fast = [self._levels(session, "fast_ms") for session in self.all]
        quiet = np.quantile(np.concatenate(fast), QUIET, axis=0)
        logarithms, counted = [], 0
        for levels in fast:
            undisturbed = levels[np.all(levels <= (1 + QUIET_TOLERANCE) * quiet, axis=1)]
            counted += len(undisturbed)
            if len(undisturbed) >= min(FEWEST_COUNTED_PAIRS, len(levels)):
                logarithms.append(float(np.median(np.log(undisturbed[:, 1] / undisturbed[:, 0]))))
        pairs = sum(map(len, fast))
        medians = np.concatenate([self._levels(session, "median_ms") for session in self.all])
        if logarithms:
            centre, half = trimmed_interval(logarithms, error)
        else:
            every = np.concatenate(fast)
            centre, half = float(np.median(np.log(every[:, 1] / every[:, 0]))), float("inf")
        return Ratio(
            value=float(np.exp(centre)),
            low=float(np.exp(centre - half)),
            high=float(np.exp(centre + half)),
            dense_ms=float(np.quantile(medians[:, 0], QUIET)),
            bursts=2 * pairs,
            sessions=len(self.all),
            undisturbed=counted / pairs,
            seconds=seconds,
        )

    def _percentiles(self, error: float, seconds: float, percentile: float, absolute: bool) -> Ratio:
        """Estimate the ratio of a percentile of all single runs."""
        dense, slim = (
            [np.asarray([time for pair in session for time in pair[network].wall_ms]) for session in self.all]
            for network in (0, 1)
        )
        centre, half = percentile_interval(dense, slim, percentile, error, absolute=absolute)
        return Ratio(
            value=math.exp(centre),
            low=math.exp(centre - half),
            high=math.exp(centre + half) if math.isfinite(half) else math.inf,
            dense_ms=percentile_ms(dense, percentile),
            bursts=2 * sum(map(len, self.all)),
            sessions=len(self.all),
            seconds=seconds,
        )

    def timing(self, ratio: Ratio, percentile: float, **runtime: Any) -> Timing:
        """Return the result: statistics of all runs, and how far the percentile lies above their median.

        Args:
            ratio: The estimate.
            percentile: Percentile that was compared.
            runtime: As for `summarise`.
        """
        times = [self.wall_ms(network) for network in (0, 1)]
        dense, slim = (summarise(each, **runtime) for each in times)
        above = [float(np.quantile(each, percentile / 100) / np.median(each)) for each in times]
        return Timing(dense, slim, ratio, (above[0], above[1]))

    def wall_ms(self, network: int) -> list[float]:
        """Return the wall-clock time of each run of the dense (0) or the slim (1) network."""
        return [time for session in self.all for pair in session for time in pair[network].wall_ms]

    @staticmethod
    def _levels(session: PairSession, which: Literal["fast_ms", "median_ms"]) -> Floats:
        """Return one time per burst, (pairs, 2): dense and slim."""
        return np.asarray([[getattr(burst, which) for burst in pair] for pair in session])


@dataclass(frozen=True)
class Timing:
    """Two networks that were timed in turns.

    Attributes:
        dense, slim: Wall-clock times of all counted runs, including the effect of other load.
        ratio: Slim time as a share of dense time: on an unloaded machine, or that of a percentile of all runs.
        tails: That percentile over the median of the same runs, of the dense and of the slim network.
    """

    dense: LatencyStats
    slim: LatencyStats
    ratio: Ratio
    tails: tuple[float, float] = (1.0, 1.0)

    @property
    def noise(self) -> str:
        """Warning if many runs took far longer than the median; empty on a quiet machine."""
        for network, stats in (("slim", self.slim), ("dense", self.dense)):
            for share, time_ms, factor in (("a hundred", stats.p99_ms, TAIL), ("ten", stats.p90_ms, MANY)):
                if time_ms >= factor * stats.median_ms:
                    return (
                        f"The machine was not quiet while the latency was measured: one run in {share} of the "
                        f"{network} network took {time_ms:.3g} ms or more, with a median of {stats.median_ms:.3g} ms. "
                        "Use the ratio of slim to dense: they were timed in turns."
                    )
        return ""


class Bursts(Protocol):
    """A network that is loaded and warm, and runs on request."""

    once_ms: float

    def burst(self, dropped: int, counted: int) -> Burst:
        """Run `counted` times after `dropped` runs that are not counted."""


def in_turns(
    run_session: Callable[[], PairSession],
    name: str,
    version: str,
    turns: Turns,
    *,
    threads: int = 0,
    batch: int = 1,
    streams: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> Timing:
    """Run sessions until the ratio is precise and its interval decides the target or is near it, or the time is up.

    Args:
        run_session: Runs one session with fresh processes.
        name, version: Name and version of the runtime.
        turns: What is compared, and when timing ends.
        threads, batch, streams: Threads of the runtime, inputs of one run, and copies of a network that run at the same
            time, for the record.
        clock: Monotonic clock in seconds.
    """
    target, percentile, limit_ms = turns.target, turns.percentile, turns.limit_ms
    found, begun, absolute = PairSessions(), clock(), limit_ms is not None
    looks = {count: error_at(place) for place, count in enumerate(LOOKS)}
    most = turns.repeats if target is None else LOOKS[-1]
    ratio = None
    with bar("Measuring latency", most if target is None else LOOKS[0]) as progress:
        while len(found.all) < most:
            found.all.append(run_session())
            spent, count = clock() - begun, len(found.all)
            late = spent * (count + 1) / count > turns.seconds  # the next session would exceed the limit
            if target is not None and (count in looks or late):
                # when time runs out between looks, spend the error of the next look, which will not take place
                error = looks.get(count) or error_at(min(i for i, look in enumerate(LOOKS) if look > count))
                ratio = found.ratio(error, spent, percentile, absolute)
                if ratio.settled(target if limit_ms is None else limit_ms / ratio.dense_ms) or late:
                    break
            elif late:
                break
            progress.advance(1, note="" if ratio is None else f"{ratio.value:.3f} of dense so far")
    if target is None or ratio is None:
        ratio = found.ratio(ERROR, clock() - begun, percentile, absolute)
    return found.timing(ratio, percentile, runtime=name, version=version, threads=threads, batch=batch, streams=streams)


def pair_session(
    dense: Bursts, slim: Bursts, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
) -> PairSession:
    """Run pairs of bursts, each pair in the reverse order of the preceding one.

    Bursts of both networks have the same number of runs, so that their quantiles are comparable.

    Args:
        dense, slim: Networks that are loaded and warm.
        seconds: Total time of the bursts, clipped to `SHORTEST_S` and `LONGEST_S`.
        clock: Monotonic clock in seconds.
    """
    once = (dense.once_ms + slim.once_ms) / 2
    counted = max(FEWEST_COUNTED, min(MOST_COUNTED, round(COUNTED_MS / once)))
    dropped = max(1, round(DROPPED_MS / once))
    ends = clock() + min(max(seconds, SHORTEST_S), LONGEST_S)
    pairs: list[tuple[Burst, Burst]] = []
    while len(pairs) < FEWEST_PAIRS or (len(pairs) < MOST_PAIRS and clock() < ends):
        if len(pairs) % 2:
            later = slim.burst(dropped, counted)
            pairs.append((dense.burst(dropped, counted), later))
        else:
            pairs.append((dense.burst(dropped, counted), slim.burst(dropped, counted)))
    return pairs

