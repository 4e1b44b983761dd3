"""Explains, kernel by kernel, why a slim network's share of the time exceeds its share of the multiply-adds.

Kernel times come from the runtime's own profiler. ONNX Runtime is profiled on this machine. For TensorRT the layer
profile of `trtexec --exportProfile` is read from its file. Both name fused kernels after nodes of the ONNX file, by
which kernels are matched between two networks of one structure.

If time were proportional to the multiply-adds, a network with a share R of them would take a share R of the dense
time. The excess of each kernel over R times its dense time sums to the whole gap, so that sorting by the excess shows
where a change helps most. The excess has two parts: time that did not shrink with the kernel's own work, and work that
was reduced less than in the rest of the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.latency.backends.cpu import profiled_runs, tag_of
from compressor.latency.machine import middle, timed_together, undisturbed
from compressor.latency.networks import FileNode, file_nodes, macs_of, tag
from compressor.latency.operators import padded
from compressor.latency.peaks import Machine
from export.engine.bench import OnnxRunner, together

ROUNDS = 2
"""Profiling rounds per network. Networks take turns, so that background load does not affect one of them alone."""

NOTABLE = 0.02
"""Kernels whose part of the gap is below this share of the slim network's time get no sentence."""

PADDED = 0.1
"""Padding below this share of the computed multiply-adds is not mentioned."""

LAYOUT = ("Reorder", "Reformat", "Transpose")
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
IN_INT8 = ("QLinear", "QGemm")
"""Starts of the names of ONNX Runtime's kernels in INT8."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a network.

    Attributes:
        operator: Index of the weight-bearing operator that it computes or follows.
        op: The runtime's name, such as Conv or ReorderOutput.
        place: Index among kernels with the same `operator` and `op`.
        weighted: Whether it computes that operator; False for steps without weights.
        ms: Time in one run, without the profiler's overhead.
        macs: Multiply-adds of the network for one run, of the file's batch.
        computed_macs: Multiply-adds that the runtime computes, padding included.
        channels: Input and output channels; None without weights.
        weight_bytes, moved_bytes: Bytes of weights read; bytes of activations read and written.
        blocked: Whether it runs in a layout of channel blocks, or needs none.
        int8: Whether it computes in INT8, of which the device's peak is not known.
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
    int8: bool = False

    @property
    def key(self) -> tuple[int, str, int]:
        """Key that identifies the same kernel in another network of this structure."""
        return (self.operator, "" if self.weighted else self.op, self.place)


@dataclass(frozen=True)
class Profile:
    """A network's kernels in execution order, and its end-to-end time without the profiler."""

    kernels: tuple[Kernel, ...]
    whole_ms: float


def profile_onnx(
    paths: Sequence[Path], *, threads: int = 1, streams: int = 1, seconds: float = 1.0
) -> list[Profile]:
    """Profile ONNX files on this machine's CPU in turns.

    Args:
        paths: Files of one structure.
        threads: Threads of ONNX Runtime.
        streams: Copies of a network that run at the same time, of which one is profiled.
        seconds: Approximate run time per file.
    """
    copies = [[OnnxRunner(str(path), threads=threads) for _ in range(streams)] for path in paths]
    tagged = [tag(path) for path in paths]
    once = [max(together(runners, lambda runner: runner.warm_up(0.05))) for runners in copies]
    runs = [int(np.clip(seconds * 1e3 / ROUNDS / 3 / each, 4, 60)) for each in once]
    whole: list[list[float]] = [[] for _ in paths]
    profiled: list[list[list[dict[str, Any]]]] = [[] for _ in paths]
    for _ in range(ROUNDS):
        for place, runners in enumerate(copies):
            times = timed_together(runners, 2 * runs[place])
            whole[place] += (undisturbed(times) if streams == 1 else times[:, 0]).tolist()
            profiled[place] += profiled_runs(tagged[place].model, threads, runs[place], runners[1:])
    return [
        _without_profiler(_kernels(file_nodes(path), each.owner, traces), float(np.median(times)))
        for path, each, traces, times in zip(paths, tagged, profiled, whole, strict=True)
    ]


def _without_profiler(kernels: Sequence[Kernel], whole_ms: float) -> Profile:
    """Subtract the profiler's overhead of some microseconds per kernel: the excess of their sum over the whole."""
    extra = max(0.0, sum(each.ms for each in kernels) - whole_ms) / len(kernels)
    return Profile(tuple(replace(each, ms=max(each.ms - extra, 0.1 * each.ms)) for each in kernels), whole_ms)


def _kernels(
    nodes: Sequence[FileNode], owner: Sequence[int], runs: Sequence[Sequence[dict[str, Any]]]
) -> list[Kernel]:
    times = np.asarray([[float(kernel["dur"]) for kernel in run] for run in runs]) / 1e3
    weighted = {node.operator: node for node in nodes if node.operator >= 0}
    found: list[Kernel] = []
    done: set[int] = set()
    current = 0
    for place, kernel in enumerate(runs[0]):
        mark = tag_of(kernel)
        if mark is not None:
            current = owner[mark]
        facts = kernel["args"]
        op = str(facts["op_name"])
        node = weighted.get(
            nodes[mark].operator if mark is not None and nodes[mark].operator >= 0 else current
        )
        shapes, outputs = (
            [tuple(next(iter(each.values()))) for each in facts.get(f"{side}_type_shape", [])]
            for side in ("input", "output")
        )
        int8 = op.startswith(IN_INT8)
        weight = 3 if int8 else 1  # the input is followed by its scale and its zero point
        bears = (
            node is not None
            and mark is not None
            and node.operator not in done
            and len(shapes) > weight
            and any(name in op for name in ("Conv", "Gemm", "MatMul"))
        )
        moved = int(facts.get("activation_size", 0)) + int(facts.get("output_size", 0))
        ms = middle(times[:, place])
        if bears and node is not None:
            done.add(node.operator)
            found.append(
                Kernel(
                    node.operator, op, 0, True, ms,
                    macs=node.macs,
                    computed_macs=node.macs
                    if int8
                    else max(node.macs, macs_of(op, shapes[weight], shapes[0], outputs[0])),
                    channels=node.channels,
                    weight_bytes=int(facts.get("parameter_size", 0)),
                    moved_bytes=moved,
                    blocked=int8 or "nchwc" in str(kernel["name"]) or "Conv" not in op,
                    int8=int8,
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
            whole = float(padded(c_in, block) * padded(c_out, block)) if len(bearing) == 1 else c_in * c_out
            found.append(
                Kernel(
                    node.operator, node.op, 0, True, ms,
                    macs=sum(each.macs for each in bearing),
                    computed_macs=int(sum(each.macs for each in bearing) * max(whole / (c_in * c_out), 1)),
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


@dataclass(frozen=True)
class Line:
    """One kernel, compared between both networks.

    Attributes:
        name: Name of the layer; for a step without weights its operator and the layer that it follows.
        kind: The runtime's kernel type.
        layer: Index among the weight-bearing operators; None for a step without weights.
        dense_macs, slim_macs: Multiply-adds in each network; 0 without weights.
        dense_ms, slim_ms: Times under the runtime's profiler; None where a network lacks the kernel.
        predicted_dense_ms, predicted_slim_ms: Times predicted by the table; None without a prediction.
        bound: compute, bandwidth or launch: the one that takes longest at the device's peaks.
        peak_share: Time at the device's peaks divided by the measured time (slim).
        padding: Share of the computed multiply-adds (slim) that is padding to whole blocks.
        gap_ms: Part of the gap, in milliseconds.
        sentence: The cause of the gap and a remedy; empty where the gap is small.
    """

    name: str
    kind: str
    layer: int | None
    dense_macs: int
    slim_macs: int
    dense_ms: float | None
    slim_ms: float | None
    predicted_dense_ms: float | None
    predicted_slim_ms: float | None
    bound: str
    peak_share: float | None
    padding: float
    gap_ms: float
    sentence: str


def explain(
    dense: Profile,
    slim: Profile,
    names: Sequence[str],
    machine: Machine,
    predicted: Sequence[tuple[float, float]] | None = None,
) -> list[Line]:
    """Compare all kernels of both networks, the largest part of the gap first.

    Args:
        dense, slim: Profiles of both networks on the same device.
        names: Names of the weight-bearing operators, in the order of the files.
        machine: Peak rates of the device.
        predicted: Predicted milliseconds (dense, slim) of each weight-bearing operator.
    """
    before = {kernel.key: kernel for kernel in dense.kernels}
    after = {kernel.key: kernel for kernel in slim.kernels}
    ratio = _ratio(sum(each.macs for each in slim.kernels), sum(each.macs for each in dense.kernels))
    weights = float(sum(each.weight_bytes for each in slim.kernels))
    lines = []
    for key in dict.fromkeys([*before, *after]):
        wide, narrow = before.get(key), after.get(key)
        shown = narrow or wide
        assert shown is not None
        gap = (narrow.ms if narrow else 0.0) - ratio * (wide.ms if wide else 0.0)
        limits = _limits(narrow, machine, weights) if narrow else {}
        bound = max(limits, key=lambda name: limits[name]) if limits else ""
        known = (
            predicted[shown.operator]
            if predicted and shown.weighted and shown.operator < len(predicted)
            else None
        )
        line = Line(
            name=_name(shown, names),
            kind=shown.op,
            layer=shown.operator if shown.weighted else None,
            dense_macs=wide.macs if wide else 0,
            slim_macs=narrow.macs if narrow else 0,
            dense_ms=wide.ms if wide else None,
            slim_ms=narrow.ms if narrow else None,
            predicted_dense_ms=known[0] if known else None,
            predicted_slim_ms=known[1] if known else None,
            bound=bound,
            peak_share=min(1.0, limits[bound] / narrow.ms) if narrow and bound and narrow.ms > 0 else None,
            padding=1 - _ratio(narrow.macs, narrow.computed_macs) if narrow and narrow.macs else 0.0,
            gap_ms=gap,
            sentence="",
        )
        text = ""
        if narrow and gap > NOTABLE * slim.whole_ms:
            text = _sentence(line, wide, narrow, ratio, limits, names)
        lines.append(Line(**{**vars(line), "sentence": text}))
    return sorted(lines, key=lambda line: (-line.gap_ms, -(line.slim_ms or 0.0)))


def _limits(kernel: Kernel, machine: Machine, weights: float) -> Mapping[str, float]:
    """Return a kernel's lower bound in milliseconds by each of the device's peak rates, which are those of FP32."""
    if kernel.int8:
        return {}
    return {
        "compute": machine.compute_ms(kernel.computed_macs),
        "bandwidth": machine.transfer_ms(kernel.weight_bytes, among=weights)
        + machine.transfer_ms(kernel.moved_bytes),
        "launch": machine.launch_ms,
    }


def _name(kernel: Kernel, names: Sequence[str]) -> str:
    owner = names[kernel.operator] if kernel.operator < len(names) else f"operator {kernel.operator + 1}"
    if kernel.weighted:
        return owner
    again = f" ({kernel.place + 1})" if kernel.place else ""
    return f"{kernel.op} at {owner}{again}"


def _sentence(
    line: Line,
    wide: Kernel | None,
    narrow: Kernel,
    ratio: float,
    limits: Mapping[str, float],
    names: Sequence[str],
) -> str:
    """Describe why this kernel is part of the gap, and what would help."""
    if line.kind in CONVERSIONS:
        return f"{line.name} converts between FP32 and INT8: it goes away where its neighbours are in one precision."
    if any(word in line.kind for word in LAYOUT):
        new = " and is not needed in the dense network" if wide is None else ""
        return (
            f"{line.name} only changes the layout{new}: it goes away where the layers around it have channel counts "
            "that fit the runtime's blocks (--granularity auto)."
        )
    if wide is None:
        return f"{line.name} is computed in the slim network only: there the runtime fuses other operators."
    own = _ratio(narrow.macs, wide.macs) if narrow.weighted else _ratio(narrow.moved_bytes, wide.moved_bytes)
    what = "multiply-adds" if narrow.weighted else "bytes"
    cut_less = (own - ratio) * wide.ms
    start = (
        f"{line.name}: {_percent(own)} of its {what} in {_percent(_ratio(narrow.ms, wide.ms))} of its time"
    )
    if cut_less > 0.5 * line.gap_ms:
        return (
            f"{start}; it was cut less than the network ({_percent(ratio)}), so pruning it further would help."
            if narrow.weighted
            else f"{start}; fewer channels in what it reads would help."
        )
    if narrow.weighted and wide.blocked and not narrow.blocked:
        return (
            f"{start}; {_channels(narrow)} channels do not fit the runtime's layout, and a slower kernel is taken: "
            "keep multiples of 4."
        )
    if line.padding >= PADDED and narrow.channels:
        return (
            f"{start}; {_percent(line.padding)} of what is computed only pads its {_channels(narrow)} channels to "
            "whole blocks: a few channels fewer, or as many more for nothing, would help."
        )
    if line.bound == "launch":
        return (
            f"{start}; it is so small that starting it takes as long as its work, whatever its width: only fewer "
            "layers would help."
        )
    if line.bound == "bandwidth":
        moved, was = (each.moved_bytes + each.weight_bytes for each in (narrow, wide))
        return (
            f"{start}; it is held up by memory: it still moves {_percent(_ratio(moved, was))} of the bytes, which fall "
            "with the channels on either side, not with their product."
        )
    reached = (
        "" if line.peak_share is None else f" and reaches {_percent(line.peak_share)} of the device's peak"
    )
    return f"{start}; it computes{reached}: narrower kernels use the processor less well."


def _channels(kernel: Kernel) -> str:
    c_in, c_out = kernel.channels or (0, 0)
    return f"{c_in} to {c_out}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "?"
