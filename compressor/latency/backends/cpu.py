"""ONNX Runtime on this machine's CPU: networks end to end, operator by operator, and two networks in turns.

Operators are timed inside the network, not in isolation. The whole network runs under ONNX Runtime's own profiler, with
fused nodes and layout changes, and each node's time is assigned to its weight-bearing operator.

Networks run in a process that does nothing else, as in deployment. A process that has traced, exported and trained for
a while has fragmented memory. Networks run slower in it than in a fresh process, and not all by the same factor: after
three runs in one process, a MobileNet-V2 pruned to 28 % of the dense time was 14 % slower and the dense network 8 %.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.processes import Child, ChildDied, Failed, serve
from compressor.latency.machine import (
    Floats,
    ProcessorSpeed,
    at_full_speed,
    timed,
    timed_together,
    undisturbed,
)
from compressor.latency.networks import TAG, NetworkTimes, TaggedNetwork
from compressor.latency.paired import Burst, PairSession, Timing, burst_of, in_turns, pair_session
from export.convert.ort import CPU, random_feeds, runtime
from export.engine.bench import OnnxRunner, running, together
from export.errors import ExportError

if TYPE_CHECKING:
    from compressor.latency.request import Request, Turns

MOST_RUNS = 200
MAX_PROFILED_RUNS = 60
"""Most profiled runs: enough for a median, and a small profile file, which is slower to read than to write."""

LEAST_RUNS = 7
"""Fewest timed runs of a network, however slow it is."""

WARM_UP = 2
"""Warm-up runs under the profiler, which are not counted."""

WARM_UP_S = 0.25
"""Warm-up time of a network before its bursts, in seconds."""


class OrtCpu:
    """ONNX Runtime on this machine's CPU.

    Args:
        threads: Threads inside one operator.
        streams: Sessions that run a network at the same time.
    """

    def __init__(self, threads: int = 1, streams: int = 1) -> None:
        self.threads, self.streams = threads, streams
        self._pace = ProcessorSpeed(threads)

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Measure end to end, under the profiler, and end to end again, so that drift affects both equally.

        Several streams wait for one another, so that no run of theirs is undisturbed: all count.
        """
        runners = [OnnxRunner(network.model, threads=self.threads) for _ in range(self.streams)]
        once = max(together(runners, lambda runner: runner.warm_up(seconds / 10)))
        runs = min(MOST_RUNS, max(LEAST_RUNS, int(seconds / 4 / (once / 1e3))))
        slow = self._pace.slowdown()
        before = timed_together(runners, runs)
        operators = np.zeros((0, 0))
        if network.operators:
            operators = self._profile(network, min(2 * runs, MAX_PROFILED_RUNS), runners[1:])
        after = timed_together(runners, runs)
        slow = max(slow, self._pace.slowdown())
        times = np.concatenate([before, after])
        return NetworkTimes(undisturbed(times) if self.streams == 1 else times[:, 0], operators, slow)

    def _profile(self, network: TaggedNetwork, runs: int, beside: Sequence[OnnxRunner]) -> Floats:
        """Return operator times in milliseconds, (runs, operators), of the profiled runs at full speed."""
        events = _events(network.model, self.threads, runs + WARM_UP, beside)
        times = _by_operator(events, network)[WARM_UP:]
        return np.asarray(times if beside else times[at_full_speed(times.sum(axis=1))])


def profiled_runs(
    model: bytes, threads: int, runs: int, beside: Sequence[OnnxRunner] = ()
) -> list[list[dict[str, Any]]]:
    """Profile `runs` runs with ONNX Runtime after a warm-up; returns the kernels of each run in execution order.

    A kernel has its `name`, its duration `dur` in microseconds, and in `args` its `op_name` and the shapes and bytes
    that it read and wrote.

    Args:
        model: The ONNX file's bytes.
        threads: Threads inside one operator.
        runs: Number of runs.
        beside: Networks that run at the same time.
    """
    return _runs(_events(model, threads, runs + WARM_UP, beside))[WARM_UP:]


def _events(
    model: bytes, threads: int, runs: int, beside: Sequence[OnnxRunner] = ()
) -> list[dict[str, Any]]:
    onnxruntime = runtime()
    with tempfile.TemporaryDirectory(prefix="compressor-profile-") as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "ort")
        session = onnxruntime.InferenceSession(model, options, providers=list(CPU))
        feeds = random_feeds(session)
        with running(beside):
            for _ in range(runs):
                session.run(None, feeds)
        return list(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))


def _runs(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Extract the kernels of each run from the profiler's events, in execution order."""
    kernels = [
        event
        for event in sorted(
            (event for event in events if event.get("cat") == "Node"), key=lambda event: event["ts"]
        )
        if str(event["name"]).endswith("_kernel_time")
    ]
    first = kernels[0]["args"].get("node_index")
    starts = [place for place, event in enumerate(kernels) if event["args"].get("node_index") == first]
    length = len(kernels) // len(starts)
    return [kernels[start : start + length] for start in starts]


def tag_of(kernel: dict[str, Any]) -> int | None:
    """Return the index of a kernel's node in the tagged file; None for a node that ONNX Runtime inserted."""
    found = TAG.search(str(kernel["name"]))
    return int(found[1]) if found is not None else None


def _by_operator(events: Sequence[dict[str, Any]], network: TaggedNetwork) -> Floats:
    """Sum the profiler's kernel times for each run and operator.

    A node that ONNX Runtime inserted (a layout change) has no tag and is assigned to the preceding operator.
    """
    runs = _runs(events)
    times = np.zeros((len(runs), network.operators))
    for run, kernels in enumerate(runs):
        current = 0
        for kernel in kernels:
            if (found := tag_of(kernel)) is not None:
                current = network.owner[found]
            times[run, current] += float(kernel["dur"]) / 1e3
    return times


class OrtProcess:
    """A `Device` that runs `OrtCpu` in a separate process, from the first network until this object is closed.

    Args:
        threads: Threads inside one operator.
        streams: Sessions that run a network at the same time.
    """

    def __init__(self, threads: int = 1, streams: int = 1) -> None:
        self.threads, self.streams = threads, streams
        self._child: Child | None = None

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Measure as `OrtCpu.measure` does.

        Raises:
            ExportError: ONNX Runtime rejects the network, or the process has died.
        """
        with tempfile.TemporaryDirectory(prefix="compressor-timing-") as folder:
            path = Path(folder) / "network.onnx"
            path.write_bytes(network.model)
            found = self._ask(
                {
                    "do": "measure", "model": str(path), "owner": network.owner, "epilogues": network.epilogues,
                    "seconds": seconds,
                }
            )  # fmt: skip
        operators = np.asarray(found["operators_ms"], dtype=np.float64)
        operators = operators.reshape(len(operators), network.operators)
        return NetworkTimes(np.asarray(found["whole_ms"]), operators, found["slowdown"])

    def close(self) -> None:
        """End the process; the next network starts a new one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, request: Mapping[str, Any]) -> Any:
        if self._child is None:
            self._child = Child(__name__, self.threads)
        try:
            return _request(self._child, {**request, "threads": self.threads, "streams": self.streams})
        except _ProcessDied as error:
            self._child = None
            raise error from None


class BurstProcess:
    """One ONNX file, loaded and warm in a separate process, that runs in bursts on request.

    Args:
        path: The file.
        threads: Threads inside one operator.
        streams: Sessions that run it at the same time; a burst has the counted runs of each.

    Attributes:
        once_ms: Approximate time of one run; valid after `ready`.
    """

    def __init__(self, path: Path, threads: int = 1, streams: int = 1) -> None:
        self.path, self.threads, self.streams, self.once_ms = path, threads, streams, 0.0
        self._child = Child(__name__, threads)

    def ready(self) -> None:
        """Load the network and warm it up.

        Raises:
            ExportError: ONNX Runtime rejects the network, or the process has died.
        """
        self.once_ms = float(
            _request(
                self._child,
                {
                    "do": "open", "model": str(self.path), "threads": self.threads, "streams": self.streams,
                    "warm_up_s": WARM_UP_S,
                },
            )
        )

    def burst(self, dropped: int, counted: int) -> Burst:
        """Run `counted` times after `dropped` runs that are not counted.

        Raises:
            ExportError: As for `ready`.
        """
        times = _request(self._child, {"do": "burst", "dropped": dropped, "counted": counted})
        wall, own = zip(*times, strict=True)
        return burst_of(wall, own if self.threads == self.streams == 1 else None)

    def close(self) -> None:
        """End the process."""
        self._child.close()


class _ProcessDied(ExportError):
    """The timing process has ended unexpectedly."""


def _request(child: Child, request: Mapping[str, Any]) -> Any:
    try:
        return child.ask(request)
    except Failed as error:
        raise ExportError(str(error).removeprefix(f"{ExportError.__name__}: ")) from None
    except ChildDied as error:
        raise _ProcessDied(
            f"The process that times networks was {error}.", "Free some memory and try again."
        ) from None


def measured(dense: Path, slim: Path, request: Request, turns: Turns) -> Timing:
    """Time two ONNX files through ONNX Runtime on this machine's CPU.

    Args:
        dense, slim: The files.
        request: Threads, streams and batch.
        turns: When timing ends, and what is compared.

    Raises:
        ExportError: ONNX Runtime rejects one of them, or its process has died.
    """
    threads, streams = request.threads, request.streams

    def run_session() -> PairSession:
        begun = time.monotonic()
        with ExitStack() as stack:
            first, second = (
                stack.enter_context(closing(BurstProcess(path, threads, streams))) for path in (dense, slim)
            )
            for child in (first, second):
                child.ready()
            return pair_session(first, second, seconds=time.monotonic() - begun)

    return in_turns(
        run_session,
        "onnxruntime",
        str(runtime().__version__),
        turns,
        threads=threads,
        batch=request.batch,
        streams=streams,
    )


def main() -> None:
    devices: dict[tuple[int, int], OrtCpu] = {}
    opened: list[OnnxRunner] = []

    def answer(request: dict[str, Any]) -> Any:
        if request["do"] == "burst":
            dropped, counted = request["dropped"], request["counted"]
            runs = together(opened, lambda runner: timed(runner, dropped + counted)[dropped:])
            return np.concatenate(runs).tolist()
        threads, streams = request["threads"], request["streams"]
        if request["do"] == "open":
            opened[:] = [OnnxRunner(request["model"], threads=threads) for _ in range(streams)]
            return max(together(opened, lambda runner: runner.warm_up(request["warm_up_s"])))
        if (threads, streams) not in devices:
            devices[threads, streams] = OrtCpu(threads, streams)
        content = Path(request["model"]).read_bytes()
        network = TaggedNetwork(content, tuple(request["owner"]), tuple(request["epilogues"]))
        times = devices[threads, streams].measure(network, request["seconds"])
        return {
            "whole_ms": times.whole_ms.tolist(), "operators_ms": times.operators_ms.tolist(),
            "slowdown": times.slowdown,
        }  # fmt: skip

    serve(answer)


if __name__ == "__main__":
    main()
