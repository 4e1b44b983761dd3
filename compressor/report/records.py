"""The tables of the report: the manifest's records as rows of strings, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from compressor.report import plots
from compressor.report.collect import REPORT, Collected, Manifest, inside, rows, section, text
from compressor.report.formats import (
    ABSENT,
    cost,
    count,
    duration,
    milliseconds,
    number,
    percent,
    ratio,
    significant,
    size,
)
from compressor.report.judgement import AFTERWARDS, NAMES, margin, verdict_of
from compressor.report.layers import channels

UNIFORM = "uniform"

Record = Mapping[str, Any]


def _share(row: Mapping[str, Any]) -> str:
    """Format the slim network's time over the dense one's with its 95 % interval, if both were timed in turns."""
    interval = row.get("interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    if number(low) is None or number(high) is None:
        return percent(row.get("ratio"))
    return f"{percent(row.get('ratio'))} ({percent(low)} to {percent(high)})"


def rounds(manifest: Manifest) -> list[dict[str, Any]]:
    found = []
    for place, row in enumerate(rows(manifest, "rounds"), start=1):
        measured, target = number(row.get("measured_ms")), number(row.get("target_ms"))
        found.append(
            {
                "round": f"Round {place}",
                "share": _share(row),
                "predicted": milliseconds(row.get("predicted_ms")),
                "measured": milliseconds(measured),
                "target": milliseconds(target),
                "margin": margin(measured, target),
                "verdict": verdict_of({**row, "measured": measured, "target": target}),
            }
        )
    return found


def groups(manifest: Manifest) -> list[dict[str, Any]]:
    found = []
    for group in rows(manifest, "groups"):
        width, kept = number(group.get("width")), number(group.get("kept"))
        share = ratio(kept, width)
        found.append(
            {
                "name": text(group, "name", "unnamed"),
                "coupled": group.get("coupled") is True,
                "kept": ABSENT if kept is None else f"{kept:.0f}",
                "width": ABSENT if width is None else f"{width:.0f}",
                "share": percent(share, 0),
                "bar": None if share is None else f"{min(max(share, 0.0), 1.0) * 100:.2f}",
            }
        )
    return found


def layers(manifest: Manifest) -> list[dict[str, str]]:
    return [
        {
            "number": str(place),
            "name": text(layer, "name", "unnamed"),
            "kind": text(layer, "kind"),
            "channels": channels(layer),
            "dense_macs": count(layer.get("dense_macs")),
            "slim_macs": count(layer.get("slim_macs")),
            "macs_share": percent(ratio(layer.get("slim_macs"), layer.get("dense_macs")), 0),
            "dense_ms": milliseconds(layer.get("dense_ms")),
            "slim_ms": milliseconds(layer.get("slim_ms")),
            "ms_share": percent(ratio(layer.get("slim_ms"), layer.get("dense_ms")), 0),
        }
        for place, layer in enumerate(rows(manifest, "layers"), start=1)
    ]


def sources(manifest: Manifest) -> dict[str, Any]:
    """Return the best candidate of each source within the budgets, and compare the chosen one with uniform pruning."""
    candidates = [
        row
        for row in rows(section(manifest, "search"), "candidates")
        if number(row.get("reward")) is not None
    ]
    name = plots.scatter_cost(manifest, candidates, ())
    unit, _ = plots.cost_unit(manifest, name)
    groups: dict[str, list[Record]] = {}
    for candidate in candidates:
        groups.setdefault(text(candidate, "source", "not recorded"), []).append(candidate)
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
                "count": len(groups[source]),
                "reward": significant(_reward(best[source]), 4),
                "cost": cost(section(best[source], "costs").get(name), unit)
                + ("" if kept[source] else ", over a budget"),
                "chosen": pick is not None and any(row is pick for row in groups[source]),
            }
            for source in order
        ],
        "uniform": _against_uniform(manifest, candidates, pick),
    }


def method(manifest: Manifest) -> dict[str, Any] | None:
    """Compare the search with its method's publication; None if there is none or none is recorded."""
    found = section(section(manifest, "search"), "method")
    parts = rows(found, "parts")
    if not parts:
        return None
    same = [part for part in parts if part.get("same") is True]
    other = [part for part in parts if part.get("same") is not True]
    named = [
        text(part, "part", "unnamed") + (f" ({effect})" if (effect := text(part, "effect")) else "")
        for part in same
    ]
    return {
        "source": text(found, "source", "its publication"),
        "same": f"As published: {'; '.join(named)}." if named else "",
        "other": [
            {
                "part": text(part, "part", "unnamed"),
                "here": text(part, "here", ABSENT),
                "published": text(part, "published", ABSENT),
                "by": f"{text(part, 'by', ABSENT)} of {setting}"
                if (setting := text(part, "setting"))
                else "the toolkit",
                "why": text(part, "effect") or text(part, "why") or ABSENT,
            }
            for part in other
        ],
    }


def _against_uniform(manifest: Manifest, candidates: Sequence[Record], pick: Record | None) -> str:
    """Compare the chosen candidate with uniform pruning within the same budgets, if scored on the same weights."""
    if pick is None or text(section(manifest, "search"), "agent") == UNIFORM:
        return ""
    if text(pick, "source") == UNIFORM:
        return "The chosen network is uniform pruning: the search found nothing better."
    rivals = [
        row for row in candidates if text(row, "source") == UNIFORM and row.get("epoch") == pick.get("epoch")
    ]
    if not rivals:
        return ""
    whole = [row for row in rivals if row.get("given_up") is not True]
    if not whole:
        return "Uniform pruning within the same budgets was dropped: it could no longer reach the best."
    ours, theirs = _reward(pick), max(map(_reward, whole))
    relation = "more than" if ours > theirs else "less than" if ours < theirs else "the same as"
    return (
        f"The chosen network has reward {significant(ours, 4)}, {relation} the {significant(theirs, 4)} of uniform "
        "pruning within the same budgets and on the same weights."
    )


def _reward(candidate: Record) -> float:
    return float(candidate["reward"])


def skipped(manifest: Manifest) -> list[dict[str, str]]:
    return [
        {"name": text(row, "name", "unnamed"), "reason": text(row, "reason", "reason not recorded")}
        for row in rows(manifest, "skipped")
    ]


def engines(manifest: Manifest) -> list[dict[str, str]]:
    keys = ("file", "builder", "precision", "compute_capability")
    return [
        {key: text(row, key, ABSENT) for key in keys} | {"bytes": size(row.get("bytes"))}
        for row in rows(manifest, "engines")
    ]


def stages(manifest: Manifest) -> list[dict[str, str]]:
    found = section(manifest, "stages")
    return [
        {
            "name": name,
            "started": _clock(text(section(found, name), "started", ABSENT)),
            "finished": _clock(text(section(found, name), "finished", "not finished")),
            "seconds": duration(section(found, name).get("seconds")),
        }
        for name in found
        if name not in AFTERWARDS
    ]


def _clock(stamp: str) -> str:
    """Format a UTC time of the manifest (ISO 8601) for people; anything else stays as it is."""
    head, mark, tail = stamp.partition("+00:00")
    return f"{head.replace('T', ' ', 1)} UTC" if mark and not tail else stamp


def images(manifest: Manifest) -> str:
    """Describe how images become the network's input, and the origin of that; empty if not recorded."""
    from compressor.data.preprocessing import Preprocessing

    found = section(manifest, "preprocessing")
    try:
        described = Preprocessing.from_dict(
            {name: value for name, value in found.items() if name != "origin"}
        ).describe()
    except (KeyError, TypeError, ValueError):  # a run of an earlier version, or a damaged manifest
        return ""
    origin = text(found, "origin")
    return f"Images are {described}" + (f" ({origin})." if origin else ".")


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """Return what must be equal to repeat the run, apart from the recipe."""
    single = [(key, text(manifest, key)) for key in ("seed", "agent", "weights", "epochs")]
    lists = [
        (key, text(section(manifest, name), key))
        for name in ("machine", "versions")
        for key in section(manifest, name)
    ]
    return [(key, value) for key, value in (*single, *lists) if value]


def files(run: Collected) -> list[dict[str, str]]:
    """Return the run's files, without the page itself, which cannot contain its own checksum."""
    files = section(run.manifest, "files")
    return [
        {
            "name": name,
            # quoted as a path, so that a name like a scheme ("javascript:") stays a file name
            "link": f"./{quote(name)}" if inside(name) else "",
            "size": size(run.sizes.get(name)),
            "sha256": text(files, name, ABSENT),
        }
        for name in sorted(files)
        if name != REPORT
    ]
