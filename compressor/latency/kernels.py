"""Kernel times of a network from the runtime's own profiler.

ONNX Runtime is profiled on this machine. For TensorRT the layer profile of `trtexec --exportProfile` is read from its
file. Both name fused kernels after nodes of the ONNX file, so that kernels can be matched between two networks of one
structure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compressor.core.errors import CompressorError
from compressor.latency.graph import FileNode, file_nodes, macs_of
from compressor.latency.noise import middle, timed, undisturbed
from compressor.latency.ort_profile import profiled_runs, tag, tag_of
from export.engine.bench import OnnxRunner

ROUNDS = 2
"""Profiling rounds per network. Networks take turns, so that background load does not affect one of them alone."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a network.

    Attributes:
        operator: Index of the weight-bearing operator that it computes or follows.
        op: The runtime's name, such as Conv or ReorderOutput.
        place: Index among kernels with the same `operator` and `op`.
        weighted: Whether it computes that operator; False for steps without weights.
        ms: Time for one input, without the profiler's overhead.
        macs: Multiply-adds of the network.
        computed_macs: Multiply-adds that the runtime computes, padding included.
        channels: Input and output channels; None without weights.
        weight_bytes, moved_bytes: Bytes of weights read; bytes of activations read and written.
        blocked: Whether it runs in a layout of channel blocks.
    """

    operator: int
    op: str
    place: int
    weighted: bool
    ms: float
    macs: int = 0
    computed_macs: int = 0
    channels: tuple[int, int] | None = None
    weight_bytes: int = 0
    moved_bytes: int = 0
    blocked: bool = True

    @property
    def key(self) -> tuple[int, str, int]:
        """Key that identifies the same kernel in another network of this structure."""
        return (self.operator, "" if self.weighted else self.op, self.place)


@dataclass(frozen=True)
class Profile:
    """A network's kernels in execution order, and its end-to-end time without the profiler."""

    kernels: tuple[Kernel, ...]
    whole_ms: float


def profile_onnx(paths: Sequence[Path], *, threads: int = 1, seconds: float = 1.0) -> list[Profile]:
    """Profile ONNX files on this machine's CPU in turns.

    Args:
        paths: Files of one structure.
        threads: Threads of ONNX Runtime.
        seconds: Approximate run time per file.
    """
    runners = [OnnxRunner(str(path), threads=threads) for path in paths]
    tagged = [tag(path) for path in paths]
    once = [runner.warm_up(0.05) for runner in runners]
    runs = [int(np.clip(seconds * 1e3 / ROUNDS / 3 / each, 4, 60)) for each in once]
    whole: list[list[float]] = [[] for _ in paths]
    profiled: list[list[list[dict[str, object]]]] = [[] for _ in paths]
    for _ in range(ROUNDS):
        for place, runner in enumerate(runners):
            whole[place] += undisturbed(timed(runner, 2 * runs[place])).tolist()
            profiled[place] += profiled_runs(tagged[place].model, threads, runs[place])
    return [
        _without_profiler(_kernels(file_nodes(path), each.owner, traces), float(np.median(times)))
        for path, each, traces, times in zip(paths, tagged, profiled, whole, strict=True)
    ]


def _without_profiler(kernels: Sequence[Kernel], whole_ms: float) -> Profile:
    """Subtract the profiler's overhead of some microseconds per kernel: the excess of their sum over the whole."""
    extra = max(0.0, sum(each.ms for each in kernels) - whole_ms) / len(kernels)
    return Profile(tuple(replace(each, ms=max(each.ms - extra, 0.1 * each.ms)) for each in kernels), whole_ms)


def _kernels(
    nodes: Sequence[FileNode], owner: Sequence[int], runs: Sequence[Sequence[dict[str, object]]]
) -> list[Kernel]:
    times = np.asarray([[float(kernel["dur"]) for kernel in run] for run in runs]) / 1e3  # type: ignore[arg-type]
    weighted = {node.operator: node for node in nodes if node.operator >= 0}
    found: list[Kernel] = []
    done: set[int] = set()
    current = 0
    for place, kernel in enumerate(runs[0]):
        mark = tag_of(kernel)
        if mark is not None:
            current = owner[mark]
        facts: dict[str, object] = kernel["args"]  # type: ignore[assignment]
        op = str(facts["op_name"])
        node = weighted.get(
            nodes[mark].operator if mark is not None and nodes[mark].operator >= 0 else current
        )
        shapes = [tuple(next(iter(each.values()))) for each in facts.get("input_type_shape", [])]  # type: ignore[attr-defined]
        made = [tuple(next(iter(each.values()))) for each in facts.get("output_type_shape", [])]  # type: ignore[attr-defined]
        bears = (
            node is not None
            and mark is not None
            and node.operator not in done
            and len(shapes) > 1
            and any(name in op for name in ("Conv", "Gemm", "MatMul"))
        )
        moved = int(str(facts.get("activation_size", 0))) + int(str(facts.get("output_size", 0)))
        ms = middle(times[:, place])
        if bears and node is not None:
            done.add(node.operator)
            found.append(
                Kernel(
                    node.operator, op, 0, True, ms,
                    macs=node.macs,
                    computed_macs=max(node.macs, macs_of(op, shapes[1], shapes[0], made[0])),
                    channels=node.channels,
                    weight_bytes=int(str(facts.get("parameter_size", 0))),
                    moved_bytes=moved,
                    blocked="nchwc" in str(kernel["name"]) or "Conv" not in op,
                )
            )  # fmt: skip
        else:
            same = sum(each.operator == current and each.op == op and not each.weighted for each in found)
            found.append(Kernel(current, op, same, False, ms, moved_bytes=moved))
    return found


def read_trt_profile(text: str, source: str, network: Path, *, element_bytes: int, block: int) -> Profile:
    """Read the layer profile that `trtexec --exportProfile=FILE` wrote for an ONNX file.

    Args:
        text: Content of the profile file.
        source: Name of the file in messages.
        network: The profiled ONNX file; TensorRT names its layers after the nodes of this file.
        element_bytes: Bytes per element in the precision that it ran in.
        block: Channels per kernel block.

    Raises:
        CompressorError: The file is not a layer profile, or none of its layers is named after a node of the network.
    """
    try:
        layers = [entry for entry in json.loads(text) if "name" in entry]
        times = [float(entry.get("medianMs", entry.get("averageMs"))) for entry in layers]
        if not layers or not np.isfinite(times).all() or min(times) < 0:
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        raise CompressorError(
            f"{source} is not a layer profile of trtexec.",
            "Write one on the device: trtexec --loadEngine=FILE --exportProfile=profile.json",
        ) from None
    nodes = sorted(enumerate(file_nodes(network)), key=lambda item: -len(item[1].name))
    owner = tag(network).owner
    found: list[Kernel] = []
    matched = 0
    current = 0
    for entry, ms in zip(layers, times, strict=True):
        label = str(entry["name"])
        inside = [(place, node) for place, node in nodes if node.name and _named(label, node.name)]
        bearing = [node for _, node in inside if node.operator >= 0]
        matched += bool(inside)
        if bearing and "Reformat" not in label:
            node = bearing[0]
            current = node.operator
            c_in, c_out = node.channels or (1, 1)
            padded = -(-c_in // block) * -(-c_out // block) * block**2 if len(bearing) == 1 else c_in * c_out
            found.append(
                Kernel(
                    node.operator, node.op, 0, True, ms,
                    macs=sum(each.macs for each in bearing),
                    computed_macs=int(sum(each.macs for each in bearing) * max(padded / (c_in * c_out), 1)),
                    channels=node.channels,
                    weight_bytes=sum(each.weights for each in bearing) * element_bytes,
                    moved_bytes=sum(each.moved for _, each in inside) * element_bytes,
                )
            )  # fmt: skip
            continue
        if inside:
            current = max(owner[place] for place, _ in inside)
        op = "Reformat" if "eformat" in label else inside[0][1].op if inside else label.split(" ")[0][:40]
        same = sum(each.operator == current and each.op == op and not each.weighted for each in found)
        moved = sum(node.moved for _, node in inside) * element_bytes
        found.append(Kernel(current, op, same, False, ms, moved_bytes=moved))
    if not matched:
        raise CompressorError(
            f"None of the layers in {source} is named after a node of {network.name}.",
            "Pass the profile of the engine that was built from this file.",
        )
    return Profile(tuple(found), float(sum(times)))


def _named(label: str, name: str) -> bool:
    """Whether a fused layer's label contains a node's full name, not only as the start of a longer one."""
    start = label.find(name)
    while start >= 0:
        end = start + len(name)
        if (start == 0 or label[start - 1] in " +([{,") and (end == len(label) or label[end] in " +)]},:"):
            return True
        start = label.find(name, start + 1)
    return False
