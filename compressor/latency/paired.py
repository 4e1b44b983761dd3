"""Times two networks in turns until their ratio decides whether a target is met.

    timing = measured(Path("dense.onnx"), Path("slim.onnx"), threads=1, target=0.5)
    timing.ratio.value, timing.ratio.low, timing.ratio.high, timing.ratio.verdict(0.5)

Each network runs in its own warm process. The two processes alternate in short bursts, and are replaced by fresh ones
after about a second. One such pair of processes is called a session.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compressor.core.progress import bar
from compressor.latency.ort_process import BurstProcess
from compressor.latency.ratio import ERROR, LOOKS, Burst, PairSession, PairSessions, Ratio, error_at
from export.convert.ort import runtime
from export.engine.bench import LatencyStats, summarise

SHORTEST_S, LONGEST_S = 0.8, 4.0
"""Limits of the total burst time of one session, in seconds. Within them it equals the start-up time of its processes,
which is long on a loaded machine."""

FEWEST_PAIRS, MOST_PAIRS = 6, 150
COUNTED_MS, FEWEST_COUNTED, MOST_COUNTED = 12.0, 4, 100
"""Approximate total time of a burst's counted runs, and limits of their number."""

DROPPED_MS = 2.5
"""Time at the start of a burst that is not counted: the caches refill after the other network's burst."""

TAIL = 3.0
"""Ratio of the 99th percentile to the median from which the machine is reported as loaded."""

REPEATS = 5
SECONDS = 90.0


@dataclass(frozen=True)
class Timing:
    """Two networks that were timed in turns.

    Attributes:
        dense, slim: Wall-clock times of all counted runs, including the effect of other load.
        ratio: Slim time as a share of dense time, on an unloaded machine.
    """

    dense: LatencyStats
    slim: LatencyStats
    ratio: Ratio

    @property
    def noise(self) -> str:
        """Warning if many runs took far longer than the median; empty on a quiet machine."""
        if self.slim.p99_ms < TAIL * self.slim.median_ms:
            return ""
        return (
            f"The machine was not quiet while the latency was measured: one run in a hundred of the slim network took "
            f"{self.slim.p99_ms:.3g} ms or more, with a median of {self.slim.median_ms:.3g} ms. Use the ratio to the "
            "dense network, which was timed in turns with it."
        )


class Bursts(Protocol):
    """A network that is loaded and warm, and runs on request."""

    once_ms: float

    def burst(self, dropped: int, counted: int) -> Burst:
        """Run `counted` times after `dropped` runs that are not counted."""


def measured(
    dense: Path,
    slim: Path,
    threads: int = 1,
    repeats: int = REPEATS,
    target: float | None = None,
    seconds: float = SECONDS,
) -> Timing:
    """Time two ONNX files through ONNX Runtime on this machine's CPU.

    Args:
        dense, slim: The files.
        threads: Threads inside one operator.
        repeats: Number of sessions if there is no target.
        target: Share of the dense network's time that the slim one may take.
        seconds: Time limit.

    Raises:
        ExportError: ONNX Runtime rejects one of them, or its process has died.
    """

    def run_session() -> PairSession:
        begun = time.monotonic()
        with ExitStack() as stack:
            first, second = (
                stack.enter_context(closing(BurstProcess(path, threads))) for path in (dense, slim)
            )
            for child in (first, second):
                child.ready()
            return pair_session(first, second, seconds=time.monotonic() - begun)

    return in_turns(
        run_session,
        "onnxruntime",
        str(runtime().__version__),
        threads,
        repeats=repeats,
        target=target,
        seconds=seconds,
    )


def in_turns(
    run_session: Callable[[], PairSession],
    name: str,
    version: str,
    threads: int = 0,
    *,
    repeats: int = REPEATS,
    target: float | None = None,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Timing:
    """Run sessions until the target is outside the ratio's interval, the interval is near it, or the time is up.

    Args:
        run_session: Runs one session with fresh processes.
        name, version, threads: Name, version and thread count of the runtime.
        repeats, target, seconds: As in `measured`.
        clock: Monotonic clock in seconds.
    """
    found, begun = PairSessions(), clock()
    looks = {count: error_at(place) for place, count in enumerate(LOOKS)}
    most = repeats if target is None else LOOKS[-1]
    ratio = None
    with bar("Measuring latency", most if target is None else LOOKS[0]) as progress:
        while len(found.all) < most:
            found.all.append(run_session())
            spent, count = clock() - begun, len(found.all)
            late = spent * (count + 1) / count > seconds  # the next session would exceed the limit
            if target is not None and (count in looks or late):
                # when time runs out between looks, spend the error of the next look, which will not take place
                error = looks.get(count) or error_at(min(i for i, look in enumerate(LOOKS) if look > count))
                ratio = found.ratio(error, spent)
                if ratio.settled(target) or late:
                    break
            elif late:
                break
            progress.advance(1, note="" if ratio is None else f"{ratio.low:.3f}-{ratio.high:.3f} of dense")
    if target is None or ratio is None:
        ratio = found.ratio(ERROR, clock() - begun)
    dense, slim = (
        summarise(found.wall_ms(place), runtime=name, version=version, threads=threads) for place in (0, 1)
    )
    return Timing(dense, slim, ratio)


def pair_session(
    dense: Bursts, slim: Bursts, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
) -> PairSession:
    """Run pairs of bursts, each pair in the reverse order of the preceding one.

    Bursts of both networks have the same number of runs, so that their quantiles are comparable.

    Args:
        dense, slim: Networks that are loaded and warm.
        seconds: Total time of the bursts, clipped to `SHORTEST_S` and `LONGEST_S`.
        clock: Monotonic clock in seconds.
    """
    once = (dense.once_ms + slim.once_ms) / 2
    counted = max(FEWEST_COUNTED, min(MOST_COUNTED, round(COUNTED_MS / once)))
    dropped = max(1, round(DROPPED_MS / once))
    ends = clock() + min(max(seconds, SHORTEST_S), LONGEST_S)
    pairs: list[tuple[Burst, Burst]] = []
    while len(pairs) < FEWEST_PAIRS or (len(pairs) < MOST_PAIRS and clock() < ends):
        if len(pairs) % 2:
            later = slim.burst(dropped, counted)
            pairs.append((dense.burst(dropped, counted), later))
        else:
            pairs.append((dense.burst(dropped, counted), slim.burst(dropped, counted)))
    return pairs
