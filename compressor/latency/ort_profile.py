"""One network on ONNX Runtime's CPU provider: its time as a whole, and the time of each operator inside it.

Operators are timed in the company they keep: the whole network runs under ONNX Runtime's own profiler, with
its fused nodes and its changes of layout, and each node's time is given to the weight-bearing operator it
belongs to.
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
from compressor.latency.noise import Pace, at_full_speed, middles, timed, undisturbed
from export.convert.ort import CPU, random_feeds, runtime
from export.engine.bench import OnnxRunner

Floats = npt.NDArray[np.float64]

MOST_RUNS = 200
MOST_PROFILED = 60
"""Enough for a median; more would only fill the profiler's file, which takes longer to read than to write."""

LEAST_RUNS = 7
"""No network is timed with fewer runs, however slow it is."""

CALM = 0.08
"""Slower than at its best by no more than this share, the processor counts as calm."""

TAG = re.compile(r"@(\d+)\.")
"""How `tag` calls a node."""


@dataclass(frozen=True)
class TaggedNetwork:
    """An ONNX network whose nodes and tensors are renamed so that fused nodes can be traced back.

    Attributes:
        model: The ONNX file's bytes.
        owner: For each node of the file, the index of the weight-bearing operator whose time it counts to.
        epilogues: For each weight-bearing operator, the ONNX operators that count to it, joined by `+`.
    """

    model: bytes
    owner: tuple[int, ...]
    epilogues: tuple[str, ...]

    @property
    def operators(self) -> int:
        """How many weight-bearing operators there are."""
        return len(self.epilogues)


@dataclass(frozen=True)
class NetworkTimes:
    """What was measured of one network.

    Attributes:
        whole_ms: End-to-end times without the profiler, one for each run.
        operators_ms: (runs, operators): times under the profiler.
        slowdown: How much slower than at its best the processor was meanwhile, a share; 0 where nothing tells.
    """

    whole_ms: Floats
    operators_ms: Floats
    slowdown: float = 0.0

    @property
    def median_ms(self) -> float:
        """The median end-to-end time."""
        return float(np.median(self.whole_ms))

    @cached_property
    def by_operator_ms(self) -> Floats:
        """What a table keeps of each operator, (3, operators): mean of the middle half, 90th percentile, deviation."""
        times = self.operators_ms
        return np.stack([middles(times), np.quantile(times, 0.9, axis=0), times.std(axis=0)])

    @property
    def calm(self) -> bool:
        """Whether the processor was about as fast as it can be."""
        return self.slowdown <= CALM


class Device(Protocol):
    """Something that runs ONNX networks; tests put a made-up one in its place."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Spend about `seconds` on one network."""


def tag(path: Path, weights: Sequence[int | None] | None = None) -> TaggedNetwork:
    """Read an ONNX file and rename its nodes and what they make to `@INDEX.`, the index of the node that makes it.

    ONNX Runtime names a fused node after one of the tensors or nodes it replaces, so the tag survives
    optimisation. A node without weights counts to the latest weight-bearing operator that it depends on.

    Args:
        path: The ONNX file.
        weights: How many elements the weight of each operator has that is to be told apart, in execution order; None
            for any. Other products with constants (an adaptive pooling written as one) count to the operator before
            them. Without it every product with a constant is an operator of its own.
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
    """Whether a node's constant is the weight that comes at `place`."""
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
        self._pace = Pace(threads)

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """End to end, then under the profiler, then end to end again, so that a drift is seen by both."""
        runner = OnnxRunner(network.model, threads=self.threads)
        once = runner.warm_up(seconds / 10)
        runs = min(MOST_RUNS, max(LEAST_RUNS, int(seconds / 4 / (once / 1e3))))
        slow = self._pace.slowdown()
        before = timed(runner, runs)
        operators = np.zeros((0, 0))
        if network.operators:
            operators = self._profile(network, min(2 * runs, MOST_PROFILED))
        after = timed(runner, runs)
        slow = max(slow, self._pace.slowdown())
        return NetworkTimes(undisturbed(np.concatenate([before, after])), operators, slow)

    def _profile(self, network: TaggedNetwork, runs: int) -> Floats:
        """(runs, operators) milliseconds from ONNX Runtime's profiler, of the runs at full speed."""
        times = _by_operator(_events(network.model, self.threads, runs + WARM_UP), network)[WARM_UP:]
        return np.asarray(times[at_full_speed(times.sum(axis=1))])


WARM_UP = 2
"""Runs under the profiler that are not counted."""


def profiled_runs(model: bytes, threads: int, runs: int) -> list[list[dict[str, Any]]]:
    """What ONNX Runtime's profiler saw of `runs` runs after a warm-up: for each the kernels in their order.

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
    """The kernels among the profiler's events, for each run in the order of execution."""
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
    """Which node of the tagged file a kernel stands for; None for one that ONNX Runtime put in itself."""
    found = TAG.search(str(kernel["name"]))
    return int(found[1]) if found is not None else None


def _by_operator(events: Sequence[dict[str, Any]], network: TaggedNetwork) -> Floats:
    """Sum the profiler's kernel times for each run and operator.

    A node that ONNX Runtime put in itself (a change of layout) has no tag and counts to the operator before
    it.
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
