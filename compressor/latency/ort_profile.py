"""One network on ONNX Runtime's CPU provider: its time as a whole, and the time of each operator inside it.

Operators are timed in the company they keep: the whole network runs under ONNX Runtime's own profiler, with
its fused nodes and its changes of layout, and each node's time is given to the weight-bearing operator it
belongs to.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.bench import OnnxRunner
from export.ort import CPU, random_feeds, runtime

Floats = npt.NDArray[np.float64]

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
MOST_RUNS = 200
MOST_PROFILED = 60
"""Enough for a median; more would only fill the profiler's file, which takes longer to read than to write."""

INTERRUPTED = 0.05
"""A run whose wall time exceeds the thread's own time by this share was interrupted."""

_TAG = re.compile(r"@(\d+)\.")


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
    """

    whole_ms: Floats
    operators_ms: Floats

    @property
    def median_ms(self) -> float:
        """The median end-to-end time."""
        return float(np.median(self.whole_ms))


class Device(Protocol):
    """Something that runs ONNX networks; tests put a made-up one in its place."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Spend about `seconds` on one network."""


def tag(path: Path) -> TaggedNetwork:
    """Read an ONNX file and rename its nodes and inner tensors to `@INDEX.`, the index of the node that makes them.

    ONNX Runtime names a fused node after one of the tensors or nodes it replaces, so the tag survives
    optimisation. A node without weights counts to the latest weight-bearing operator that it depends on.
    """
    import onnx

    proto = onnx.load(str(path))
    graph = proto.graph
    constants = {item.name for item in graph.initializer}
    outputs = {item.name for item in graph.output}
    names: dict[str, str] = {}
    owner_of: dict[str, int] = {}
    owner: list[int] = []
    epilogues: list[list[str]] = []
    for index, node in enumerate(graph.node):
        if node.op_type in _WEIGHTED and any(name in constants for name in node.input):
            owner.append(len(epilogues))
            epilogues.append([])
        else:
            owner.append(max((owner_of[name] for name in node.input if name in owner_of), default=0))
            if epilogues:
                epilogues[owner[-1]].append(node.op_type)
        node.name = f"@{index}."
        for place, name in enumerate(node.output):
            owner_of[name] = owner[-1]
            if name not in outputs:
                names[name] = f"@{index}.{place}"
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                values[place] = names.get(name, name)
    del graph.value_info[:]
    return TaggedNetwork(proto.SerializeToString(), tuple(owner), tuple("+".join(each) for each in epilogues))


@dataclass(frozen=True)
class OrtCpu:
    """ONNX Runtime on this machine's CPU.

    Attributes:
        threads: Threads inside one operator.
        min_runs: No network is timed with fewer runs, however slow it is.
    """

    threads: int = 1
    min_runs: int = 7

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Half of the time end to end, before and after the profiled half, so that a drift is seen by
        both.
        """
        runner = OnnxRunner(network.model, threads=self.threads)
        once = runner.warm_up(seconds / 10)
        runs = min(MOST_RUNS, max(self.min_runs, int(seconds / 4 / (once / 1e3))))
        before = _time(runner, runs)
        operators = self._profile(network, min(2 * runs, MOST_PROFILED))
        after = _time(runner, runs)
        return NetworkTimes(undisturbed(np.concatenate([before, after])), operators)

    def _profile(self, network: TaggedNetwork, runs: int) -> Floats:
        """(runs, operators) milliseconds from ONNX Runtime's profiler."""
        onnxruntime = runtime()
        with tempfile.TemporaryDirectory(prefix="compressor-profile-") as folder:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "ort")
            session = onnxruntime.InferenceSession(network.model, options, providers=list(CPU))
            feeds = random_feeds(session)
            warm_up = 2
            for _ in range(runs + warm_up):
                session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _by_operator(events, network)[warm_up:]


def _time(runner: OnnxRunner, runs: int) -> Floats:
    """(runs, 2): milliseconds on the wall's clock and on the thread's own."""
    times = np.empty((runs, 2))
    for run in range(runs):
        wall, own = time.perf_counter_ns(), time.thread_time_ns()
        runner.run()
        times[run] = time.perf_counter_ns() - wall, time.thread_time_ns() - own
    return times / 1e6


def undisturbed(times: Floats) -> Floats:
    """The runs that no other process interrupted.

    Args:
        times: (runs, 2): wall clock and the thread's own clock.

    Returns: The wall times of the runs for which both clocks agree; where hardly any was left alone, the
        times on the thread's own clock, which stands still while another process runs.
    """
    wall, own = times[:, 0], times[:, 1]
    alone = wall <= own * (1 + INTERRUPTED)
    return np.asarray(wall[alone] if alone.sum() >= max(3, len(wall) // 5) else own)


def middle(values: Floats) -> float:
    """The mean of the middle half: as steady as a median, without sticking to the profiler's whole
    microseconds.
    """
    ordered = np.sort(values)
    quarter = len(ordered) // 4
    return float(ordered[quarter : len(ordered) - quarter].mean())


def _by_operator(events: Sequence[dict[str, Any]], network: TaggedNetwork) -> Floats:
    """Sum the profiler's node times for each run and operator.

    A node that ONNX Runtime put in itself (a change of layout) has no tag and counts to the operator before
    it.
    """
    kernels = [
        ((event["args"].get("node_index"), str(event["name"])), float(event["dur"]))
        for event in sorted(
            (event for event in events if event.get("cat") == "Node"), key=lambda event: event["ts"]
        )
        if str(event["name"]).endswith("_kernel_time")
    ]
    starts = [index for index, (node, _) in enumerate(kernels) if node == kernels[0][0]]
    length = len(kernels) // len(starts)
    times = np.zeros((len(starts), network.operators))
    for run, start in enumerate(starts):
        current = 0
        for (_, name), microseconds in kernels[start : start + length]:
            found = _TAG.search(name)
            if found is not None:
                current = network.owner[int(found[1])]
            times[run, current] += microseconds / 1e3
    return times


def channel_block() -> int:
    """Channels that ONNX Runtime's convolutions compute at once on this CPU: 16 with AVX-512, 8 with AVX2.

    Found without a clock: the optimised form of a convolution with one output channel has its weights padded
    to a block. 1 where the runtime has no blocked convolutions for this CPU.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnxruntime = runtime()
    with tempfile.TemporaryDirectory(prefix="compressor-block-") as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(CPU))
        optimised = onnx.load(str(path))
    padded = max(
        (int(item.dims[0]) for item in optimised.graph.initializer if len(item.dims) == 4), default=4
    )
    return padded if padded > 4 else 1
