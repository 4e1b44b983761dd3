"""Times one network on ONNX Runtime's CPU provider: end to end, and operator by operator.

Operators are timed inside the network, not in isolation. The whole network runs under ONNX Runtime's own profiler, with
fused nodes and layout changes, and each node's time is assigned to its weight-bearing operator.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compressor.latency.graph import WEIGHTED
from compressor.latency.noise import ProcessorSpeed, at_full_speed, middles, timed, undisturbed
from export.convert.ort import CPU, random_feeds, runtime
from export.engine.bench import OnnxRunner

Floats = npt.NDArray[np.float64]

MOST_RUNS = 200
MAX_PROFILED_RUNS = 60
"""Most profiled runs: enough for a median, and a small profile file, which is slower to read than to write."""

LEAST_RUNS = 7
"""Fewest timed runs of a network, however slow it is."""

SLOWDOWN_TOLERANCE = 0.08
"""Largest slowdown against the processor's best speed at which a measurement counts as undisturbed."""

TAG = re.compile(r"@(\d+)\.")
"""Pattern of the node names that `tag` gives."""


@dataclass(frozen=True)
class TaggedNetwork:
    """An ONNX network whose nodes and tensors are renamed so that fused nodes can be traced back.

    Attributes:
        model: The ONNX file's bytes.
        owner: Index of the weight-bearing operator to which each node's time is assigned.
        epilogues: ONNX operators that are assigned to each weight-bearing operator, joined by `+`.
    """

    model: bytes
    owner: tuple[int, ...]
    epilogues: tuple[str, ...]

    @property
    def operators(self) -> int:
        """Number of weight-bearing operators."""
        return len(self.epilogues)


@dataclass(frozen=True)
class NetworkTimes:
    """Measured times of one network.

    Attributes:
        whole_ms: End-to-end times without the profiler, (runs,).
        operators_ms: Operator times under the profiler, (runs, operators).
        slowdown: Slowdown of the processor against its best speed, as a share; 0 where it is unknown.
    """

    whole_ms: Floats
    operators_ms: Floats
    slowdown: float = 0.0

    @property
    def median_ms(self) -> float:
        """Median end-to-end time."""
        return float(np.median(self.whole_ms))

    @cached_property
    def by_operator_ms(self) -> Floats:
        """Statistics of each operator, (3, operators): mean of the middle half, 90th percentile, deviation."""
        times = self.operators_ms
        return np.stack([middles(times), np.quantile(times, 0.9, axis=0), times.std(axis=0)])

    @property
    def undisturbed(self) -> bool:
        """Whether the processor ran at about its best speed."""
        return self.slowdown <= SLOWDOWN_TOLERANCE


class Device(Protocol):
    """Protocol of devices that run ONNX networks; tests substitute a simulated one."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Measure one network for about `seconds`."""


def tag(path: Path, weights: Sequence[int | None] | None = None) -> TaggedNetwork:
    """Read an ONNX file and rename its nodes and their outputs to `@INDEX.`, with the index of the node.

    ONNX Runtime names a fused node after one of the tensors or nodes that it replaces, so the tag survives
    optimisation. A node without weights is assigned to the latest weight-bearing operator that it depends on.

    Args:
        path: The ONNX file.
        weights: Number of weight elements of each operator to identify, in execution order; None for any number.
            Other products with constants (such as an adaptive pooling) are assigned to the preceding operator. Without
            this argument every product with a constant is an operator.
    """
    import onnx

    proto = onnx.load(str(path))
    graph = proto.graph
    constants = {item.name: int(np.prod(item.dims)) for item in graph.initializer}
    names: dict[str, str] = {}
    owner_of: dict[str, int] = {}
    owner: list[int] = []
    epilogues: list[list[str]] = []
    for index, node in enumerate(graph.node):
        if node.op_type in WEIGHTED and _is_next(node, constants, weights, len(epilogues)):
            owner.append(len(epilogues))
            epilogues.append([])
        else:
            owner.append(max((owner_of[name] for name in node.input if name in owner_of), default=0))
            if epilogues:
                epilogues[owner[-1]].append(node.op_type)
        node.name = f"@{index}."
        for place, name in enumerate(node.output):
            owner_of[name] = owner[-1]
            names[name] = f"@{index}.{place}"
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                values[place] = names.get(name, name)
    for item in graph.output:
        item.name = names.get(item.name, item.name)
    del graph.value_info[:]
    return TaggedNetwork(proto.SerializeToString(), tuple(owner), tuple("+".join(each) for each in epilogues))


def _is_next(
    node: Any, constants: Mapping[str, int], weights: Sequence[int | None] | None, place: int
) -> bool:
    """Whether a node's constant is the weight of operator `place`."""
    found = [constants[name] for name in node.input[:2] if name in constants]
    if weights is None or not found:
        return bool(found)
    return place < len(weights) and weights[place] in (None, *found)


class OrtCpu:
    """ONNX Runtime on this machine's CPU.

    Args:
        threads: Threads inside one operator.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._pace = ProcessorSpeed(threads)

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Measure end to end, under the profiler, and end to end again, so that drift affects both equally."""
        runner = OnnxRunner(network.model, threads=self.threads)
        once = runner.warm_up(seconds / 10)
        runs = min(MOST_RUNS, max(LEAST_RUNS, int(seconds / 4 / (once / 1e3))))
        slow = self._pace.slowdown()
        before = timed(runner, runs)
        operators = np.zeros((0, 0))
        if network.operators:
            operators = self._profile(network, min(2 * runs, MAX_PROFILED_RUNS))
        after = timed(runner, runs)
        slow = max(slow, self._pace.slowdown())
        return NetworkTimes(undisturbed(np.concatenate([before, after])), operators, slow)

    def _profile(self, network: TaggedNetwork, runs: int) -> Floats:
        """Return operator times in milliseconds, (runs, operators), of the profiled runs at full speed."""
        times = _by_operator(_events(network.model, self.threads, runs + WARM_UP), network)[WARM_UP:]
        return np.asarray(times[at_full_speed(times.sum(axis=1))])


WARM_UP = 2
"""Warm-up runs under the profiler, which are not counted."""


def profiled_runs(model: bytes, threads: int, runs: int) -> list[list[dict[str, Any]]]:
    """Profile `runs` runs with ONNX Runtime after a warm-up; returns the kernels of each run in execution order.

    A kernel has its `name`, its duration `dur` in microseconds, and in `args` its `op_name` and the shapes and bytes
    that it read and wrote.
    """
    return _runs(_events(model, threads, runs + WARM_UP))[WARM_UP:]


def _events(model: bytes, threads: int, runs: int) -> list[dict[str, Any]]:
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
