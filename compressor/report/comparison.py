"""Dense against slim, number by number: the rows of the page and of the closing table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressor.report.collect import Manifest, section, text
from compressor.report.formats import (
    ABSENT,
    TIMES,
    accuracy_percent,
    count,
    milliseconds,
    number,
    percent,
    percentile_name,
    points,
    ratio,
    significant,
    size,
)


@dataclass(frozen=True)
class Row:
    """One quantity of both networks; `change` is slim's share of dense, or the difference."""

    label: str
    dense: str
    slim: str
    change: str


@dataclass(frozen=True)
class Tile:
    """A headline number: the slim network's value, and the dense one's for comparison."""

    label: str
    value: str
    before: str


def comparison(manifest: Manifest) -> list[Row]:
    """Return the rows of accuracy, latency, MACs, parameters and file sizes that the manifest knows."""
    rows = [*_accuracy_rows(manifest), *_latency_rows(manifest), *_cost_rows(manifest)]
    return [row for row in rows if (row.dense, row.slim) != (ABSENT, ABSENT)]


def _accuracy_rows(manifest: Manifest) -> list[Row]:
    accuracy = section(manifest, "accuracy")
    split = text(accuracy, "split", "unknown")
    rows = [
        Row(
            f"Accuracy, {split} split",
            accuracy_percent(accuracy.get("dense")),
            accuracy_percent(accuracy.get("finetuned")),
            points(_difference(accuracy.get("finetuned"), accuracy.get("dense"))),
        )
    ]
    steps = (("pruned", "before fine-tuning"), ("exported", _exported(accuracy)))
    for key, label in steps:
        change = points(_difference(accuracy.get(key), accuracy.get("dense")))
        rows.append(Row(f"Accuracy, {label}", ABSENT, accuracy_percent(accuracy.get(key)), change))
    return rows


def _exported(accuracy: Manifest) -> str:
    """Return the label of the exported file; it says so if the file was scored on fewer images than the others."""
    images, scored = number(accuracy.get("images")), number(accuracy.get("exported_images"))
    fewer = scored is not None and scored != images
    return f"of the exported ONNX on {scored:,.0f} images" if fewer else "of the exported ONNX"


def _latency_rows(manifest: Manifest) -> list[Row]:
    latency = section(manifest, "latency")

    def row(label: str, dense: str, slim: str) -> Row:
        share = percent(ratio(latency.get(slim), latency.get(dense)))
        return Row(label, milliseconds(latency.get(dense)), milliseconds(latency.get(slim)), share)

    measured = percentile_name(latency.get("percentile"))
    tails = [
        row(f"Latency, measured (p{tail})", f"dense_p{tail}_ms", f"p{tail}_ms")
        for tail in (90, 99)
        if measured != f"p{tail}"
    ]
    return [
        row("Latency, predicted", "predicted_dense_ms", "predicted_ms"),
        row(f"Latency, measured ({measured})", "dense_ms", "measured_ms"),
        *tails,
    ]


def _cost_rows(manifest: Manifest) -> list[Row]:
    cost = section(manifest, "cost")
    dense, slim = section(cost, "dense"), section(cost, "slim")
    kinds = (
        ("MACs", "macs", count),
        ("Parameters", "params", count),
        ("ONNX file", "onnx_bytes", size),
        ("Weights, safetensors", "safetensors_bytes", size),
    )
    return [
        Row(label, shown(dense.get(key)), shown(slim.get(key)), percent(ratio(slim.get(key), dense.get(key))))
        for label, key, shown in kinds
    ]


def tiles(manifest: Manifest) -> list[Tile]:
    """Return the four most important numbers; unknown ones are left out."""
    latency, accuracy = section(manifest, "latency"), section(manifest, "accuracy")
    dense, slim = section(section(manifest, "cost"), "dense"), section(section(manifest, "cost"), "slim")
    found = [
        _tile(
            "Latency, measured", latency.get("measured_ms"), latency.get("dense_ms"), milliseconds, "faster"
        ),
        _accuracy_tile(accuracy),
        _tile("MACs", slim.get("macs"), dense.get("macs"), count, "fewer"),
        _tile("ONNX file", slim.get("onnx_bytes"), dense.get("onnx_bytes"), size, "smaller"),
    ]
    return [tile for tile in found if tile is not None]


def _tile(label: str, slim: Any, dense: Any, shown: Any, better: str) -> Tile | None:
    if number(slim) is None:
        return None
    gain = ratio(dense, slim)
    if gain is None:
        return Tile(label, shown(slim), "dense not known")
    # within half a per cent, the two count as equal
    if gain > 1.005:
        return Tile(label, shown(slim), f"{significant(gain)}{TIMES} {better} than {shown(dense)}")
    return Tile(label, shown(slim), f"dense {shown(dense)}")


def _accuracy_tile(accuracy: Manifest) -> Tile | None:
    slim = number(accuracy.get("finetuned"))
    if slim is None:
        return None
    change = _difference(slim, accuracy.get("dense"))
    before = (
        "dense not known"
        if change is None
        else f"{points(change)}, dense {accuracy_percent(accuracy.get('dense'))}"
    )
    return Tile("Accuracy", accuracy_percent(slim), before)


def _difference(left: Any, right: Any) -> float | None:
    first, second = number(left), number(right)
    return None if first is None or second is None else first - second
