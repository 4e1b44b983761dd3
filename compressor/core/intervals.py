"""95 % intervals of measured ratios: whether one says anything."""

from __future__ import annotations

import math

WIDEST = 10.0
"""Largest quotient of the ends of an interval that says something; a wider one counts as not known."""


def known_ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    """Return the ends of an interval; None if one is missing or infinite, or if they are too far apart.

    Args:
        low, high: Its ends; None or infinite if they are not known.
    """
    if low is None or high is None or not math.isfinite(high) or high > WIDEST * low:
        return None
    return low, high
