"""How long one network takes as a share of another, from bursts of both in turns, and what can be said of a target.

On a machine with neighbours a network's time moves by tens of per cent within seconds, and the ratio of two networks
that are timed at short distance hardly moves. A *sitting* is a number of pairs of bursts in two processes that are
started for it: where in memory a network comes to lie is worth some per cent of its time, so that only sittings, and
not the pairs within one, are independent measurements. Each gives one number, the median ratio of its pairs.

Estimate and interval are those of the trimmed mean of the sittings' logarithms (Tukey and McLaughlin 1963; Wilcox,
Introduction to Robust Estimation and Hypothesis Testing, chapter 4): one sitting that met something odd costs width
and moves nothing. The interval is looked at several times, after `LOOKS` sittings, which would make an error of 5 % one
of 15 or 20 %. The error is therefore shared out over the looks in proportion to their sittings (spending of alpha, Lan
and DeMets 1983, joined by Bonferroni's inequality, which needs no distribution): together the intervals are right with
95 %.
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
"""How often the interval may miss the ratio, over all looks at it."""

LOOKS = (3, 5, 8, 12, 18, 27, 40, 60)
"""After so many sittings the interval is looked at."""

WITHIN = 0.01
"""An interval that lies this close to the target, as a share of it, is not made narrower."""

TRIMMED = 0.2
"""Share of the sittings at either end that only count as far as those inside them."""

FAST = 0.1
"""The quantile of a burst's runs that an undisturbed run takes."""

QUIET = 0.1
"""The quantile of a network's bursts that is its quiet level."""

CALM = 0.1
"""A pair counts whose bursts are no longer than the quiet level of their network by this share."""

FEWEST_PAIRS = 3
"""A sitting with fewer pairs that count says nothing."""


@dataclass(frozen=True)
class Burst:
    """Runs of one network after another, without the first ones.

    Attributes:
        fast_ms: The time of an undisturbed run: the lower decile, on the thread's own clock where one is timed.
        median_ms: The median on the same clock.
        wall_ms: Each run on the wall's clock, in order.
    """

    fast_ms: float
    median_ms: float
    wall_ms: tuple[float, ...]


def burst_of(wall_ms: Sequence[float], own_ms: Sequence[float] | None = None) -> Burst:
    """What a burst's runs say.

    Args:
        wall_ms: Each run on the wall's clock.
        own_ms: On the thread's own, which stands still while another process has the processor; None where it is not
            known, or says nothing of other threads.
    """
    used = np.asarray(wall_ms if own_ms is None else own_ms)
    return Burst(float(np.quantile(used, FAST)), float(np.median(used)), tuple(wall_ms))


Sitting = Sequence[tuple[Burst, Burst]]
"""Pairs of bursts (dense, slim) in two processes."""


@dataclass(frozen=True)
class Ratio:
    """The slim network's time as a share of the dense one's.

    Attributes:
        value: The estimate.
        low, high: Its interval, right with 95 % whenever it is looked at; 0 and infinity where nothing is known yet.
        dense_ms: The quiet level of the dense network meanwhile.
        bursts: Of both networks together.
        sittings: Pairs of processes.
        calm: Share of the pairs that counted.
        seconds: How long it all took.
    """

    value: float
    low: float
    high: float
    dense_ms: float
    bursts: int = 0
    sittings: int = 0
    calm: float = 1.0
    seconds: float = 0.0

    def verdict(self, target: float) -> Verdict:
        """Whether the slim network takes no more than this share of the dense one's time.

        Kept where the estimate keeps it and the interval ends no more than `WITHIN` above it; missed where the whole
        interval lies above it.
        """
        if self.value <= target and self.high <= (1 + WITHIN) * target:
            return "kept"
        return "missed" if self.low > target else "undecided"

    def settled(self, target: float) -> bool:
        """Whether measuring on would change nothing: the target is outside the interval, or all of it is near."""
        near = self.low >= (1 - WITHIN) * target and self.high <= (1 + WITHIN) * target
        return near or self.verdict(target) != "undecided"

    def together(self, value: float, low: float, high: float) -> Ratio:
        """With another measurement of the same two networks, each weighted by the width of its interval."""
        halves = [math.log(each[1] / each[0]) / 2 for each in ((self.low, self.high), (low, high)) if each[0] > 0]
        if len(halves) < 2 or not all(map(math.isfinite, halves)):
            return self
        weights = np.asarray(halves) ** -2.0
        centre = float(weights @ np.log([self.value, value]) / weights.sum())
        half = float(weights.sum() ** -0.5)
        return replace(self, value=math.exp(centre), low=math.exp(centre - half), high=math.exp(centre + half))


def in_words(verdict: Verdict) -> str:
    """A verdict for the terminal."""
    return "cannot be told on this machine now" if verdict == "undecided" else verdict


def error_at(look: int) -> float:
    """The share of `ERROR` that is spent on the interval after `LOOKS[look]` sittings."""
    return ERROR * LOOKS[look] / sum(LOOKS)


def trimmed_interval(values: Sequence[float], error: float) -> tuple[float, float]:
    """The trimmed mean of some values and the half width of its interval, infinite for a single value.

    Args:
        values: One or more.
        error: How often the interval may miss, such as 0.05.
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
class Sittings:
    """All that was measured of two networks.

    Attributes:
        all: Each sitting's pairs.
    """

    all: list[Sitting] = field(default_factory=list)

    def ratio(self, error: float = ERROR, seconds: float = 0.0) -> Ratio:
        """What is known so far.

        Args:
            error: How often the interval may miss.
            seconds: How long it took, for the record.
        """
        fast = [self._levels(sitting, "fast_ms") for sitting in self.all]
        quiet = np.quantile(np.concatenate(fast), QUIET, axis=0)
        logarithms, counted = [], 0
        for levels in fast:
            calm = levels[np.all(levels <= (1 + CALM) * quiet, axis=1)]
            counted += len(calm)
            if len(calm) >= min(FEWEST_PAIRS, len(levels)):
                logarithms.append(float(np.median(np.log(calm[:, 1] / calm[:, 0]))))
        pairs = sum(map(len, fast))
        medians = np.concatenate([self._levels(sitting, "median_ms") for sitting in self.all])
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
            sittings=len(self.all),
            calm=counted / pairs,
            seconds=seconds,
        )

    def wall_ms(self, network: int) -> list[float]:
        """Each run of the dense (0) or the slim (1) network on the wall's clock."""
        return [time for sitting in self.all for pair in sitting for time in pair[network].wall_ms]

    @staticmethod
    def _levels(sitting: Sitting, which: Literal["fast_ms", "median_ms"]) -> Floats:
        """(pairs, 2): dense and slim."""
        return np.asarray([[getattr(burst, which) for burst in pair] for pair in sitting])
