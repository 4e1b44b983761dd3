"""The tables of the report: the manifest's records as rows of strings, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compressor.core.manifest import Candidate, Layer, Manifest, Measurement, PrecisionPlan
from compressor.report import plots
from compressor.report.formats import (
    ABSENT,
    cost,
    count,
    duration,
    milliseconds,
    percent,
    percent_within,
    ratio,
    score,
    significant,
    size,
)
from compressor.report.judgement import AFTERWARDS, NAMES, margin, verdict_of
from compressor.report.sources import meaning

UNIFORM = "uniform"

STUBBORN_MACS = 0.2
"""Layers that lost at least this share of their MACs are examined ..."""

STUBBORN_SHARE = 0.5
"""... and listed if they lost less of their time than this share of it."""


def rounds(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "round": f"Round {place}",
            "share": share(row),
            "predicted": milliseconds(row.predicted_ms),
            "measured": milliseconds(row.measured_ms),
            "target": milliseconds(row.target_ms),
            "margin": margin(row.measured_ms, row.target_ms),
            "verdict": verdict_of(row),
        }
        for place, row in enumerate(manifest.rounds, start=1)
    ]


def share(row: Measurement | PrecisionPlan) -> str:
    """Format a network's time over another's with its 95 % interval, if both were timed in turns."""
    return percent_within(row.ratio, row.interval)


def groups(manifest: Manifest) -> list[dict[str, Any]]:
    found = []
    for group in manifest.groups:
        share = ratio(group.kept, group.width)
        found.append(
            {
                "name": group.name or "unnamed",
                "coupled": group.coupled,
                "kept": ABSENT if group.kept is None else f"{group.kept}",
                "width": ABSENT if group.width is None else f"{group.width}",
                "share": percent(share, 0),
                "bar": None if share is None else f"{min(max(share, 0.0), 1.0) * 100:.2f}",
            }
        )
    return found


def layers(manifest: Manifest) -> list[dict[str, str]]:
    return [
        {
            "number": str(place),
            "name": layer.name or "unnamed",
            "kind": layer.kind,
            "channels": channels(layer),
            "dense_macs": count(layer.dense_macs),
            "slim_macs": count(layer.slim_macs),
            "macs_share": percent(ratio(layer.slim_macs, layer.dense_macs), 0),
            "dense_ms": milliseconds(layer.dense_ms),
            "slim_ms": milliseconds(layer.slim_ms),
            "ms_share": percent(ratio(layer.slim_ms, layer.dense_ms), 0),
        }
        for place, layer in enumerate(manifest.layers, start=1)
    ]


def timed(manifest: Manifest) -> bool:
    """Return whether any layer of the slim network has a time."""
    return any(layer.slim_ms is not None for layer in manifest.layers)


def channels(layer: Layer) -> str:
    """Format as '64 → 128, now 40 → 96': inputs and outputs, dense and slim."""
    dense, slim = (
        f"{pair[0]} → {pair[1]}" if len(pair) == 2 else "" for pair in (layer.dense_channels, layer.slim_channels)
    )
    if not dense or not slim:
        return dense or slim
    return dense if dense == slim else f"{dense}, now {slim}"


@dataclass(frozen=True)
class Hot:
    """The layers with the most remaining time, or the most MACs if no layer has a time.

    The `number` of a layer is its position in the table of all layers.
    """

    unit: str
    layers: list[dict[str, str]]
    remark: str


def hottest(manifest: Manifest, most: int = 8) -> Hot | None:
    """Return the `most` layers that dominate the slim network."""
    by_time = timed(manifest)
    unit, shown = ("ms", milliseconds) if by_time else ("MACs", count)
    known = [
        (place, layer, dense, slim)
        for place, layer in enumerate(manifest.layers, start=1)
        for dense, slim in [
            (layer.dense_ms, layer.slim_ms) if by_time else (layer.dense_macs, layer.slim_macs)
        ]
        if slim is not None
    ]
    total = float(sum(slim for *_, slim in known))
    if total <= 0:
        return None
    known.sort(key=lambda entry: (-entry[3], entry[0]))
    found = [
        {
            "number": str(place),
            "name": layer.name or "unnamed",
            "kind": layer.kind,
            "channels": channels(layer),
            "dense": shown(dense),
            "slim": shown(slim),
            "share": percent(slim / total),
        }
        for place, layer, dense, slim in known[:most]
    ]
    untimed = "No layer has a time in this run, so they are ordered by MACs."
    return Hot(unit, found, _outside(manifest, total) if by_time else untimed)


def _outside(manifest: Manifest, total: float) -> str:
    predicted = manifest.latency.predicted_ms
    if manifest.explanation is not None:
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
    for layer in manifest.layers:
        work, time = ratio(layer.slim_macs, layer.dense_macs), ratio(layer.slim_ms, layer.dense_ms)
        if work is None or time is None or 1 - work < STUBBORN_MACS:
            continue
        if 1 - time < STUBBORN_SHARE * (1 - work):
            line = f"{layer.name or 'unnamed'}: MACs {_change(work)}, time {_change(time)}"
            found.append((-(layer.slim_ms or 0.0), line))
    return [line for _, line in sorted(found)]


def _change(share: float) -> str:
    change = percent(share - 1)
    return f"+{change}" if share > 1 else change


def sources(manifest: Manifest) -> dict[str, Any]:
    """Return the best candidate of each source within the budgets, and compare the chosen one with uniform pruning."""
    candidates = plots.scored_candidates(manifest)
    name = plots.scatter_cost(manifest, candidates, ())
    unit, _ = plots.cost_unit(manifest, name)
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.source or "not recorded", []).append(candidate)
    kept = {
        source: [row for row in of if plots.within_budgets(manifest, row)] for source, of in groups.items()
    }
    best = {source: max(kept[source] or members, key=_reward) for source, members in groups.items()}
    order = sorted(best, key=lambda source: (not kept[source], -_reward(best[source]), source))
    pick = plots.chosen(manifest)
    return {
        "source_cost": NAMES.get(name, name),
        "sources": [
            {
                "source": source,
                "meaning": meaning(source),
                "count": len(groups[source]),
                "reward": significant(_reward(best[source]), 4),
                "cost": cost(plots.price(manifest, best[source], name), unit)
                + ("" if kept[source] else ", over a budget"),
                "chosen": any(row is pick for row in groups[source]),
            }
            for source in order
        ],
        "uniform": _against_uniform(manifest, candidates, pick),
        "finalists": _finalists(manifest),
    }


def _finalists(manifest: Manifest) -> str:
    """Say what became of the best candidates when they were built as they would be delivered; "" if they were not."""
    found = manifest.search.finalists if manifest.search is not None else []
    scores = [float(each.score or 0) for each in found]
    place = next((place for place, each in enumerate(found, 1) if each.chosen), None)
    if not found or place is None:
        return ""
    return (
        f"The best {len(found)} candidates were scored again, compensated as thoroughly as the delivered network: from "
        f"{significant(min(scores), 4)} to {significant(max(scores), 4)}. The best of these is delivered; among the "
        f"candidates it was {'the best, too' if place == 1 else f'number {place}'}."
    )


def _against_uniform(manifest: Manifest, candidates: Sequence[Candidate], pick: Candidate | None) -> str:
    """Compare the chosen candidate with uniform pruning within the same budgets, if scored on the same weights."""
    if pick is None or manifest.search is None or manifest.search.agent == UNIFORM:
        return ""
    if pick.source == UNIFORM:
        return "The chosen network is uniform pruning: the search found nothing better."
    rivals = [row for row in candidates if row.source == UNIFORM and row.epoch == pick.epoch]
    if not rivals:
        return ""
    whole = [row for row in rivals if not row.given_up]
    if not whole:
        return "Uniform pruning within the same budgets was dropped: it could no longer reach the best."
    ours, theirs = _reward(pick), max(map(_reward, whole))
    relation = "more than" if ours > theirs else "less than" if ours < theirs else "the same as"
    return (
        f"The chosen network has reward {significant(ours, 4)}, {relation} the {significant(theirs, 4)} of uniform "
        "pruning within the same budgets and on the same weights."
    )


def _reward(candidate: Candidate) -> float:
    return float(candidate.reward or 0)


def method(manifest: Manifest) -> dict[str, Any] | None:
    """Compare the search with its method's publication; None if there is none or none is recorded."""
    found = manifest.search.method if manifest.search is not None else None
    if found is None or not found.parts:
        return None
    same, other = ([part for part in found.parts if part.same is wanted] for wanted in (True, False))
    named = [(part.part or "unnamed") + (f" ({part.effect})" if part.effect else "") for part in same]
    return {
        "source": found.source or "its publication",
        "same": f"As published: {'; '.join(named)}." if named else "",
        "other": [
            {
                "part": part.part or "unnamed",
                "here": part.here or ABSENT,
                "published": part.published or ABSENT,
                "by": f"{part.by or ABSENT} of {part.setting}" if part.setting else "the toolkit",
                "why": part.effect or part.why or ABSENT,
            }
            for part in other
        ],
    }


def skipped(manifest: Manifest) -> list[dict[str, str]]:
    return [
        {"name": row.name or "unnamed", "reason": row.reason or "reason not recorded"} for row in manifest.skipped
    ]


def engines(manifest: Manifest) -> list[dict[str, str]]:
    return [
        {
            "file": row.file or ABSENT,
            "builder": row.builder or ABSENT,
            "precision": row.precision or ABSENT,
            "compute_capability": row.compute_capability or ABSENT,
            "bytes": size(row.bytes),
        }
        for row in manifest.engines
    ]


def exports(manifest: Manifest) -> list[dict[str, str]]:
    """Return the files that were exported beside the run's own."""
    metric = manifest.accuracy.by
    return [
        {
            "file": row.file or key,
            "accuracy": score(row.accuracy, metric),
            "agreement": percent(row.parity.top1_agreement) if row.parity is not None else ABSENT,
            "floats": str(len(row.kept_float) or len(row.kept_fp32) or ABSENT),
            "bytes": size(row.bytes),
        }
        for key, row in manifest.exports.items()
    ]


def mixed(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the files of mixed precision: the plans that were measured, and the precision of each layer."""
    metric = manifest.accuracy.by
    return [
        {
            "file": row.file or key,
            "rule": row.rule,
            "floats": (row.rest or "fp32").upper(),
            "where": row.timed_on or "this machine's CPU",
            "plans": [
                {
                    "int8": str(plan.int8),
                    "predicted": percent(plan.predicted_ratio),
                    "share": share(plan),
                    "noise": percent(plan.noise, 2),
                    "score": score(plan.score, metric),
                    "chosen": plan.chosen,
                }
                for plan in row.plans
            ],
            "layers": [
                {
                    "name": layer.name or "unnamed",
                    "precision": layer.precision or ABSENT,
                    "noise": percent(layer.noise, 3),
                    "floats": milliseconds(layer.float_ms),
                    "int8": milliseconds(layer.int8_ms),
                }
                for layer in row.layers
            ],
        }
        for key, row in manifest.exports.items()
        if row.plans
    ]


def stages(manifest: Manifest) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "started": _clock(stage.started or ABSENT),
            "finished": _clock(stage.finished or "not finished"),
            "seconds": duration(stage.seconds),
        }
        for name, stage in manifest.stages.items()
        if name not in AFTERWARDS
    ]


def _clock(stamp: str) -> str:
    """Format a UTC time of the manifest (ISO 8601) for people; anything else stays as it is."""
    head, mark, tail = stamp.partition("+00:00")
    return f"{head.replace('T', ' ', 1)} UTC" if mark and not tail else stamp


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """Return what must be equal to repeat the run, apart from the recipe."""
    single = {name: getattr(manifest, name) for name in ("seed", "agent", "weights", "epochs")}
    known = [*single.items(), *manifest.machine.items(), *manifest.versions.items()]
    return [(name, str(value)) for name, value in known if value not in (None, "")]


def files(manifest: Manifest, sizes: Mapping[str, int]) -> list[dict[str, str]]:
    """Return the run's files, without the page itself, which cannot contain its own checksum."""
    return [
        {
            "name": name,
            # quoted as a path, so that a name like a scheme ("javascript:") stays a file name
            "link": f"./{quote(name)}" if inside(name) else "",
            "size": size(sizes.get(name)),
            "sha256": manifest.files[name] or ABSENT,
        }
        for name in sorted(manifest.files)
        if name != "report.html"
    ]


def inside(name: str) -> bool:
    """Return whether a file name from the manifest stays within the run's folder."""
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
