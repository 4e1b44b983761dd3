"""From the sum of the operators to the whole network.

A network's time is not the sum of its operators' times: the profiler adds to each kernel, the runtime adds
to all of them, and a network with few weights finds them in nearer caches than one with many. First each kind of term
of the operators' times gets a factor. The correction then rises with their sum and with the weights, with both in
straight pieces whose slopes may differ but are drawn towards one another. Both are fitted to whole networks that were
measured end to end, with errors counted relative to the time, and large ones less: a busy moment may have slowed any.
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

FILLED = (0.04, 0.08, 0.16, 0.32, 0.64)
"""Where it may bend as weights fill one cache after another, as shares of the most weights measured."""

ENOUGH = 20
"""Networks from which on the correction may bend, and weights count."""

LIKE = 0.05
"""How strongly the factors of all kinds of terms are drawn to the same number: the error that a difference of 1 counts
as."""

PULL = 0.02
"""How strongly the slopes of neighbouring pieces are drawn together: the error that a difference of 1 counts as."""

NEEDLESS = 0.3
"""How strongly a slope over the weights is drawn to nothing, as a share of `PULL`."""

USUAL = 1.5
"""Errors beyond this many times the median one count by their size only, no longer by its square."""

LEAST_USUAL = 0.005
"""Errors below this share are usual on any machine."""

REFITS = 5
FLATTEST = 1e-6
"""The least slope over the sum."""


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


Pieces = tuple[tuple[float, float], ...]
"""Where each piece begins, ascending, and its slope."""


@dataclass(frozen=True)
class Correction:
    """Milliseconds of a whole network from the sum of its operators' milliseconds and its weights.

    Attributes:
        offset: Milliseconds that every network pays; below zero where the profiler added more than the runtime.
        slope: Of the sum, up to the first bend; above zero.
        least: No network is predicted below this; milliseconds.
        bends: (sum in milliseconds, slope from there on), ascending.
        weights: (elements of all weights, milliseconds for each one from there on), ascending; none below zero.
    """

    offset: float
    slope: float
    least: float = 0.0
    bends: Pieces = ()
    weights: Pieces = ()

    def __call__(self, total: npt.ArrayLike, weights: npt.ArrayLike) -> Floats:
        """The whole network's milliseconds; never falls when the sum or the weights grow."""
        by_sum = _along(((0.0, self.slope), *self.bends), np.asarray(total, dtype=np.float64))
        by_weights = _along(self.weights, np.asarray(weights, dtype=np.float64))
        return np.asarray(np.maximum(self.offset + by_sum + by_weights, self.least))


def _along(pieces: Pieces, values: Floats) -> Floats:
    """What straight pieces add up to from zero to each value."""
    total, slope = np.zeros_like(values), 0.0
    for start, after in pieces:
        total = total + (after - slope) * np.maximum(values - start, 0.0)
        slope = after
    return total


def fit_factors(parts: Floats, measured: Sequence[float]) -> tuple[float, ...]:
    """What the operators' times are to be multiplied by, for each kind of term; none below zero.

    Args:
        parts: Milliseconds of all operators of each network by kind, (N, kinds), as `Surfaces.by_kind` gives them.
        measured: Each network's milliseconds end to end.

    Returns:
        (kinds,), or () with fewer than `ENOUGH` networks.
    """
    if len(measured) < ENOUGH:
        return ()
    times, kinds = np.asarray(measured, dtype=np.float64), parts.shape[1]
    scale, pull = np.maximum(times, TINY * times.max()), LIKE * np.sqrt(len(times))
    usual = float(np.median(times / parts.sum(axis=1)))
    rows = np.concatenate([np.ones((len(times), 1)), parts], axis=1) / scale[:, None]
    alike = pull * np.eye(kinds + 1)[1:]
    target = np.concatenate([times / scale, np.full(kinds, pull * usual)])
    lowest = np.concatenate([[-np.inf], np.zeros(kinds)])
    found = _fitted(np.concatenate([rows, alike]), target, lowest, len(times))
    return tuple(float(value) for value in found[1:])


def _fitted(matrix: Floats, target: Floats, lowest: Floats, networks: int) -> Floats:
    """Bounded least squares, refitted with less weight on networks that are far off (Huber's weights).

    Args:
        matrix, target: A row for each network first, in units of its time; then those that draw coefficients together.
        lowest: The least value of each coefficient.
        networks: How many rows are networks.
    """
    from scipy.optimize import lsq_linear

    weights = np.ones(len(target))
    for _ in range(REFITS):
        found = lsq_linear(matrix * weights[:, None], target * weights, bounds=(lowest, np.inf)).x
        off = np.abs(matrix @ found - target)[:networks]
        usual = max(USUAL * float(np.median(off)), LEAST_USUAL)
        weights[:networks] = np.sqrt(usual / np.maximum(off, usual))
    return np.asarray(found)


def fit_correction(
    totals: Sequence[float], weights: Sequence[float], measured: Sequence[float]
) -> Correction:
    """Fit to measured networks: bends from `ENOUGH` networks on, else a line; one network gives a plain factor.

    Args:
        totals: The sum of each network's operators, in milliseconds.
        weights: Elements of all its weights.
        measured: Its milliseconds end to end.
    """
    sums, times = np.asarray(totals, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    sizes = np.asarray(weights, dtype=np.float64)
    least = 0.5 * float(times.min())
    if len(sums) >= 3 and np.ptp(sums) > 0.05 * sums.mean():
        enough = len(sums) >= ENOUGH
        sum_starts = _starts(sums, BENDS) if enough else [0.0]
        size_starts = _starts(sizes, FILLED) if enough and np.ptp(sizes) > 0 else []
        offset, by_sum, by_size = _fit_pieces(sums, sizes, times, sum_starts, size_starts)
        if min(by_sum) > FLATTEST:
            bends = tuple(zip(sum_starts[1:], by_sum[1:], strict=True))
            filled = tuple(zip(size_starts, by_size, strict=True)) if any(by_size) else ()
            return Correction(offset, by_sum[0], least, bends, filled)
    return Correction(0.0, float(np.median(times / sums)), least)


def _starts(values: Floats, shares: Sequence[float]) -> list[float]:
    """Where pieces begin: zero, and those shares of the largest value that have networks on both sides."""
    places = [float(values.max() * share) for share in shares]
    return [0.0, *(place for place in places if values.min() < place)]


def _fit_pieces(
    sums: Floats, sizes: Floats, times: Floats, sum_starts: list[float], size_starts: list[float]
) -> tuple[float, list[float], list[float]]:
    """The offset, and the slope of each piece: over the sum none below `FLATTEST`, over the weights none below zero."""
    scale, most = np.maximum(times, TINY * times.max()), float(times.max())
    parts: list[Floats] = [np.ones((len(times), 1))]
    pulls: list[Floats] = []
    units: list[float] = []
    for values, starts in ((sums, sum_starts), (sizes, size_starts)):
        if starts:  # both in units of the longest time, so that one strength of pull serves both
            units.append(float(values.max()) / most)
            edges = np.asarray([*starts, np.inf])
            parts.append(np.clip(values[:, None] - edges[:-1], 0.0, np.diff(edges)) / units[-1])
            pulls.append(np.diff(np.eye(len(starts)), axis=0))
    if size_starts:
        pulls[1] = np.concatenate([pulls[1], NEEDLESS * np.eye(len(size_starts))])
    pull = np.zeros((sum(map(len, pulls)), sum(part.shape[1] for part in parts)))
    row, column = 0, 1
    for each in pulls:
        pull[row : row + len(each), column : column + each.shape[1]] = each
        row, column = row + len(each), column + each.shape[1]
    matrix = np.concatenate(
        [np.concatenate(parts, axis=1) / scale[:, None], PULL * np.sqrt(len(times)) * pull]
    )
    target = np.concatenate([times / scale, np.zeros(len(pull))])
    lowest = np.concatenate(
        [[-np.inf], np.full(len(sum_starts), FLATTEST * units[0]), np.zeros(len(size_starts))]
    )
    found = _fitted(matrix, target, lowest, len(times))
    middle = 1 + len(sum_starts)
    by_sum = [float(value) / units[0] for value in found[1:middle]]
    return float(found[0]), by_sum, [float(value) / units[1] for value in found[middle:]]


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
