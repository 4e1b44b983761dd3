"""From the sum of the operators to the whole network.

A network's time is not the sum of its operators' times: the profiler adds to each of them, the runtime adds
to all of them. The correction is one line, `offset + slope x sum`, fitted to whole networks that were
measured end to end, with errors counted relative to the time; more terms did not predict unseen networks
better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TINY = 0.25
"""Below this share of the largest network's time errors count absolutely: no budget asks for so small a network."""


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
    """`milliseconds = offset + slope x (sum of operators)`.

    Attributes:
        offset: Milliseconds that every network pays.
        slope: Above zero.
        least: No network is predicted below this; milliseconds.
    """

    offset: float
    slope: float
    least: float = 0.0

    def __call__(self, total: npt.ArrayLike) -> Floats:
        """The whole network's milliseconds from the sum of its operators' milliseconds."""
        return np.maximum(self.offset + self.slope * np.asarray(total, dtype=np.float64), self.least)


def fit_correction(totals: Sequence[float], measured: Sequence[float]) -> Correction:
    """Fit the line to measured networks; one network gives a plain factor."""
    sums, times = np.asarray(totals, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if len(sums) >= 3 and np.ptp(sums) > 0.05 * sums.mean():
        scale = np.maximum(times, TINY * times.max())
        weighted = np.stack([np.ones_like(sums), sums], axis=1) / scale[:, None]
        offset, slope = np.linalg.lstsq(weighted, times / scale, rcond=None)[0]
        if slope > 0:
            return Correction(float(offset), float(slope), least=0.5 * float(times.min()))
    return Correction(0.0, float(np.median(times / sums)), least=0.5 * float(times.min()))


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
