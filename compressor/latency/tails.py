"""A percentile of single runs of two networks that were timed in turns, with its noise.

The undisturbed runs by which medians are judged say nothing of the slowest ones. A percentile is therefore that of all
single runs by the wall clock, whatever slowed them down: on a shared machine it includes the load of others.

What slows one run down slows its neighbours, so that the runs of a session are not independent, and rare events fall
into few sessions. The interval is that of the delete-a-group jackknife on logarithms, with the sessions as groups
(P. S. Kott, "The delete-a-group jackknife", Journal of Official Statistics 17, 2001): each session is left out once,
and the scatter of the results is the noise. With fewer than `FEWEST_BEYOND` runs beyond the percentile there is no
interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compressor.latency.machine import Floats

FEWEST_BEYOND = 10
"""Fewest runs of each network beyond the percentile for an interval."""


def percentile_ms(sessions: Sequence[Floats], percentile: float) -> float:
    """Return the percentile of the runs of all sessions."""
    return float(np.quantile(np.concatenate(sessions), percentile / 100))


def beyond(sessions: Sequence[Floats], percentile: float) -> float:
    """Return how many runs of all sessions lie beyond the percentile."""
    return sum(map(len, sessions)) * (1 - percentile / 100)


def percentile_interval(
    dense: Sequence[Floats], slim: Sequence[Floats], percentile: float, error: float, *, absolute: bool
) -> tuple[float, float]:
    """Return the logarithm of the slim network's percentile as a share of the dense one's, and its half width.

    Args:
        dense, slim: Milliseconds of the runs of each session.
        percentile: Percentile of the runs.
        error: Probability that the interval misses.
        absolute: Whether the interval is that of the slim network's own time, with the dense one's as a fixed unit;
            else it is that of their ratio.

    Returns:
        The logarithm and half the width of its interval; an infinite width if there are too few runs or sessions.
    """
    from scipy.stats import t

    unit = math.log(percentile_ms(dense, percentile))

    def logarithm(left_out: int | None) -> float:
        own, other = (
            math.log(percentile_ms([runs for place, runs in enumerate(each) if place != left_out], percentile))
            for each in (slim, dense)
        )
        return own - (unit if absolute else other)

    whole, count = logarithm(None), len(slim)
    if count < 2 or min(beyond(dense, percentile), beyond(slim, percentile)) < FEWEST_BEYOND:
        return whole, math.inf
    scatter = sum((logarithm(place) - whole) ** 2 for place in range(count))
    deviation = math.sqrt((count - 1) / count * scatter)
    return whole, float(t.ppf(1 - error / 2, count - 1)) * deviation
