"""Explains, kernel by kernel, why a slim network's share of the time exceeds its share of the multiply-adds.

If time were proportional to the multiply-adds, a network with a share R of them would take a share R of the dense
time. The excess of each kernel over R times its dense time sums to the whole gap, so that sorting by the excess shows
where a change helps most. The excess has two parts: time that did not shrink with the kernel's own work, and work that
was reduced less than in the rest of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.latency.kernels import Kernel, Profile
from compressor.latency.machine import Machine

NOTABLE = 0.02
"""Kernels whose part of the gap is below this share of the slim network's time get no sentence."""

PADDED = 0.1
"""Padding below this share of the computed multiply-adds is not mentioned."""

LAYOUT = ("Reorder", "Reformat", "Transpose")


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
    """Return a kernel's lower bound in milliseconds by each of the device's peak rates."""
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
