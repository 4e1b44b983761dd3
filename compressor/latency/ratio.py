"""Estimates the ratio of two networks' times from alternating bursts, and compares it with a target.

On a loaded machine a network's time varies by tens of per cent within seconds, while the ratio of two networks that are
timed shortly after one another hardly varies. A *session* is a number of burst pairs in two freshly started processes.
The placement of a network in memory changes its time by some per cent, so that only sessions, and not the pairs within
one, are independent measurements. Each session gives one number, the median ratio of its pairs. Estimate and interval
are those of the trimmed mean of the sessions' logarithms (Tukey and McLaughlin 1963; Wilcox, Introduction to Robust
Estimation and Hypothesis Testing, chapter 4): one outlier widens the interval but does not shift the estimate. The
interval is examined several times, after `LOOKS` sessions, which would turn an error of 5 % into one of 15 or 20 %. The
error is therefore divided among the looks in proportion to their sessions (alpha spending, Lan and DeMets 1983,
combined by Bonferroni's inequality, which needs no distribution). All intervals together have a confidence of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Verdict = Literal["kept", "missed", "undecided"]

ERROR = 0.05
"""Probability that any of the intervals misses the ratio, over all looks."""

LOOKS = (3, 5, 8, 12, 18, 27, 40, 60)
"""Numbers of sessions after which the interval is examined."""

WITHIN = 0.01
"""Relative distance from the target within which an interval is precise enough."""

TRIMMED = 0.2
"""Share of the sessions that is trimmed at either end."""

FAST = 0.1
"""Quantile of a burst's runs that is taken as the time of an undisturbed run."""

QUIET = 0.1
"""Quantile of a network's bursts that is taken as its quiet level."""

QUIET_TOLERANCE = 0.1
"""A pair counts if both of its bursts exceed the quiet level of their network by no more than this share."""

FEWEST_PAIRS = 3
"""Fewest counted pairs of a session; a session with fewer is ignored."""


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
        dense_ms: Quiet level of the dense network during the measurement.
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
        """Whether measuring can stop: the target is outside the interval, or the whole interval is near it."""
        near = self.low >= (1 - WITHIN) * target and self.high <= (1 + WITHIN) * target
        return near or self.verdict(target) != "undecided"

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
    return "cannot be told on this machine now" if verdict == "undecided" else verdict


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

    def ratio(self, error: float = ERROR, seconds: float = 0.0) -> Ratio:
        """Estimate the ratio from all sessions so far.

        Args:
            error: Probability that the interval misses.
            seconds: Duration of the measurement, for the record.
        """
        fast = [self._levels(session, "fast_ms") for session in self.all]
        quiet = np.quantile(np.concatenate(fast), QUIET, axis=0)
        logarithms, counted = [], 0
        for levels in fast:
            undisturbed = levels[np.all(levels <= (1 + QUIET_TOLERANCE) * quiet, axis=1)]
            counted += len(undisturbed)
            if len(undisturbed) >= min(FEWEST_PAIRS, len(levels)):
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

    def wall_ms(self, network: int) -> list[float]:
        """Return the wall-clock time of each run of the dense (0) or the slim (1) network."""
        return [time for session in self.all for pair in session for time in pair[network].wall_ms]

    @staticmethod
    def _levels(session: PairSession, which: Literal["fast_ms", "median_ms"]) -> Floats:
        """Return one time per burst, (pairs, 2): dense and slim."""
        return np.asarray([[getattr(burst, which) for burst in pair] for pair in session])
