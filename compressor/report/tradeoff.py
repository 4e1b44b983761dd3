"""Score against latency of one run: the dense and the delivered network, and what the search considered.

The two networks are placed by the test split and the measured latency, the candidates by the search split and the
predicted one, before fine-tuning. Legend and table say so, because only like may be compared with like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressor.core.manifest import Manifest
from compressor.core.metrics import AGREEMENT
from compressor.report.formats import ABSENT, milliseconds, score
from compressor.report.plots import chosen, price, scored_candidates, within_budgets
from compressor.report.records import UNIFORM
from compressor.report.svg import COLOURS, Chart, drawing, to_svg

MOST = 40
"""Candidates that are drawn: those with the best scores."""

SEARCHED = "search split, predicted"


@dataclass(frozen=True)
class Place:
    """A network: its latency in milliseconds, its score, and what both are known from."""

    time: float
    value: float
    known: str


def tradeoff(manifest: Manifest) -> dict[str, Any] | None:
    """Return the figure and the table; None without the latency and the score of the dense and the delivered one."""
    networks = _networks(manifest)
    if networks is None:
        return None
    uniform, others = _candidates(manifest)
    metric = manifest.accuracy.by
    listed = [*networks.items(), *([("uniform", uniform)] if uniform else [])]
    listed += [("best tried", others[0])] if others else []
    rows = [
        {"network": name, "latency": milliseconds(at.time), "score": score(at.value, metric), "known": at.known}
        for name, at in listed
    ]
    if uniform is None and any(row.source == UNIFORM and row.given_up for row in scored_candidates(manifest)):
        known = "dropped early: it could no longer reach the best"
        rows.append({"network": "uniform", "latency": ABSENT, "score": ABSENT, "known": known})
    return {
        "title": f"{metric.title} against latency",
        "metric": metric.title,
        "chart": _chart(manifest, networks, uniform, others),
        "rows": rows,
    }


def _networks(manifest: Manifest) -> dict[str, Place] | None:
    """Return the dense and the delivered network."""
    latency, accuracy = manifest.latency, manifest.accuracy
    how, times = "measured", (latency.dense_ms, latency.measured_ms)
    if None in times:
        how, times = "predicted", (latency.predicted_dense_ms, latency.predicted_ms)
    scores = (accuracy.dense, manifest.deployed_score)
    if None in times or None in scores:
        return None
    return {
        name: Place(float(time or 0), float(value or 0), f"{accuracy.split or 'test'} split, {how}")
        for name, time, value in zip(("dense", "delivered"), times, scores, strict=True)
    }


def _candidates(manifest: Manifest) -> tuple[Place | None, list[Place]]:
    """Return uniform pruning, and the other candidates within the budgets, the best first.

    They were scored on the weights as the search ended, and by the metric of the run.
    """
    pick, search = chosen(manifest), manifest.recipe.get("search")
    if manifest.accuracy.metric == AGREEMENT or not isinstance(search, dict) or search.get("measure") != "accuracy":
        return None, []
    uniform, others = None, set()
    for row in scored_candidates(manifest):
        time = price(manifest, row, "latency")
        if time is None or row.accuracy is None or row.given_up or not within_budgets(manifest, row):
            continue
        if pick is not None and row.epoch != pick.epoch:
            continue
        place = Place(time, float(row.accuracy), SEARCHED)
        if row.source == UNIFORM:
            uniform = place
        else:
            others.add(place)
    return uniform, sorted(others, key=lambda place: (-place.value, place.time))[:MOST]


def _chart(manifest: Manifest, networks: dict[str, Place], uniform: Place | None, others: list[Place]) -> Chart:
    metric = manifest.accuracy.by
    scale = 100.0 if metric.share else 1.0
    with drawing() as (figure, axes):
        for (name, at), role, marker in zip(networks.items(), ("muted", "accent"), ("s", "o"), strict=True):
            look: dict[str, Any] = {"linestyle": "none", "marker": marker, "markersize": 7, "color": COLOURS[role]}
            axes.plot(at.time, scale * at.value, label=f"{name}: {at.known}", **look)
        for name, role, marker, size, places in (
            ("candidates", "slim", "o", 3.5, others), ("uniform", "c4", "v", 6, [uniform] if uniform else []),
        ):  # fmt: skip
            look = {"linestyle": "none", "marker": marker, "markersize": size, "markeredgecolor": COLOURS[role]}
            if places:
                values = [scale * at.value for at in places]
                axes.plot(
                    [at.time for at in places], values, markerfacecolor="none", label=f"{name}: {SEARCHED}", **look
                )
        axes.set_xlabel("latency (ms)")
        axes.set_ylabel(f"{metric.name}{' (%)' if metric.share else ''}")
        axes.set_xlim(0, 1.06 * max(at.time for at in (*networks.values(), *others)) or None)
        axes.grid(axis="x")
        axes.margins(y=0.12)
        figure.legend(loc="outside lower center", ncols=2 if others or uniform else 1)
        svg = to_svg(figure, "tradeoff")
    alt = "; ".join(
        f"{name} network {score(at.value, metric)} in {milliseconds(at.time)}" for name, at in networks.items()
    )
    caption = "Left is faster, up is better."
    if uniform or others:
        caption += (
            " Hollow marks are candidates of the search, before fine-tuning: compare them with each other only."
        )
    return Chart(svg, "Networks of this run", f"{alt}.", caption)
