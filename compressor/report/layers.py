"""The layers that take most of the remaining time, and those that lost work but hardly any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.report.collect import Manifest, rows, section, text
from compressor.report.formats import count, milliseconds, number, percent, ratio

STUBBORN_MACS = 0.2
"""Layers that lost at least this share of their MACs are examined ..."""

STUBBORN_SHARE = 0.5
"""... and listed if they lost less of their time than this share of it."""


@dataclass(frozen=True)
class HotLayer:
    """A layer with a large share of the remaining time; `number` is its position in the table of all layers."""

    number: int
    name: str
    kind: str
    channels: str
    dense: str
    slim: str
    share: str


@dataclass(frozen=True)
class Hot:
    """The layers with the most remaining time, or the most MACs if no layer has a time."""

    unit: str
    layers: tuple[HotLayer, ...]
    remark: str


def hottest(manifest: Manifest, most: int = 8) -> Hot | None:
    """Return the `most` layers that dominate the slim network."""
    layers = list(enumerate(rows(manifest, "layers"), start=1))
    timed = [pair for pair in layers if number(pair[1].get("slim_ms")) is not None]
    key, unit, shown = ("slim_ms", "ms", milliseconds) if timed else ("slim_macs", "MACs", count)
    known = [
        (place, layer, value) for place, layer in layers if (value := number(layer.get(key))) is not None
    ]
    total = sum(value for _, _, value in known)
    if total <= 0:
        return None
    known.sort(key=lambda entry: (-entry[2], entry[0]))
    found = tuple(
        HotLayer(
            number=place,
            name=text(layer, "name", "unnamed"),
            kind=text(layer, "kind"),
            channels=channels(layer),
            dense=shown(layer.get(f"dense_{unit.lower()}")),
            slim=shown(value),
            share=percent(value / total),
        )
        for place, layer, value in known[:most]
    )
    remark = (
        _outside(manifest, total)
        if timed
        else "No layer has a time in this run, so they are ordered by MACs."
    )
    return Hot(unit, found, remark)


def _outside(manifest: Manifest, total: float) -> str:
    predicted = number(section(manifest, "latency").get("predicted_ms"))
    if section(manifest, "explanation"):
        return f"Times were measured under the profiler; the layers add up to {milliseconds(total)}."
    start = f"Times are the table's prediction; the layers add up to {milliseconds(total)}"
    if predicted is None:
        return f"{start}."
    if predicted <= total:
        return f"{start}, the whole network is predicted at {milliseconds(predicted)}."
    rest = f"{milliseconds(predicted - total)} ({percent(1 - total / predicted)})"
    return (
        f"{start} of the network's {milliseconds(predicted)}. The other {rest} are operators without "
        "weights (pooling, additions, copies) and the overhead of a run."
    )


def stubborn(manifest: Manifest) -> list[str]:
    """Return layers whose time hardly followed their MACs, longest time first: 'NAME: MACs -60.0%, time -3.0%'."""
    found = []
    for layer in rows(manifest, "layers"):
        work = ratio(layer.get("slim_macs"), layer.get("dense_macs"))
        time = ratio(layer.get("slim_ms"), layer.get("dense_ms"))
        if work is None or time is None or 1 - work < STUBBORN_MACS:
            continue
        if 1 - time < STUBBORN_SHARE * (1 - work):
            line = f"{text(layer, 'name', 'unnamed')}: MACs {_change(work)}, time {_change(time)}"
            found.append((-(number(layer.get("slim_ms")) or 0.0), line))
    return [line for _, line in sorted(found)]


def _change(share: float) -> str:
    change = percent(share - 1)
    return f"+{change}" if share > 1 else change


def channels(layer: Mapping[str, Any]) -> str:
    """Format as '64 → 128, now 40 → 96': inputs and outputs, dense and slim."""
    dense, slim = _pair(layer.get("dense_channels")), _pair(layer.get("slim_channels"))
    if not dense or not slim:
        return dense or slim
    return dense if dense == slim else f"{dense}, now {slim}"


def _pair(value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return ""
    first, second = number(value[0]), number(value[1])
    return "" if first is None or second is None else f"{first:.0f} → {second:.0f}"
