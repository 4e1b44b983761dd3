"""Latency: statistics of run times, and times of ONNX files on this machine with ONNX Runtime.

All runtimes (ONNX Runtime, TensorRT, the times file of trtexec) share the statistics, so that their numbers are
comparable. They need only the standard library.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Callable, TypeVar

from export.convert.ort import (
    CPU,
    ModelSource,
    check_threads,
    describe,
    first_line,
    open_session,
    ort_errors,
    random_feeds,
    runtime,
)
from export.errors import ExportError

T = TypeVar("T")

MIN_RUNS = 7
STEADY_DRIFT = 0.10
"""Maximum relative difference between the last and the first third of a steady measurement."""


@dataclass(frozen=True)
class LatencyStats:
    """Latency of one network on one runtime, for one run of the file's batch size.

    Attributes:
        median_ms, p90_ms, p99_ms: Percentiles of the run times in milliseconds.
        mean_ms, min_ms, std_ms: Mean, minimum and standard deviation in milliseconds.
        runs: Number of timed runs, without warm-up.
        runtime, version: The runtime, such as "onnxruntime" "1.23.0".
        threads: Threads of the runtime; 0 if it has no such setting.
        drift: Median of the last third of the runs divided by that of the first third, minus one.
        batch: Inputs of one run.
        streams: Copies of the network that ran at the same time; each run met the load of the others.
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
    batch: int = 1
    streams: int = 1

    @property
    def inputs_per_s(self) -> float:
        """Throughput: inputs that all copies complete in a second, run after run."""
        return 1e3 * self.batch * self.streams / self.mean_ms

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


def summarise(
    times_ms: Sequence[float], *, runtime: str, version: str, threads: int = 0, batch: int = 1, streams: int = 1
) -> LatencyStats:
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
        batch=batch,
        streams=streams,
    )


class OnnxRunner:
    """A loaded network with bound inputs and outputs, to be run repeatedly.

    Inputs and outputs are bound once; converting them for each run would dominate the time of a small operator.

    Args:
        model: The ONNX file or its bytes.
        threads: Intra-op threads, at most as many as there are cores.
        providers: ONNX Runtime's execution providers.
        seed: Seed of the random input.
        batch: Size of dynamic dimensions.

    Attributes:
        batch: Inputs of one run: the first dimension of the first input.
    """

    def __init__(
        self,
        model: ModelSource,
        *,
        threads: int = 1,
        providers: Sequence[str] = CPU,
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        check_threads(threads)
        self.name = describe(model)
        self.threads = threads
        self.session = open_session(model, threads=threads, providers=providers)
        self._binding = self.session.io_binding()
        feeds = random_feeds(self.session, seed=seed, batch=batch)
        for name, value in feeds.items():
            self._binding.bind_cpu_input(name, value)
        first = next(iter(feeds.values()), None)
        self.batch = 1 if first is None or not first.ndim else len(first)
        for output in self.session.get_outputs():
            self._binding.bind_output(output.name)
        self._errors = ort_errors()

    def run(self) -> None:
        """Run once.

        Raises:
            ExportError: an operator fails on the random input.
        """
        try:
            self.session.run_with_iobinding(self._binding)
        except self._errors as error:
            raise ExportError(f"{self.name} cannot be run: {first_line(error)}.") from error

    def time(self, runs: int) -> list[float]:
        """Run `runs` times and return the milliseconds of each run, in order."""
        run, clock, binding = self.session.run_with_iobinding, time.perf_counter_ns, self._binding
        times: list[float] = []
        collecting = gc.isenabled()
        gc.disable()  # a collection during a run would be counted as the network's time
        try:
            for _ in range(runs):
                start = clock()
                run(binding)
                times.append((clock() - start) / 1e6)
        finally:
            if collecting:
                gc.enable()
        return times

    def warm_up(self, seconds: float) -> float:
        """Run for at least `seconds` and at least once; return the milliseconds of the fastest run."""
        self.run()
        end = time.perf_counter() + seconds
        fastest = min(self.time(1))
        while time.perf_counter() < end:
            fastest = min(fastest, *self.time(1))
        return fastest

    def summarise(self, times_ms: Sequence[float], streams: int = 1) -> LatencyStats:
        """Summarise run times of this network, of which `streams` copies ran at the same time."""
        return summarise(
            times_ms,
            runtime="onnxruntime",
            version=str(runtime().__version__),
            threads=self.threads,
            batch=self.batch,
            streams=streams,
        )


def together(runners: Sequence[OnnxRunner], work: Callable[[OnnxRunner], T]) -> list[T]:
    """Call `work` for several loaded networks at the same time, each in a thread of its own; return its results.

    A network whose work is done goes on running until the last one has done its own: every run of `work` meets the
    load of all others.
    """
    if len(runners) == 1:
        return [work(runners[0])]
    ready, done = threading.Barrier(len(runners)), [False] * len(runners)

    def loaded(place: int) -> T:
        ready.wait()
        try:
            result = work(runners[place])
        finally:
            done[place] = True
        while not all(done):
            runners[place].run()
        return result

    with ThreadPoolExecutor(len(runners)) as pool:
        return list(pool.map(loaded, range(len(runners))))


@contextmanager
def running(runners: Sequence[OnnxRunner]) -> Iterator[None]:
    """Run networks without a pause, each in a thread of its own, while the block runs."""
    stop = threading.Event()

    def loop(runner: OnnxRunner) -> None:
        while not stop.is_set():
            runner.run()

    with ThreadPoolExecutor(max(1, len(runners))) as pool:
        loops = [pool.submit(loop, runner) for runner in runners]
        try:
            yield
        finally:
            stop.set()
        for each in loops:
            each.result()


def merged(times_ms: Sequence[Sequence[float]]) -> list[float]:
    """Return the runs of several networks in about the order in which they ended."""
    return [each for row in zip_longest(*times_ms) for each in row if each is not None]


def run_for(runner: OnnxRunner, seconds: float) -> list[float]:
    """Run for `seconds` and at least 7 times; return the milliseconds of each run, in order."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < MIN_RUNS or time.perf_counter() < end:
        times.extend(runner.time(MIN_RUNS))
    return times
