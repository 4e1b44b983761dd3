"""Parses durations such as `90s`, `5min` and `1h`."""

from __future__ import annotations

import math
import re

from compressor.core.errors import CompressorError

_UNITS_S = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def duration_s(text: str) -> float:
    """Return the seconds of `90s`, `5min` (or `5m`) or `1h`.

    Raises:
        CompressorError: The text has another form, or the duration is not above zero.

    >>> duration_s("1.5min")
    90.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|min|m|h)\s*", text, re.ASCII)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise CompressorError(f"{text!r} is not a duration.", "Write 90s, 5min or 1h.")
    return seconds
