"""Dense against slim, number by number: the rows of the page and of the closing table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from compressor.core.conditions import MEDIAN, UNLOADED
from compressor.core.manifest import Manifest
from compressor.core.metrics import SCORE
from compressor.core.tables import Table
from compressor.report.formats import (
    ABSENT,
    MINUS,
    TIMES,
    count,
    milliseconds,
    percent,
    percentile_name,
    ratio,
    score,
    score_change,
    significant,
    size,
)
from compressor.report.judgement import slower_than_dense, time_ratio, verdict_of

EQUAL = 1.005
"""Two values whose quotient is below this count as equal in a tile."""

TileState = Literal["good", "bad", "open", ""]

# Signs that a terminal may not have.
PLAIN = str.maketrans({ABSENT: "-", MINUS: "-"})


@dataclass(frozen=True)
class Row:
    """One quantity of both networks; `change` is slim's share of dense, or the difference."""

    label: str
    dense: str
    slim: str
    change: str


@dataclass(frozen=True)
class Tile:
    """A headline number: the slim network's value, the dense one's for comparison, and a `state` for its color."""

    label: str
    value: str
    before: str
    state: TileState = ""


def closing_table(manifest: Manifest | Mapping[str, Any]) -> Table:
    """Return dense and slim side by side; print `verdict(manifest)` below it."""
    table = Table("", "dense", "slim", "of dense", right=("dense", "slim", "of dense"))
    for row in comparison(Manifest.tolerant(manifest)):
        table.add(*(cell.translate(PLAIN) for cell in (row.label, row.dense, row.slim, row.change)))
    return table


def comparison(manifest: Manifest) -> list[Row]:
    """Return the rows of accuracy, latency, MACs, parameters and file sizes that the manifest knows."""
    rows = [*_accuracy_rows(manifest), *_latency_rows(manifest), *_cost_rows(manifest)]
    return [row for row in rows if (row.dense, row.slim) != (ABSENT, ABSENT)]


def _accuracy_rows(manifest: Manifest) -> list[Row]:
    accuracy, file = manifest.accuracy, manifest.deployed
    scored, dense = accuracy.exported_images, accuracy.dense
    fewer = f" on {scored:,.0f} images" if scored is not None and scored != accuracy.images else ""
    metric = accuracy.by
    name = metric.title
    split = f"{name}, {accuracy.split or 'unknown'} split" if metric.name != SCORE else name
    own = [] if file is None else [(f"{name}, of {file.file}", None, file.accuracy)]
    return [
        Row(label, score(before, metric), score(slim, metric), score_change(_difference(slim, dense), metric))
        for label, before, slim in (
            (split, dense, accuracy.finetuned),
            (f"{name}, only cut", None, accuracy.pruned),
            (f"{name}, compensated, before training", None, accuracy.compensated),
            (f"{name}, fine-tuned, not delivered", None, accuracy.discarded),
            (f"{name}, of the exported ONNX{fewer}", None, accuracy.exported),
            *own,
        )
    ]


def _latency_rows(manifest: Manifest) -> list[Row]:
    latency = manifest.latency
    measured = percentile_name(latency.percentile)
    conditions = manifest.conditions
    title = replace(conditions, percentile=MEDIAN).title.capitalize()
    rows = (
        ("predicted", latency.predicted_dense_ms, latency.predicted_ms),
        (f"measured ({measured})", latency.dense_ms, latency.measured_ms),
        *([] if conditions.at_median else [("measured (median)", latency.dense_median_ms, latency.median_ms)]),
        ("measured (p90)", latency.dense_p90_ms, latency.p90_ms),
        ("measured (p99)", latency.dense_p99_ms, latency.p99_ms),
    )
    found = [
        Row(f"{title}, {label}", milliseconds(dense), milliseconds(slim), percent(ratio(slim, dense)))
        for place, (label, dense, slim) in enumerate(rows)
        if place < 2 or label != f"measured ({measured})"
    ]
    before, after = latency.dense_inputs_per_s, latency.inputs_per_s
    if conditions != UNLOADED and after is not None:
        dense, slim = (ABSENT if value is None else significant(value) for value in (before, after))
        found.append(Row("Throughput, inputs a second", dense, slim, percent(ratio(after, before))))
    return found


def _cost_rows(manifest: Manifest) -> list[Row]:
    dense, slim, file = manifest.cost.dense, manifest.cost.slim, manifest.deployed
    own = [] if file is None else [(f"ONNX file, {file.file}", dense.onnx_bytes, file.bytes, size)]
    return [
        Row(label, shown(before), shown(after), percent(ratio(after, before)))
        for label, before, after, shown in (
            ("MACs", dense.macs, slim.macs, count),
            ("Parameters", dense.params, slim.params, count),
            ("ONNX file", dense.onnx_bytes, slim.onnx_bytes, size),
            *own,
            ("Weights, safetensors", dense.safetensors_bytes, slim.safetensors_bytes, size),
        )
    ]


def tiles(manifest: Manifest) -> list[Tile]:
    """Return the four most important numbers; unknown ones are left out."""
    dense, slim, file = manifest.cost.dense, manifest.cost.slim, manifest.deployed
    found = [
        _latency_tile(manifest),
        _accuracy_tile(manifest),
        _tile("MACs", slim.macs, dense.macs, count, "fewer"),
        _tile("ONNX file", slim.onnx_bytes if file is None else file.bytes, dense.onnx_bytes, size, "smaller"),
    ]
    return [tile for tile in found if tile is not None]


def _latency_tile(manifest: Manifest) -> Tile:
    """Return the tile of the latency: measured, else by the table, else without a value."""
    latency, title = manifest.latency, manifest.conditions.title.capitalize()
    tile = _tile(f"{title}, measured", latency.measured_ms, latency.dense_ms, milliseconds, "faster", "slower")
    if tile is None:
        how = "estimated" if latency.estimated else "predicted"
        predicted = (latency.predicted_ms, latency.predicted_dense_ms)
        tile = _tile(f"{title}, {how}", *predicted, milliseconds, "faster", "slower")
    if tile is None:
        return Tile(title, ABSENT, "not measured")
    return replace(tile, state=_latency_state(manifest))


def _latency_state(manifest: Manifest) -> TileState:
    """Return whether the latency is good, by its budget if there is one, else beside the dense network's."""
    verdict = next((verdict_of(each) for each in manifest.budgets if each.name == "latency"), None)
    if verdict == "missed":
        return "bad"
    found = time_ratio(manifest)
    if verdict in ("undecided", "predicted") or slower_than_dense(manifest):
        return "open"
    if verdict == "kept" or (found is not None and found[1] == "measured" and found[0] < 1 / EQUAL):
        return "good"
    return ""


def _tile(
    label: str, slim: float | None, dense: float | None, shown: Any, better: str, worse: str = ""
) -> Tile | None:
    if slim is None:
        return None
    gain = ratio(dense, slim)
    if gain is None:
        return Tile(label, shown(slim), "dense not known")
    if gain > EQUAL:
        return Tile(label, shown(slim), f"{significant(gain)}{TIMES} {better} than {shown(dense)}")
    if worse and gain < 1 / EQUAL:
        return Tile(label, shown(slim), f"{significant(1 / gain)}{TIMES} {worse} than {shown(dense)}")
    return Tile(label, shown(slim), f"dense {shown(dense)}")


def _accuracy_tile(manifest: Manifest) -> Tile | None:
    accuracy, slim = manifest.accuracy, manifest.deployed_score
    if slim is None:
        return None
    change, metric = _difference(slim, accuracy.dense), accuracy.by
    before = (
        "dense not known"
        if change is None
        else f"{score_change(change, metric)}, dense {score(accuracy.dense, metric)}"
    )
    return Tile(metric.title, score(slim, metric), before)


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
