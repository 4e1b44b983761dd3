"""Statistics of run times: median, tail, spread and drift.

All runtimes (ONNX Runtime, TensorRT, the times file of trtexec) share these definitions, so that their numbers are
comparable. Only the standard library is needed, because the module also runs on the device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from export.errors import ExportError

STEADY_DRIFT = 0.10
"""Maximum relative difference between the last and the first third of a steady measurement."""


@dataclass(frozen=True)
class LatencyStats:
    """Latency of one network on one runtime, for one input of the file's batch size.

    Attributes:
        median_ms, p90_ms, p99_ms: Percentiles of the run times in milliseconds.
        mean_ms, min_ms, std_ms: Mean, minimum and standard deviation in milliseconds.
        runs: Number of timed runs, without warm-up.
        runtime, version: The runtime, such as "onnxruntime" "1.23.0".
        threads: Threads of the runtime; 0 if it has no such setting.
        drift: Median of the last third of the runs divided by that of the first third, minus one.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    std_ms: float
    runs: int
    runtime: str
    version: str
    threads: int
    drift: float

    @property
    def steady(self) -> bool:
        """Whether the drift is within `STEADY_DRIFT`."""
        return abs(self.drift) <= STEADY_DRIFT

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for a JSON file."""
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` (0 to 1) quantile of `values`, with linear interpolation as in numpy.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def drift_of(times_ms: Sequence[float]) -> float:
    """The relative slowdown of the last third of the runs against the first; 0 for fewer than six runs."""
    third = len(times_ms) // 3
    if third < 2:
        return 0.0
    return statistics.median(times_ms[-third:]) / statistics.median(times_ms[:third]) - 1.0


def summarise(times_ms: Sequence[float], *, runtime: str, version: str, threads: int = 0) -> LatencyStats:
    """Summarise run times in milliseconds, in the order of the runs.

    Raises:
        ExportError: there are no run times, or one of them is not a positive number.
    """
    times: list[float] = [float(value) for value in times_ms]
    if not times:
        raise ExportError("A latency needs at least one timed run, got none.")
    wrong = [value for value in times if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise ExportError(f"Run times must be positive milliseconds, got {wrong[0]!r}.")
    return LatencyStats(
        median_ms=percentile(times, 0.5),
        p90_ms=percentile(times, 0.9),
        p99_ms=percentile(times, 0.99),
        mean_ms=statistics.fmean(times),
        min_ms=min(times),
        std_ms=statistics.pstdev(times),
        runs=len(times),
        runtime=runtime,
        version=version,
        threads=threads,
        drift=drift_of(times),
    )
