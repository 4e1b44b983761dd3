"""Fits a network's time to measurements: a surface for each operator, and a correction for the whole network.

Runtimes compute channels in blocks: ONNX Runtime pads them to 8 or 16, tensor cores to 8 or 32. An operator's time is
therefore a staircase, and a value between two grid points depends on the position of the next step. It is modelled as a
sum, with non-negative coefficients, of terms that follow the kernels:

    blocks of input, of output, their product          the vectorised kernel with its padding
    channels, their product                            the part that is not padded (memory traffic, other kernels)
    fewer inputs than a block                          the kernel that reads the unblocked layout
    channels that do not fit the layout                the fall-back kernel and the change of layout around it
    channels that do not fill their last block         additions and pooling that then run outside the blocked layout

Non-negative coefficients keep the fit sane between and beyond noisy points.

A network's time is not the sum of its operators' times. The profiler adds time to each kernel, the runtime adds time to
the whole, and the weights of a small network stay in faster caches than those of a large one. First, each kind of
term of the operators' times gets a factor. Then a piecewise linear function of their sum and of the number of weights
gives the network's time; neighbouring slopes are regularised towards one another. Both steps are fitted to whole
networks that were measured end to end. Errors are relative to the time. Large errors count less, because background
load may have slowed any measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ALIGNMENT = 4
"""Channel counts that are not a multiple of this have no blocked layout in ONNX Runtime."""

KINDS = (
    "launch", "blocks", "blocks", "padded work", "channels", "channels", "work", "work", "work",
    "launch", "launch", "launch", "misfit", "misfit", "misfit", "misfit", "misfit",
    "ragged", "ragged", "ragged", "ragged", "ragged",
)  # fmt: skip
"""Kind of each term, in order: terms of one kind share systematic errors."""

_RIDGE = 1e-3
"""Ridge term, as a share of a term's norm: decides between nearly equal terms."""


@dataclass(frozen=True)
class Surface:
    """One operator's milliseconds over (input channels, output channels).

    Attributes:
        coefficients: (TERMS,), in milliseconds; none is negative.
        floor: Smallest time that is returned, in milliseconds.
        inputs, outputs: Smallest and largest measured channel count.
    """

    coefficients: Floats
    floor: float
    inputs: tuple[int, int]
    outputs: tuple[int, int]

    def covers(self, c_in: tuple[int, int], c_out: tuple[int, int]) -> bool:
        """Whether these (smallest, largest) ranges of channel counts lie inside the measured ranges."""
        return all(
            measured[0] <= requested[0] and requested[1] <= measured[1]
            for measured, requested in ((self.inputs, c_in), (self.outputs, c_out))
        )


class Surfaces:
    """The surfaces of a network's operators, evaluated together.

    Args:
        surfaces: One for each operator.
        block: Channels of a vector block.
        factors: Factor for the terms of each kind, in order of first occurrence in `KINDS`; empty for none.
    """

    def __init__(self, surfaces: Sequence[Surface], block: int, factors: Sequence[float] = ()) -> None:
        self._coefficients = np.stack([surface.coefficients for surface in surfaces])
        if factors:
            by_kind = dict(zip(dict.fromkeys(KINDS), factors, strict=True))
            self._coefficients = self._coefficients * np.asarray([by_kind[kind] for kind in KINDS])
        self._floor = np.asarray([surface.floor for surface in surfaces])
        self._block = block

    def __call__(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> Floats:
        """Milliseconds from the channel counts of each operator of each candidate, all (N, operators).

        An operator without channels is not there, and takes no time.
        """
        total = np.zeros(np.shape(c_in))
        for place, term in enumerate(_terms(c_in, c_out, self._block)):
            total += term * self._coefficients[:, place]
        return np.asarray(np.maximum(total, self._floor * (np.asarray(c_out) > 0)))

    def by_kind(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> Floats:
        """Return the summed milliseconds of all operators by kind of term, (N, kinds), from (N, operators)."""
        parts = {kind: np.zeros(len(np.asarray(c_in))) for kind in KINDS}
        for place, term in enumerate(_terms(c_in, c_out, self._block)):
            parts[KINDS[place]] += (term * self._coefficients[:, place]).sum(axis=1)
        return np.stack(list(parts.values()), axis=1)


def fit_surface(c_in: Sequence[int], c_out: Sequence[int], ms: Sequence[float], block: int) -> Surface:
    """Fit the surface of one operator.

    Args:
        c_in, c_out: Channel counts of the measured points.
        ms: Their times in milliseconds, all above zero. Errors are relative to the time, so that narrow
            candidates are predicted as well as wide ones.
        block: Channels of a vector block.
    """
    from scipy.optimize import nnls

    inputs, outputs, times = np.asarray(c_in), np.asarray(c_out), np.asarray(ms, dtype=np.float64)
    terms = np.stack(_terms(inputs, outputs, block), axis=-1)
    weight = 1.0 / np.maximum(times, 0.1 * float(np.median(times)))
    weighted = terms * weight[:, None]
    ridge = _RIDGE * np.diag(np.linalg.norm(weighted, axis=0))
    target = np.concatenate([times * weight, np.zeros(terms.shape[1])])
    coefficients, _ = nnls(np.concatenate([weighted, ridge]), target)
    return Surface(
        coefficients=np.asarray(coefficients, dtype=np.float64),
        floor=0.5 * float(times.min()),
        inputs=(int(inputs.min()), int(inputs.max())),
        outputs=(int(outputs.min()), int(outputs.max())),
    )


def _terms(c_in: npt.ArrayLike, c_out: npt.ArrayLike, block: int) -> list[Floats]:
    """The terms at each pair of channel counts; zeros for an operator that is not there."""
    a, b = np.asarray(c_in, dtype=np.float64), np.asarray(c_out, dtype=np.float64)
    one = 1.0 * (b > 0)
    blocks_a, blocks_b = np.ceil(a / block), np.ceil(b / block)
    narrow, wide = one * (a < block), one * (a >= block)
    misfit_a, misfit_b = one * (np.mod(a, ALIGNMENT) != 0), one * (np.mod(b, ALIGNMENT) != 0)
    ragged_a, ragged_b = one * (np.mod(a, block) != 0), one * (np.mod(b, block) != 0)
    a, b = a / block, b / block
    return [
        one, blocks_a, blocks_b, blocks_a * blocks_b,
        a, b, a * b, blocks_a * b, a * blocks_b,
        narrow, narrow * blocks_b, wide,
        misfit_a, misfit_a * b, misfit_a * a * b, misfit_b, misfit_b * b,
        ragged_a, ragged_a * a, ragged_b, ragged_b * b, ragged_b * blocks_a * blocks_b,
    ]  # fmt: skip



SMALL_NETWORK = 0.03
"""Below this share of the largest network's time errors count as absolute: no budget requests such small networks."""

SUM_BREAKPOINTS = (0.15, 0.3, 0.55)
"""Breakpoints of the correction over the sum, as shares of the largest measured sum."""

WEIGHT_BREAKPOINTS = (0.04, 0.08, 0.16, 0.32, 0.64)
"""Breakpoints over the weights, as shares of the largest measured number: weights fill one cache after another."""

ENOUGH_NETWORKS = 20
"""Number of networks from which breakpoints and weights are used."""

FACTOR_PULL = 0.05
"""Regularisation of the factors of all kinds of terms towards one value: the error equivalent to a difference of 1."""

SLOPE_PULL = 0.02
"""Regularisation of neighbouring slopes towards each other: the error equivalent to a difference of 1."""

WEIGHT_PULL = 0.3
"""Regularisation of the slopes over the weights towards zero, as a share of `SLOPE_PULL`."""

HUBER_MULTIPLE = 1.5
"""Huber threshold, as a multiple of the median error: larger errors count linearly, not squared."""

MIN_HUBER_THRESHOLD = 0.005
"""Lower bound of the Huber threshold: errors below this share occur on any machine."""

REFITS = 5
MIN_SLOPE = 1e-6
"""Smallest allowed slope over the sum."""


@dataclass(frozen=True)
class HeldOut:
    """Prediction errors on networks that the table was not fitted to.

    Attributes:
        networks: Number of networks.
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
"""(start, slope) of each linear piece, in ascending order."""


@dataclass(frozen=True)
class Correction:
    """Maps the sum of operator times and the number of weights to the time of the whole network.

    Attributes:
        offset: Constant milliseconds of every network; negative where the profiler added more than the runtime.
        slope: Slope over the sum up to the first breakpoint; above zero.
        least: Lower bound of the prediction, in milliseconds.
        bends: (sum in milliseconds, slope from there on), ascending.
        weights: (number of weight elements, milliseconds per element from there on), ascending; none negative.
    """

    offset: float
    slope: float
    least: float = 0.0
    bends: Pieces = ()
    weights: Pieces = ()

    def __call__(self, total: npt.ArrayLike, weights: npt.ArrayLike) -> Floats:
        """Return the whole network's milliseconds; non-decreasing in the sum and in the weights."""
        by_sum = _piecewise_linear(((0.0, self.slope), *self.bends), np.asarray(total, dtype=np.float64))
        by_weights = _piecewise_linear(self.weights, np.asarray(weights, dtype=np.float64))
        return np.asarray(np.maximum(self.offset + by_sum + by_weights, self.least))


def _piecewise_linear(pieces: Pieces, values: Floats) -> Floats:
    """Evaluate a piecewise linear function that is zero at zero."""
    total, slope = np.zeros_like(values), 0.0
    for start, after in pieces:
        total = total + (after - slope) * np.maximum(values - start, 0.0)
        slope = after
    return total


def fit_factors(parts: Floats, measured: Sequence[float]) -> tuple[float, ...]:
    """Fit a non-negative factor for each kind of term of the operators' times.

    Args:
        parts: Milliseconds of all operators of each network by kind, (N, kinds), from `Surfaces.by_kind`.
        measured: End-to-end milliseconds of each network, (N,).

    Returns:
        Factors, (kinds,), or () with fewer than `ENOUGH_NETWORKS` networks.
    """
    if len(measured) < ENOUGH_NETWORKS:
        return ()
    times, kinds = np.asarray(measured, dtype=np.float64), parts.shape[1]
    scale, pull = np.maximum(times, SMALL_NETWORK * times.max()), FACTOR_PULL * np.sqrt(len(times))
    usual = float(np.median(times / parts.sum(axis=1)))
    rows = np.concatenate([np.ones((len(times), 1)), parts], axis=1) / scale[:, None]
    alike = pull * np.eye(kinds + 1)[1:]
    target = np.concatenate([times / scale, np.full(kinds, pull * usual)])
    lowest = np.concatenate([[-np.inf], np.zeros(kinds)])
    found = _robust_least_squares(np.concatenate([rows, alike]), target, lowest, len(times))
    return tuple(float(value) for value in found[1:])


def _robust_least_squares(matrix: Floats, target: Floats, lowest: Floats, networks: int) -> Floats:
    """Solve a bounded least-squares problem, reweighted with Huber's weights to limit the effect of outliers.

    Args:
        matrix, target: First one row per network, divided by its time; then the rows of the regularisation.
        lowest: Lower bound of each coefficient.
        networks: Number of rows that are networks.
    """
    from scipy.optimize import lsq_linear

    weights = np.ones(len(target))
    for _ in range(REFITS):
        found = lsq_linear(matrix * weights[:, None], target * weights, bounds=(lowest, np.inf)).x
        off = np.abs(matrix @ found - target)[:networks]
        usual = max(HUBER_MULTIPLE * float(np.median(off)), MIN_HUBER_THRESHOLD)
        weights[:networks] = np.sqrt(usual / np.maximum(off, usual))
    return np.asarray(found)


def fit_correction(
    totals: Sequence[float], weights: Sequence[float], measured: Sequence[float]
) -> Correction:
    """Fit the correction to measured networks.

    From `ENOUGH_NETWORKS` networks on the fit is piecewise linear. Fewer give a line. One or two give a factor.

    Args:
        totals: Sum of the operator times of each network, in milliseconds, (N,).
        weights: Number of weight elements of each network, (N,).
        measured: End-to-end milliseconds of each network, (N,).
    """
    sums, times = np.asarray(totals, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    sizes = np.asarray(weights, dtype=np.float64)
    least = 0.5 * float(times.min())
    if len(sums) >= 3 and np.ptp(sums) > 0.05 * sums.mean():
        enough = len(sums) >= ENOUGH_NETWORKS
        sum_starts = _starts(sums, SUM_BREAKPOINTS) if enough else [0.0]
        size_starts = _starts(sizes, WEIGHT_BREAKPOINTS) if enough and np.ptp(sizes) > 0 else []
        offset, by_sum, by_size = _fit_pieces(sums, sizes, times, sum_starts, size_starts)
        if min(by_sum) > MIN_SLOPE:
            bends = tuple(zip(sum_starts[1:], by_sum[1:], strict=True))
            filled = tuple(zip(size_starts, by_size, strict=True)) if any(by_size) else ()
            return Correction(offset, by_sum[0], least, bends, filled)
    return Correction(0.0, float(np.median(times / sums)), least)


def _starts(values: Floats, shares: Sequence[float]) -> list[float]:
    """Return the start of each piece: zero, and the shares of the largest value with networks on both sides."""
    places = [float(values.max() * share) for share in shares]
    return [0.0, *(place for place in places if values.min() < place)]


def _fit_pieces(
    sums: Floats, sizes: Floats, times: Floats, sum_starts: list[float], size_starts: list[float]
) -> tuple[float, list[float], list[float]]:
    """Return the offset, the slopes over the sum (at least `MIN_SLOPE`) and those over the weights (at least zero)."""
    scale, most = np.maximum(times, SMALL_NETWORK * times.max()), float(times.max())
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
        pulls[1] = np.concatenate([pulls[1], WEIGHT_PULL * np.eye(len(size_starts))])
    pull = np.zeros((sum(map(len, pulls)), sum(part.shape[1] for part in parts)))
    row, column = 0, 1
    for each in pulls:
        pull[row : row + len(each), column : column + each.shape[1]] = each
        row, column = row + len(each), column + each.shape[1]
    matrix = np.concatenate(
        [np.concatenate(parts, axis=1) / scale[:, None], SLOPE_PULL * np.sqrt(len(times)) * pull]
    )
    target = np.concatenate([times / scale, np.zeros(len(pull))])
    lowest = np.concatenate(
        [[-np.inf], np.full(len(sum_starts), MIN_SLOPE * units[0]), np.zeros(len(size_starts))]
    )
    found = _robust_least_squares(matrix, target, lowest, len(times))
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
    """Return the rank correlation; 1 where either input is constant, because there is no order to predict."""
    from scipy.stats import rankdata

    ranks = [np.asarray(rankdata(values), dtype=np.float64) for values in (first, second)]
    if len(first) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
