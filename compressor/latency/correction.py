"""From the sum of the operators to the whole network.

A network's time is not the sum of its operators' times: the profiler adds to each of them, the runtime adds
to all of them, and a small network finds its weights in nearer caches than a large one. The correction rises with
the sum in straight pieces, whose slopes may differ but are drawn towards one another; it is fitted to whole networks
that were measured end to end, with errors counted relative to the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TINY = 0.03
"""Below this share of the largest network's time errors count absolutely: no budget asks for so small a network."""

BENDS = (0.15, 0.3, 0.55)
"""Where the correction may bend, as shares of the largest measured sum."""

ENOUGH = 20
"""Networks from which on the correction may bend."""

PULL = 0.02
"""How strongly the slopes of neighbouring pieces are drawn together: the error that a difference of 1 counts as."""

FLATTEST = 1e-6


@dataclass(frozen=True)
class HeldOut:
    """Errors on networks that the table was not fitted to.

    Attributes:
        networks: How many there were.
        mape: Mean of |predicted / measured - 1|.
        p95: Its 95th percentile.
        worst: Its maximum.
        bias: Mean of predicted / measured - 1.
        spearman: Rank correlation of predicted and measured.
    """

    networks: int
    mape: float
    p95: float
    worst: float
    bias: float
    spearman: float


@dataclass(frozen=True)
class Correction:
    """Milliseconds of a whole network from the sum of its operators' milliseconds.

    `offset + slope x sum` up to the first bend; from each bend on the line goes on with the bend's own slope.

    Attributes:
        offset: Milliseconds that every network pays; below zero where the profiler added more than the runtime.
        slope: Above zero.
        least: No network is predicted below this; milliseconds.
        bends: (sum in milliseconds, slope from there on), ascending.
    """

    offset: float
    slope: float
    least: float = 0.0
    bends: tuple[tuple[float, float], ...] = ()

    def __call__(self, total: npt.ArrayLike) -> Floats:
        """The whole network's milliseconds; never falls when the sum grows."""
        sums = np.asarray(total, dtype=np.float64)
        value, slope = self.offset + self.slope * sums, self.slope
        for start, after in self.bends:
            value = value + (after - slope) * np.maximum(sums - start, 0.0)
            slope = after
        return np.asarray(np.maximum(value, self.least))


def fit_correction(totals: Sequence[float], measured: Sequence[float]) -> Correction:
    """Fit to measured networks: bends from `ENOUGH` networks on, else a line; one network gives a plain factor."""
    sums, times = np.asarray(totals, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    least = 0.5 * float(times.min())
    if len(sums) >= 3 and np.ptp(sums) > 0.05 * sums.mean():
        places = sums.max() * np.asarray(BENDS) if len(sums) >= ENOUGH else np.zeros(0)
        # A piece without networks of its own would have its slope from nowhere.
        places = places[[bool((sums < place).sum() >= 3 and (sums > place).sum() >= 3) for place in places]]
        offset, *slopes = _pieces(sums, times, places)
        if min(slopes) > FLATTEST:
            pairs = zip(places.tolist(), slopes[1:], strict=True)
            return Correction(offset, slopes[0], least, tuple((float(at), slope) for at, slope in pairs))
    return Correction(0.0, float(np.median(times / sums)), least)


def _pieces(sums: Floats, times: Floats, places: Floats) -> list[float]:
    """The offset and the slope of each piece, none below `FLATTEST`, neighbours drawn towards one another."""
    from scipy.optimize import lsq_linear

    scale = np.maximum(times, TINY * times.max())
    edges = np.concatenate([[0.0], places, [np.inf]])
    lengths = np.clip(sums[:, None] - edges[:-1], 0.0, np.diff(edges))
    rows = np.concatenate([np.ones((len(sums), 1)), lengths], axis=1) / scale[:, None]
    pull = np.diff(np.eye(len(places) + 1), axis=0) * PULL * np.sqrt(len(sums))
    matrix = np.concatenate([rows, np.pad(pull, ((0, 0), (1, 0)))])
    target = np.concatenate([times / scale, np.zeros(len(pull))])
    lowest = np.concatenate([[-np.inf], np.full(len(places) + 1, FLATTEST)])
    return [float(value) for value in lsq_linear(matrix, target, bounds=(lowest, np.inf)).x]


def held_out_error(predicted: Sequence[float], measured: Sequence[float]) -> HeldOut:
    """Compare predictions with measurements of the same networks, both in milliseconds."""
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    error = guess / truth - 1.0
    size = np.abs(error)
    return HeldOut(
        networks=len(truth),
        mape=float(size.mean()),
        p95=float(np.quantile(size, 0.95)),
        worst=float(size.max()),
        bias=float(error.mean()),
        spearman=spearman(guess, truth),
    )


def spearman(first: Floats, second: Floats) -> float:
    """Rank correlation; 1 where either is constant, because then there is no order to get wrong."""
    from scipy.stats import rankdata

    ranks = [np.asarray(rankdata(values), dtype=np.float64) for values in (first, second)]
    if len(first) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
