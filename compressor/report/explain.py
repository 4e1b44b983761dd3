"""Sentences that explain the numbers; they use the manifest only, and say so if it lacks a number."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from typing import Any

from compressor.core.manifest import ExplainedLine, Explanation, Latency, Manifest
from compressor.core.metrics import ACCURACY, AGREEMENT, MEAN_AP, MEAN_IOU, PYTHON, SCORE
from compressor.report.formats import (
    ABSENT,
    count,
    duration,
    milliseconds,
    percent,
    percentile_name,
    points,
    ratio,
    significant,
)
from compressor.report.judgement import AFTERWARDS

SAME = 0.02  # two ratios closer than this are called equal: repeated measurements differ by as much


def accuracy_resolution(manifest: Manifest) -> str:
    """Return the resolution of a share of the test split's images: the step of one image."""
    images = manifest.accuracy.images
    if images is None or images < 1 or manifest.accuracy.metric not in (ACCURACY, AGREEMENT):
        return ""
    return f"{images:,} images were tested, so one image more or less is {points(1 / images).lstrip('+')}."


def compensation(manifest: Manifest) -> str:
    """Say what compensation did to the network before any training, and which layers it could not refit."""
    found = manifest.compensation
    if found is None or not found.refitted:
        return ""
    how = {"layers": "layer by layer", "moments": "from the moments of its inputs"}.get(found.method, found.method)
    parts = [
        f"Before any training, {_layers(len(found.refitted))} refitted to the dense network's outputs {how}, on "
        f"{found.images or 0:,} images without their labels"
    ]
    if found.error is not None and found.error_cut is not None:
        parts.append(
            f": the squared error of the network's outputs on images that no fit saw fell from "
            f"{percent(found.error_cut)} to {percent(found.error)} of the dense outputs'"
        )
    parts.append(". ")
    if found.statistics == "own":
        parts.append("Batch-norm statistics were estimated again. ")
    if found.left:
        reasons: dict[str, list[str]] = {}
        for layer, reason in found.left.items():
            reasons.setdefault(reason, []).append(layer)
        named = "; ".join(
            f"{', '.join(layers[:3])}{f' and {len(layers) - 3} more' if len(layers) > 3 else ''} ({reason})"
            for reason, layers in reasons.items()
        )
        parts.append(f"As sliced: {named}.")
    return "".join(parts).strip()


def _layers(number: int) -> str:
    return "one layer was" if number == 1 else f"{number} layers were"


def measurement(manifest: Manifest) -> str:
    """Describe the device, runtime and settings of the latency measurement."""
    latency = manifest.latency
    if latency.measured_ms is None:
        return f"The latency was not measured{f' on {latency.device}' if latency.device else ''}."
    parts = [latency.device or "device not recorded", latency.runtime or "runtime not recorded"]
    mixed = f"mixed precision, the dense network in {_floats(manifest)}"
    parts += [mixed if latency.precision == "mixed" else latency.precision or "precision not recorded"]
    parts += [
        f"{name} {value:g}"
        for name, value in (("batch", latency.batch), ("threads", latency.threads))
        if value is not None
    ]
    streams = manifest.conditions.streams
    parts += [f"{streams} networks at once, each run under the load of the others"] if streams > 1 else []
    many = "runs" if latency.runs is None else f"{latency.runs:,.0f} runs"
    return f"Latency is the {percentile_name(latency.percentile)} of {many}: {', '.join(parts)}.{_tail(latency)}"


def _floats(manifest: Manifest) -> str:
    """Return the precision of the layers of a run in mixed precision that are not in INT8."""
    file = manifest.exports.get("mixed")
    if file is not None and file.rest:
        return file.rest
    return "fp16" if (manifest.latency.runtime or "").lower().startswith("tensorrt") else "fp32"


def _tail(latency: Latency) -> str:
    """Say how far another percentile than the median lies above it."""
    if latency.tail is None or latency.dense_tail is None:
        return ""
    return (
        f" It is {significant(latency.tail)} times the median of these runs, and {significant(latency.dense_tail)} "
        "times for the dense network; runs that other programs slowed down count."
    )


def prediction_error(manifest: Manifest) -> str:
    """Compare the predicted with the measured latency."""
    predicted, measured = manifest.latency.predicted_ms, manifest.latency.measured_ms
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
        (group.width, group.kept) for group in manifest.groups if group.width and group.kept is not None
    ]
    if not known:
        return "The manifest does not say what was removed."
    blocks = ""
    if count := len(manifest.removed):
        blocks = f"{count} block{'s were' if count > 1 else ' was'} removed whole: {', '.join(manifest.removed)}. "
    cut = sum(kept < width for width, kept in known)
    left = sum(kept for _, kept in known) / sum(width for width, _ in known)
    return f"{blocks}{cut} of {len(known)} groups lost channels; {percent(left)} of all prunable channels remain."


def speed(manifest: Manifest) -> str:
    """Compare the remaining share of MACs with the remaining share of latency."""
    work = ratio(manifest.cost.slim.macs, manifest.cost.dense.macs)
    time = ratio(manifest.latency.measured_ms, manifest.latency.dense_ms)
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
    found = manifest.explanation
    if found is None:
        return ""
    work = ratio(
        sum(line.slim_macs or 0 for line in found.lines), sum(line.dense_macs or 0 for line in found.lines)
    )
    time = ratio(found.slim_ms, found.dense_ms)
    if work is None or time is None:
        return ""
    return (
        f"With {percent(work)} of the MACs the slim network takes {percent(time)} of the dense one's time"
        f"{_profiled_in(found)}. The gap of a line is its time beyond {percent(work)} of its dense time, "
        "so that all gaps add up to the whole one; the largest come first, because they would help most."
    )


def _profiled_in(found: Explanation) -> str:
    """Return the precision of the profiled networks in words, which may be another one than the run's."""
    if found.precision == "mixed":
        return ", the dense network in FP32 and the slim one in mixed precision"
    return f", both in {found.precision.upper()}" if found.precision else ""


def explained(manifest: Manifest) -> dict[str, Any] | None:
    """Return the result of `compress measure --explain` for the page; None if it has not been run."""
    found = manifest.explanation
    if found is None or not found.lines:
        return None
    total = sum(line.slim_ms or 0.0 for line in found.lines)
    guessed = sum(line.predicted_slim_ms or 0.0 for line in found.lines)
    return {
        "gap": gap(manifest),
        "precision": _profiled_in(found),
        "sentences": [line.sentence for line in found.lines if line.sentence],
        "predicted": "Estimated, slim" if manifest.latency.estimated else "Predicted, slim",
        "remark": (
            f"Measured on {found.where or 'a device that is not recorded'}{_profiled_in(found)}, under its profiler, "
            f"whose overhead is subtracted. Peaks: {found.peaks or 'not recorded'}."
        ),
        "lines": [_line(line, total, guessed) for line in found.lines],
    }


def _line(line: ExplainedLine, total: float, guessed: float) -> dict[str, str]:
    return {
        "name": line.name or "unnamed",
        "macs": count(line.slim_macs) if line.slim_macs else ABSENT,
        "work": percent(ratio(line.slim_macs, line.dense_macs), 0),
        "dense": milliseconds(line.dense_ms),
        "slim": _with_share(line.slim_ms, total),
        "predicted": _with_share(line.predicted_slim_ms, guessed),
        "bound": line.bound or ABSENT,
        "peak": percent(line.peak_share, 0),
        "padding": percent(line.padding, 0) if line.padding else ABSENT,
        "gap": milliseconds(line.gap_ms),
    }


def _with_share(value: float | None, total: float) -> str:
    share = ratio(value, total)
    return milliseconds(value) if share is None else f"{milliseconds(value)}, {percent(share, 0)}"


def effort(manifest: Manifest) -> str:
    """Describe the cost of the search, and where its time went."""
    search = manifest.search
    if search is None:
        return "This run has not searched yet, or its agent keeps no record."
    parts = [
        f"{value:,} {unit}"
        for value, unit in ((search.evaluations, "networks scored"), (search.episodes, "episodes"))
        if value is not None
    ]
    if search.seconds is not None:
        parts.append(duration(search.seconds))
    sentence = f"Agent {search.agent or 'not recorded'}: {', '.join(parts) or 'effort not recorded'}."
    return f"{sentence} {_timing(search.timing)}".strip()


def _timing(timing: Mapping[str, float]) -> str:
    known = [
        (part, share)
        for part in timing
        if part != "total" and (share := ratio(timing[part], timing.get("total"))) is not None
    ]
    if not known:
        return ""
    rest = 1 - sum(share for _, share in known)
    shares = [f"{part} {percent(share)}" for part, share in known]
    if rest >= 0.001:  # less would be printed as "<0.1%"
        shares.append(f"the rest {percent(rest)}")
    return f"Of that time: {', '.join(shares)}."


def beside_layers(manifest: Manifest) -> str:
    """Describe the multiply-adds outside the layers, so that the table of layers and the network's total agree."""
    if not manifest.other_macs:
        return ""
    each = ", ".join(
        f"{row.name or 'unnamed'} {count(row.dense_macs)} → {count(row.slim_macs)}" for row in manifest.other_macs
    )
    return f"MACs outside the layers, dense → slim: {each}. With them the layers add up to the total."


def checks(manifest: Manifest | Mapping[str, Any]) -> list[str]:
    """Return what torch-pruning and fvcore found for the slim network, a sentence each; empty if not recorded."""
    found = Manifest.tolerant(manifest).checks
    known = (("Removed channels", found.torch_pruning), ("Multiply-adds", found.fvcore))
    return [f"{what}: {check.words}." for what, check in known if check.words]


def parity(manifest: Manifest) -> str:
    """Describe the difference between the exported file and the trained network."""
    found = manifest.parity
    if found.max_abs is None:
        return "The exported file was not compared with the trained network."
    sentence = f"Exported ONNX against torch: outputs differ by at most {found.max_abs:.1e}"
    if found.mean_abs is not None:
        sentence += f", {found.mean_abs:.1e} on average"
    if found.tolerance is not None:
        too_much = "" if found.max_abs <= found.tolerance else ", so this is too much"
        sentence += f" ({found.tolerance:.0e} allowed{too_much})"
    if found.top1_agreement is not None and manifest.accuracy.metric not in (SCORE, MEAN_AP):
        inputs = "the inputs" if found.images is None else f"{found.images:,.0f} inputs"
        of = f"the pixels of {inputs}" if manifest.accuracy.metric == MEAN_IOU else inputs
        sentence += f"; the predicted class agrees on {percent(found.top1_agreement, 2)} of {of}"
    return f"{sentence}."


def header(manifest: Manifest) -> str:
    """Describe where, in which precision and when the run was made: 'AMD EPYC, onnxruntime-cpu 1.32.0, FP32, ...'."""
    latency, recipe = manifest.latency, manifest.recipe
    device = latency.device or _text(recipe.get("device"))
    precision = latency.precision or _text(recipe.get("precision"))
    words = precision.upper()
    if precision == "mixed":  # before the measurement, its floats are not recorded
        words = f"mixed {_floats(manifest).upper()} and INT8" if latency.runtime else "mixed precision"
    cpu = _text(manifest.machine.get("cpu"))
    on_cpu = device == "local" and cpu and (latency.runtime or "").startswith("onnxruntime-cpu")
    parts = [f"{cpu} (local)" if on_cpu else device, latency.runtime, words, _day(manifest)]
    return ", ".join(part for part in parts if part)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _day(manifest: Manifest) -> str:
    """Return the day on which the last stage before the page ended or began, in UTC; empty if none is recorded."""
    known = [stage for name, stage in manifest.stages.items() if name not in AFTERWARDS]
    stamps = [stamp for stage in known for stamp in (stage.started, stage.finished) if stamp]
    days = []
    for stamp in stamps:
        with suppress(ValueError):
            days.append(date.fromisoformat(stamp[:10]))
    return f"{max(days).day} {max(days):%B %Y}" if days else ""


def images(manifest: Manifest) -> str:
    """Describe how images become the network's input, and the origin of that; empty if not recorded."""
    from compressor.data.preprocessing import Preprocessing

    try:
        found, origin = Preprocessing.from_record(manifest.preprocessing)
    except (KeyError, TypeError, ValueError):  # a run of an earlier version, or a damaged manifest
        return ""
    return f"Images are {found.describe()}" + (f" ({origin})." if origin else ".")


def source(manifest: Manifest) -> str:
    """Describe the data that the run used."""
    if manifest.data == PYTHON:
        return "data and network given in Python"
    if not manifest.data:
        return "trained and tested on data not recorded"
    if manifest.accuracy.metric == AGREEMENT:
        return f"compared with the dense network on {manifest.data}, without labels"
    return f"trained and tested on {manifest.data}"
