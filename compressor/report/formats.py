"""Format numbers for people: three significant digits, a unit, and a dash for a missing value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compressor.core.intervals import known_ends
from compressor.core.metrics import Metric

ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
LARGEST = 1e30  # far above anything that a run counts or measures; NaN and infinity are excluded too
PERCENTILES = {50: "median"}


def number(value: Any) -> float | None:
    """Return `value` if it is a plausible number, else None: a file's `null`, a string or `true` is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return None
    return float(value)


def ratio(part: Any, whole: Any) -> float | None:
    """Return `part / whole`, or None if either is missing or the whole is not above zero."""
    top, bottom = number(part), number(whole)
    return None if top is None or bottom is None or bottom <= 0 else top / bottom


def significant(value: float, digits: int = 3) -> str:
    """Format `value` with that many significant digits and no exponent: 0.0123, 1.45, 123, 12,346."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), 9)}f}".replace("-", MINUS)


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for size, prefix in steps:
        if abs(value) >= size:
            return f"{significant(value / size)} {prefix}"
    return significant(value) if value != int(value) else f"{int(value):,}"


def milliseconds(value: Any) -> str:
    """Format as 1.45 ms, with at most microseconds of noise shown."""
    known = number(value)
    return ABSENT if known is None else f"{significant(known)} ms"


def count(value: Any) -> str:
    """Format MACs or parameters: 1.34 G, 25.6 M, 960."""
    known = number(value)
    return ABSENT if known is None else _scaled(known, ((1e9, "G"), (1e6, "M"), (1e3, "k")))


def size(value: Any) -> str:
    """Format bytes in decimal units: 94.1 MB, 1.2 kB, 512 B."""
    known = number(value)
    if known is None:
        return ABSENT
    text = _scaled(known, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))
    return text if text.endswith("B") else f"{text} B"


def percent(fraction: Any, digits: int = 1) -> str:
    """Format a fraction as per cent; a change too small for its digits is never printed as zero."""
    known = number(fraction)
    if known is None:
        return ABSENT
    if known != 0 and abs(known) * 100 < 0.5 * 10**-digits:
        return f"<{10**-digits:.{digits}f}%"
    return f"{known * 100:.{digits}f}%".replace("-", MINUS)


def percent_within(fraction: Any, interval: Sequence[float | None]) -> str:
    """Format a measured ratio with its interval: 49.8% (49.4% to 50.2%); without one if its lower end is None."""
    low, high = interval
    if low is None:
        return percent(fraction)
    ends = known_ends(low, high)
    reach = "interval not known" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"
    return f"{percent(fraction)} ({reach})"


def score(value: Any, metric: Metric) -> str:
    """Format a score: a share as per cent with two decimals, 98.06%, another number with four digits, 31.42."""
    known = number(value)
    if metric.share or known is None:
        return percent(value, digits=2)
    return significant(known, 4)


def score_change(change: Any, metric: Metric) -> str:
    """Format a difference of two scores: -0.28 points of shares, -0.31 of other numbers."""
    known = number(change)
    if metric.share or known is None:
        return points(change)
    return f"{'+' if known > 0 else ''}{significant(known)}"


def points(change: Any) -> str:
    """Format a difference of two shares in percentage points: -0.28 points."""
    known = number(change)
    if known is None:
        return ABSENT
    text = f"{abs(known) * 100:.2f}"
    sign = "" if float(text) == 0 else "+" if known > 0 else MINUS
    return f"{sign}{text} points"


def duration(seconds: Any) -> str:
    """Format as 0.4 s, 47 s, 3 min 34 s, 2 h 05 min."""
    known = number(seconds)
    if known is None:
        return ABSENT
    if known < 10:
        return f"{known:.1f} s"
    whole = round(known)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def cost(value: Any, unit: str) -> str:
    """Format a budget's value in its unit: ms, MACs, params, bytes, or the unit of a function budget."""
    known = number(value)
    if known is None:
        return ABSENT
    if unit == "ms":
        return milliseconds(known)
    if unit == "bytes":
        return size(known)
    if unit in ("MACs", "params"):
        return f"{count(known)} {unit}"
    return f"{significant(known)} {unit}".rstrip()


def percentile_name(value: Any) -> str:
    """Name the percentile of a latency: median, p90."""
    known = number(value)
    if known is None:
        return "percentile not recorded"
    return PERCENTILES.get(int(known), f"p{known:g}")
