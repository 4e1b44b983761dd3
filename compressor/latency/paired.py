"""Two networks timed in turns until what their ratio says of a target is known.

    timing = measured(Path("dense.onnx"), Path("slim.onnx"), threads=1, target=0.5)
    timing.ratio.value, timing.ratio.low, timing.ratio.high, timing.ratio.verdict(0.5)

Each network runs in a warm process of its own; the two take turns in short bursts, and after a second or so both
processes give way to fresh ones.
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
from compressor.latency.ratio import ERROR, LOOKS, Burst, Ratio, Sitting, Sittings, error_at
from export.convert.ort import runtime
from export.engine.stats import LatencyStats, summarise

SHORTEST_S, LONGEST_S = 0.8, 4.0
"""Bursts of one sitting take as long together as its processes took to start, which is long on a busy machine,
within these limits."""

FEWEST_PAIRS, MOST_PAIRS = 6, 150
COUNTED_MS, FEWEST_COUNTED, MOST_COUNTED = 12.0, 4, 100
"""A burst's runs that count take about this long together."""

DROPPED_MS = 2.5
"""What the other network has put out of the caches is back after about this long; as much is not counted."""

TAIL = 3.0
"""Where a hundredth of the runs takes this many times the median, others use the machine."""

REPEATS = 5
SECONDS = 90.0


@dataclass(frozen=True)
class Timing:
    """Two networks that were timed in turns.

    Attributes:
        dense, slim: Every run that counted, on the wall's clock: what a user of this machine met meanwhile.
        ratio: The slim network's time as a share of the dense one's, on the quiet machine.
    """

    dense: LatencyStats
    slim: LatencyStats
    ratio: Ratio

    @property
    def noise(self) -> str:
        """What to say where many runs took far longer than the usual one; empty on a quiet machine."""
        if self.slim.p99_ms < TAIL * self.slim.median_ms:
            return ""
        return (
            f"The machine was not quiet while the latency was measured: one run in a hundred of the slim network took "
            f"{self.slim.p99_ms:.3g} ms or more at a median of {self.slim.median_ms:.3g} ms. The ratio to the dense "
            "network, which was timed in turns with it, counts."
        )


class Bursts(Protocol):
    """A network that is loaded and warm; its runs take place when they are asked for."""

    once_ms: float

    def burst(self, dropped: int, counted: int) -> Burst:
        """Run it so often, and more often before that without counting."""


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
        repeats: Sittings where there is no target.
        target: The share of the dense network's time that the slim one may take.
        seconds: The longest that it may take.

    Raises:
        ExportError: ONNX Runtime refuses one of them, or a process that ran it has died.
    """

    def sit() -> Sitting:
        begun = time.monotonic()
        with ExitStack() as stack:
            first, second = (
                stack.enter_context(closing(BurstProcess(path, threads))) for path in (dense, slim)
            )
            for child in (first, second):
                child.ready()
            return sitting(first, second, seconds=time.monotonic() - begun)

    return in_turns(
        sit,
        "onnxruntime",
        str(runtime().__version__),
        threads,
        repeats=repeats,
        target=target,
        seconds=seconds,
    )


def in_turns(
    sit: Callable[[], Sitting],
    name: str,
    version: str,
    threads: int = 0,
    *,
    repeats: int = REPEATS,
    target: float | None = None,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Timing:
    """Sit until the target is outside the ratio's interval, or the interval near it, or the time is up.

    Args:
        sit: One sitting with fresh processes.
        name, version, threads: Of the runtime.
        repeats, target, seconds: As for `measured`.
        clock: Seconds from some moment on.
    """
    found, begun = Sittings(), clock()
    looks = {count: error_at(place) for place, count in enumerate(LOOKS)}
    most = repeats if target is None else LOOKS[-1]
    ratio = None
    with bar("Measuring latency", most if target is None else LOOKS[0]) as progress:
        while len(found.all) < most:
            found.all.append(sit())
            spent, count = clock() - begun, len(found.all)
            late = spent * (count + 1) / count > seconds  # the next one would end too late
            if target is not None and (count in looks or late):
                # out of turn at the end of the time: what is left to spend on the looks that do not come
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


def sitting(
    dense: Bursts, slim: Bursts, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
) -> Sitting:
    """Pairs of bursts in turns, each pair in the other order than the one before it.

    Both networks have as many runs in a burst, so that the quantiles of their bursts are alike.

    Args:
        dense, slim: Warm.
        seconds: How long the bursts take together, within `SHORTEST_S` and `LONGEST_S`.
        clock: Seconds from some moment on.
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
