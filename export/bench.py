"""How long an ONNX file takes on this machine through ONNX Runtime.

One network by itself (`measure_onnx`), or several in turns (`compare_onnx`), so that a machine that slows
down for a while slows all of them alike and the ratio between them stays right.

    stats = measure_onnx("model.onnx", threads=2)
    stats.median_ms, stats.p99_ms, stats.steady
    pair = compare_onnx(["dense.onnx", "slim.onnx"])
    pair.stats[1].median_ms, pair.ratios[1]        # 0.61: the slim one takes 61 % of the dense one's time
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.errors import ExportError
from export.ort import CPU, ModelSource, describe, first_line, open_session, ort_errors, random_feeds, runtime
from export.stats import LatencyStats, summarise

WARMUP_S = 0.5
REPEATS = 200
MIN_RUNS = 7
ROUNDS = 12


class OnnxRunner:
    """A network that is loaded, has its inputs in place and can be run again and again.

    Inputs and outputs are bound once, so that a run of a small operator is not drowned in the conversion of
    its arguments.

    Args:
        model: The ONNX file or its bytes; open dimensions become 1.
        threads: Threads inside one operator.
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
        """One run.

        Raises:
            ExportError: an operator fails on the random input.
        """
        try:
            self.session.run_with_iobinding(self._binding)
        except self._errors as error:
            raise ExportError(f"{self.name} cannot be run: {first_line(error)}.") from error

    def time(self, runs: int) -> list[float]:
        """Run `runs` times; the milliseconds of each, in order."""
        run, clock, binding = self.session.run_with_iobinding, time.perf_counter_ns, self._binding
        times: list[float] = []
        collecting = gc.isenabled()
        gc.disable()  # a collection in the middle of a run would be counted as the network's time
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
        """Run for at least `seconds` and at least once; the milliseconds of the fastest run."""
        self.run()
        end = time.perf_counter() + seconds
        fastest = min(self.time(1))
        while time.perf_counter() < end:
            fastest = min(fastest, *self.time(1))
        return fastest

    def summarise(self, times_ms: Sequence[float]) -> LatencyStats:
        """The statistics of this network's run times."""
        return summarise(
            times_ms, runtime="onnxruntime", version=str(runtime().__version__), threads=self.threads
        )


def measure_onnx(
    model: ModelSource,
    *,
    threads: int = 1,
    warmup_s: float = WARMUP_S,
    repeats: int = REPEATS,
    max_seconds: float = 30.0,
    attempts: int = 2,
    providers: Sequence[str] = CPU,
    seed: int = 0,
) -> LatencyStats:
    """Time a network on a random input, one run after the other.

    Args:
        model: The ONNX file or its bytes.
        threads: Threads that ONNX Runtime may use.
        warmup_s: Seconds of runs that are not counted.
        repeats: Runs that are counted.
        max_seconds: Stop counting after this time, with no fewer than 7 runs.
        attempts: How often to measure before a drift between the first and the last third (see
            `LatencyStats.steady`) is accepted; the steadiest attempt is returned.
        providers: ONNX Runtime's execution providers.
        seed: Seed of the input.

    Raises:
        ExportError: the file is missing or refused, or a setting is out of range.
    """
    _check_settings(warmup_s=warmup_s, repeats=repeats, max_seconds=max_seconds, attempts=attempts)
    runner = OnnxRunner(model, threads=threads, providers=providers, seed=seed)
    runner.warm_up(warmup_s)
    best: LatencyStats | None = None
    for _ in range(attempts):
        stats = runner.summarise(_timed(runner, repeats, max_seconds))
        if best is None or abs(stats.drift) < abs(best.drift):
            best = stats
        if best.steady:
            break
    assert best is not None
    return best


@dataclass(frozen=True)
class Comparison:
    """Networks that were timed in turns.

    Attributes:
        stats: One for each network, in the order given.
        ratios: For each network, the median over the rounds of its median time divided by the first network's
            in the same round. Steadier than the quotient of two medians on a machine that others use too.
    """

    stats: tuple[LatencyStats, ...]
    ratios: tuple[float, ...]


def compare_onnx(
    models: Sequence[ModelSource],
    *,
    threads: int = 1,
    warmup_s: float = WARMUP_S,
    repeats: int = REPEATS,
    rounds: int = ROUNDS,
    max_seconds: float = 60.0,
    providers: Sequence[str] = CPU,
    seed: int = 0,
) -> Comparison:
    """Time several networks in turns: each round runs all of them, in an order drawn anew.

    Args:
        models: The ONNX files or their bytes.
        threads, warmup_s, providers, seed: As in `measure_onnx`, for each network.
        repeats: Runs of each network that are counted, shared out over the rounds.
        rounds: How often the turn passes.
        max_seconds: All rounds together take about this long at most, with two runs a round at least.

    Raises:
        ExportError: no network is given, one is missing or refused, or a setting is out of range.
    """
    _check_settings(warmup_s=warmup_s, repeats=repeats, rounds=rounds, max_seconds=max_seconds)
    if not models:
        raise ExportError("A comparison needs at least one network, got none.")
    runners = [OnnxRunner(model, threads=threads, providers=providers, seed=seed) for model in models]
    one_turn_s = sum(runner.warm_up(warmup_s) for runner in runners) / 1e3
    affordable = int(max_seconds / rounds / max(one_turn_s, 1e-9))
    runs = max(2, min(-(-repeats // rounds), affordable))
    times: list[list[float]] = [[] for _ in runners]
    medians: list[list[float]] = [[] for _ in runners]
    order = list(range(len(runners)))
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for index in order:
            runners[index].run()  # brings the network's weights back into the caches
            block = runners[index].time(runs)
            times[index].extend(block)
            medians[index].append(statistics.median(block))
    return Comparison(
        stats=tuple(runner.summarise(times[index]) for index, runner in enumerate(runners)),
        ratios=tuple(
            statistics.median(own / first for own, first in zip(medians[index], medians[0]))
            for index in range(len(runners))
        ),
    )


def run_for(runner: OnnxRunner, seconds: float) -> list[float]:
    """Run for `seconds`, and at least 7 times; the milliseconds of each run, in order."""
    return _timed(runner, 10**9, seconds)


def _timed(runner: OnnxRunner, repeats: int, max_seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + max_seconds
    while len(times) < repeats and (len(times) < MIN_RUNS or time.perf_counter() < end):
        times.extend(runner.time(min(MIN_RUNS, repeats - len(times))))
    return times


def _check_settings(**settings: Any) -> None:
    for name, value in settings.items():
        least = 0 if name == "warmup_s" else 1e-9 if name == "max_seconds" else 1
        if not value >= least:
            raise ExportError(f"{name} must be at least {least:g}, got {value}.")
