"""Sentences that explain the numbers; they use the manifest only, and say so if it lacks a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report.collect import Manifest, rows, section, text
from compressor.report.formats import (
    ABSENT,
    count,
    duration,
    milliseconds,
    number,
    percent,
    percentile_name,
    points,
    ratio,
)

SAME = 0.02  # two ratios closer than this are called equal: repeated measurements differ by as much


def accuracy_resolution(manifest: Manifest) -> str:
    """Return the resolution of the accuracy: the step of one image of the test split."""
    images = number(section(manifest, "accuracy").get("images"))
    if images is None or images < 1:
        return ""
    return (
        f"{int(images):,} images were tested, so one image more or less is {points(1 / images).lstrip('+')}."
    )


def measurement(manifest: Manifest) -> str:
    """Describe the device, runtime and settings of the latency measurement."""
    latency = section(manifest, "latency")
    if number(latency.get("measured_ms")) is None:
        where = text(latency, "device")
        return f"The latency was not measured{f' on {where}' if where else ''}."
    parts = [text(latency, "device", "device not recorded"), text(latency, "runtime", "runtime not recorded")]
    parts += [text(latency, "precision", "precision not recorded")]
    for key, unit in (("batch", "batch"), ("threads", "threads")):
        if (value := number(latency.get(key))) is not None:
            parts.append(f"{unit} {value:g}")
    runs = number(latency.get("runs"))
    many = "runs" if runs is None else f"{runs:,.0f} runs"
    return f"Latency is the {percentile_name(latency.get('percentile'))} of {many}: {', '.join(parts)}."


def prediction_error(manifest: Manifest) -> str:
    """Compare the predicted with the measured latency."""
    latency = section(manifest, "latency")
    predicted, measured = number(latency.get("predicted_ms")), number(latency.get("measured_ms"))
    if predicted is None or measured is None or predicted <= 0:
        return ""
    off = measured / predicted - 1
    than = (
        "as predicted" if off == 0 else f"{percent(abs(off))} {'more' if off > 0 else 'less'} than predicted"
    )
    return f"The table predicted {milliseconds(predicted)}; {milliseconds(measured)} was measured, {than}."


def removal(manifest: Manifest) -> str:
    """Describe how many groups and channels were removed."""
    known = [
        (width, kept)
        for group in rows(manifest, "groups")
        if (width := number(group.get("width"))) and (kept := number(group.get("kept"))) is not None
    ]
    if not known:
        return "The manifest does not say what was removed."
    cut = sum(kept < width for width, kept in known)
    left = sum(kept for _, kept in known) / sum(width for width, _ in known)
    return f"{cut} of {len(known)} groups lost channels; {percent(left)} of all prunable channels remain."


def speed(manifest: Manifest) -> str:
    """Compare the remaining share of MACs with the remaining share of latency."""
    cost, latency = section(manifest, "cost"), section(manifest, "latency")
    work = ratio(section(cost, "slim").get("macs"), section(cost, "dense").get("macs"))
    time = ratio(latency.get("measured_ms"), latency.get("dense_ms"))
    if work is None or time is None:
        return (
            "The measured latency of both networks and their MACs are needed to compare work with time; "
            "this run does not have them all."
        )
    shares = f"{percent(work)} of the dense one's MACs in {percent(time)} of its measured latency"
    start = f"The slim network does {shares}"
    if work >= 1 and time >= 1 - SAME:
        return f"{start}: no work was removed, so no time was saved."
    if abs(time - work) <= SAME:
        return f"{start}: the time fell in proportion to the work."
    if time < work:
        return f"{start}: the time fell further than the work."
    if time >= 1:
        return f"{start}: none of the removed work saved time."
    return f"{start}: {percent((1 - time) / (1 - work), 0)} of the relative saving in MACs became a saving in time."


def gap(manifest: Manifest) -> str:
    """Compare the shares of time and work under the profiler, and explain the order of the lines."""
    found = section(manifest, "explanation")
    lines = rows(found, "lines")
    work = ratio(_sum(lines, "slim_macs"), _sum(lines, "dense_macs"))
    time = ratio(found.get("slim_ms"), found.get("dense_ms"))
    if work is None or time is None:
        return ""
    return (
        f"With {percent(work)} of the MACs the slim network takes {percent(time)} of the dense one's time. The gap of "
        f"a line is its time beyond {percent(work)} of its dense time, so that all gaps add up to the whole one; the "
        "largest come first, because they would help most."
    )


def _sum(lines: list[Mapping[str, Any]], key: str) -> float:
    return sum(number(line.get(key)) or 0.0 for line in lines)


def explained(manifest: Manifest) -> dict[str, Any] | None:
    """Return the result of `compress measure --explain` for the page; None if it has not been run."""
    found = section(manifest, "explanation")
    lines = rows(found, "lines")
    if not lines:
        return None
    total = _sum(lines, "slim_ms")
    guessed = _sum(lines, "predicted_slim_ms")
    estimated = section(manifest, "latency").get("estimated") is True
    return {
        "gap": gap(manifest),
        "sentences": [text(line, "sentence") for line in lines if text(line, "sentence")],
        "predicted": "Estimated, slim" if estimated else "Predicted, slim",
        "remark": (
            f"Measured on {text(found, 'where', 'a device that is not recorded')} under its profiler, whose overhead "
            f"is subtracted. Peaks: {text(found, 'peaks', 'not recorded')}."
        ),
        "lines": [
            {
                "name": text(line, "name", "unnamed"),
                "macs": count(line.get("slim_macs")) if number(line.get("slim_macs")) else ABSENT,
                "work": percent(ratio(line.get("slim_macs"), line.get("dense_macs")), 0),
                "dense": milliseconds(line.get("dense_ms")),
                "slim": _with_share(line.get("slim_ms"), total),
                "predicted": _with_share(line.get("predicted_slim_ms"), guessed),
                "bound": text(line, "bound") or ABSENT,
                "peak": percent(line.get("peak_share"), 0),
                "padding": percent(line.get("padding"), 0) if number(line.get("padding")) else ABSENT,
                "gap": milliseconds(line.get("gap_ms")),
            }
            for line in lines
        ],
    }


def _with_share(value: Any, total: float) -> str:
    share = ratio(value, total)
    return milliseconds(value) if share is None else f"{milliseconds(value)}, {percent(share, 0)}"


def effort(manifest: Manifest) -> str:
    """Describe the cost of the search, and where its time went."""
    search = section(manifest, "search")
    if not search:
        return "This run has not searched yet, or its agent keeps no record."
    parts = []
    for key, unit in (("evaluations", "networks scored"), ("episodes", "episodes")):
        if (value := number(search.get(key))) is not None:
            parts.append(f"{int(value):,} {unit}")
    if number(search.get("seconds")) is not None:
        parts.append(duration(search.get("seconds")))
    sentence = f"Agent {text(search, 'agent', 'not recorded')}: {', '.join(parts) or 'effort not recorded'}."
    return f"{sentence} {_timing(section(search, 'timing'))}".strip()


def _timing(timing: Mapping[str, Any]) -> str:
    total = number(timing.get("total"))
    known = [
        (part, share)
        for part in timing
        if part != "total" and (share := ratio(timing[part], total)) is not None
    ]
    if not known:
        return ""
    rest = 1 - sum(share for _, share in known)
    shares = [f"{part} {percent(share)}" for part, share in known]
    if rest >= 0.001:  # less would be printed as "<0.1%"
        shares.append(f"the rest {percent(rest)}")
    return f"Of that time: {', '.join(shares)}."


def _inputs(found: Mapping[str, Any]) -> str:
    images = number(found.get("images"))
    return "the inputs" if images is None else f"{images:,.0f} inputs"


def beside_layers(manifest: Manifest) -> str:
    """Describe the multiply-adds outside the layers, so that the table of layers and the network's total agree."""
    found = rows(manifest, "other_macs")
    if not found:
        return ""
    each = ", ".join(
        f"{text(row, 'name', 'unnamed')} {count(row.get('dense_macs'))} → {count(row.get('slim_macs'))}"
        for row in found
    )
    return f"MACs outside the layers, dense → slim: {each}. With them the layers add up to the total."


def checks(manifest: Manifest) -> list[str]:
    """Return what torch-pruning and fvcore found for the slim network, a sentence each; empty if not recorded."""
    found = section(manifest, "checks")
    known = (("torch_pruning", "Removed channels"), ("fvcore", "Multiply-adds"))
    return [f"{what}: {words}." for key, what in known if (words := text(section(found, key), "words"))]


def parity(manifest: Manifest) -> str:
    """Describe the difference between the exported file and the trained network."""
    found = section(manifest, "parity")
    largest, tolerance = number(found.get("max_abs")), number(found.get("tolerance"))
    if largest is None:
        return "The exported file was not compared with the trained network."
    sentence = f"Exported ONNX against torch: outputs differ by at most {largest:.1e}"
    if (mean := number(found.get("mean_abs"))) is not None:
        sentence += f", {mean:.1e} on average"
    if tolerance is not None:
        sentence += f" ({tolerance:.0e} allowed{'' if largest <= tolerance else ', so this is too much'})"
    if (agreement := number(found.get("top1_agreement"))) is not None:
        sentence += f"; the predicted class agrees on {percent(agreement, 2)} of {_inputs(found)}"
    return f"{sentence}."
