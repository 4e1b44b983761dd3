"""What a list of run times says: median, tail, spread, and whether the machine held still meanwhile.

Used for every runtime alike (ONNX Runtime, TensorRT, the times file of trtexec), so that numbers can be laid
side by side. Needs nothing but the standard library, because it also runs on the device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from export.errors import ExportError

STEADY_DRIFT = 0.10
"""A measurement whose last third is this share slower or faster than its first is not called steady."""


@dataclass(frozen=True)
class LatencyStats:
    """The run times of one network on one runtime, for one input of the batch that the file states.

    Attributes:
        median_ms, p90_ms, p99_ms: Percentiles of the run times in milliseconds.
        mean_ms, min_ms, std_ms: Mean, fastest and standard deviation in milliseconds.
        runs: How many runs were timed; warm-up runs are not among them.
        runtime, version: What ran it, such as "onnxruntime" "1.23.0".
        threads: Threads that the runtime was given; 0 where it has no such setting.
        drift: Median of the last third of the runs over that of the first third, minus one.
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
        """Whether the machine ran as fast at the end as at the start."""
        return abs(self.drift) <= STEADY_DRIFT

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for a JSON file."""
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` (0 to 1) quantile of `values`, linear between neighbours, as numpy's default.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def drift_of(times_ms: Sequence[float]) -> float:
    """How much slower the last third of the runs was than the first, a share; 0 for fewer than six runs."""
    third = len(times_ms) // 3
    if third < 2:
        return 0.0
    return statistics.median(times_ms[-third:]) / statistics.median(times_ms[:third]) - 1.0


def summarise(times_ms: Sequence[float], *, runtime: str, version: str, threads: int = 0) -> LatencyStats:
    """Summarise run times given in milliseconds and in the order in which they were taken.

    Raises:
        ExportError: there are no run times, or one of them is no positive number.
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
