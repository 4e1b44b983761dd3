"""Latency of an ONNX file on this machine with ONNX Runtime."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

from export.convert.ort import (
    CPU,
    ModelSource,
    describe,
    first_line,
    open_session,
    ort_errors,
    random_feeds,
    runtime,
)
from export.engine.stats import LatencyStats, summarise
from export.errors import ExportError

MIN_RUNS = 7


class OnnxRunner:
    """A loaded network with bound inputs and outputs, to be run repeatedly.

    Inputs and outputs are bound once; converting them for each run would dominate the time of a small operator.

    Args:
        model: The ONNX file or its bytes; dynamic dimensions become 1.
        threads: Intra-op threads.
        providers: ONNX Runtime's execution providers.
        seed: Seed of the random input.
    """

    def __init__(
        self, model: ModelSource, *, threads: int = 1, providers: Sequence[str] = CPU, seed: int = 0
    ) -> None:
        self.name = describe(model)
        self.threads = threads
        self.session = open_session(model, threads=threads, providers=providers)
        self._binding = self.session.io_binding()
        for name, value in random_feeds(self.session, seed=seed).items():
            self._binding.bind_cpu_input(name, value)
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

    def summarise(self, times_ms: Sequence[float]) -> LatencyStats:
        """Summarise run times of this network."""
        return summarise(
            times_ms, runtime="onnxruntime", version=str(runtime().__version__), threads=self.threads
        )


def run_for(runner: OnnxRunner, seconds: float) -> list[float]:
    """Run for `seconds` and at least 7 times; return the milliseconds of each run, in order."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < MIN_RUNS or time.perf_counter() < end:
        times.extend(runner.time(MIN_RUNS))
    return times
