"""The power of a Jetson module, from the lines that `tegrastats` prints.

A line has the power of each rail as `VDD_IN 5032mW/4983mW`, present and mean; older versions leave the unit out, which
is milliwatts as well. Rails differ by module: most have one that feeds the whole module, the AGX modules have parts
that add up to it.
"""

from __future__ import annotations

import re
import statistics
from typing import Mapping

from export.errors import ExportError

WHOLE = ("VDD_IN", "POM_5V_IN", "VIN")
"""Rails that feed a whole module: TX2, Xavier NX, Orin Nano and NX; Nano; Thor."""

PARTS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
"""Rails that add up to a whole module: AGX Orin; AGX Xavier."""

FEWEST = 10
"""Fewest readings of a measurement."""

_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d{1,7})(?:mW)?/\d{1,7}(?:mW)?(?!\S)")


def rails_of(line: str) -> Mapping[str, int]:
    """The present power of each rail in milliwatts.

    >>> rails_of("RAM 2448/7764MB (lfb 4x4MB) GR3D_FREQ 99% VDD_IN 5032mW/4983mW VDD_SOC 1435mW/1404mW")
    {'VDD_IN': 5032, 'VDD_SOC': 1435}
    """
    return {name: int(value) for name, value in _RAIL.findall(line)}


def whole_mw(line: str) -> float | None:
    """The power of the whole module in milliwatts; None if the line does not have it."""
    rails = rails_of(line)
    for name in WHOLE:
        if name in rails:
            return float(rails[name])
    for parts in PARTS:
        if all(name in rails for name in parts):
            return float(sum(rails[name] for name in parts))
    return None


def typical_mw(text: str, name: str) -> float:
    """The median power of the whole module over all lines.

    The network runs in most of them: the few readings before and after it do not change the median.

    Args:
        text: Lines of tegrastats.
        name: Their origin, for messages.

    Raises:
        ExportError: there are too few readings, or none of a whole module.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    found = [power for power in map(whole_mw, lines) if power is not None and power > 0]
    if len(found) < FEWEST:
        rails = ", ".join(sorted({rail for line in lines for rail in rails_of(line)})) or "no rail"
        raise ExportError(
            f"{name} has {len(found)} readings of the whole module's power, at least {FEWEST} are needed (its rails: "
            f"{rails}).",
            "Energy needs tegrastats of a Jetson with a power monitor; measure for longer if it has one.",
        )
    return statistics.median(found)
