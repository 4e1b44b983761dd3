"""The page of several targets: accuracy against latency of their networks, and of those that need no search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.front import FRONT, DropLimit, Front, Kind, Lost, Point, TargetRun
from compressor.core.intervals import known_ends
from compressor.core.manifest import MANIFEST, Manifest
from compressor.core.metrics import PYTHON
from compressor.core.records import RECIPE
from compressor.core.tables import Table
from compressor.report import explain
from compressor.report.comparison import PLAIN
from compressor.report.formats import (
    ABSENT,
    duration,
    milliseconds,
    percent,
    percent_within,
    score,
    score_change,
)
from compressor.report.judgement import State, Verdict
from compressor.report.next_steps import repeat_command, resume_command
from compressor.report.page import REPORT, rendered
from compressor.report.svg import COLOURS, Chart, drawing, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS: Mapping[str, tuple[str, str]] = {
    "dense": ("muted", "s"), "uniform": ("c4", "v"), "knapsack": ("c2", "D"), "ours": ("slim", "o")
}  # fmt: skip
"""Color and marker of each kind of point."""


def write_front(folder: Path) -> Path:
    """Write `report.html` into the folder of several targets from its `front.json`, and return its path."""
    front = Front.read_tolerant(folder / FRONT)
    recipe = folder / RECIPE
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    whole = folder.resolve()
    content = {
        **_context(front, text),
        "header": next((explain.header(each) for each in reversed(_manifests(folder, front))), ""),
        "resume": resume_command(whole),
        "repeat": repeat_command(whole),
    }
    write_atomic(folder / REPORT, rendered("front.html.j2", content))
    return folder / REPORT


def _manifests(folder: Path, front: Front) -> list[Manifest]:
    """Return the manifests of the runs that can be read."""
    found = []
    for target in front.targets:
        with suppress(CompressorError):
            found.append(Manifest.read_tolerant(folder / target.folder / MANIFEST))
    return found


def judge_front(front: Front | Mapping[str, Any]) -> Verdict:
    """Judge all targets together."""
    front = Front.tolerant(front)
    done = [target for target in front.targets if target.status == "finished"]
    if front.status == "finished" and front.max_drop is not None:
        return _judged_drop(front, front.max_drop)
    if front.status != "finished":
        return Verdict("unfinished", f"This run is not finished: {len(done)} targets are.")
    counted = f"{len(done)} networks"
    failed = [target for target in done if target.exit_code]
    doubtful = [target.folder for target in done if target.state == "doubtful" and not target.exit_code]
    doubts = tuple(f"{folder}: a training has failed, as its own page says." for folder in doubtful)
    if not failed:
        return Verdict("doubtful" if doubtful else "kept", f"{counted}: every budget is kept.", doubts)
    remarks = (*(f"{target.folder}: {target.verdict}" for target in failed), *doubts)
    sentence = f"{len(done) - len(failed)} of {counted} keep their budgets as measured."
    return Verdict("missed" if front.exit_code == 3 else "undecided", sentence, remarks)


def _judged_drop(front: Front, limit: DropLimit) -> Verdict:
    """Say which network is the fastest that keeps the limit of lost accuracy, and what the test split says of it."""
    ours = next((point for point in front.points if (point.kind, point.target) == ("ours", limit.chosen)), Point())
    found = next((target.lost for target in front.targets if target.folder == limit.chosen), None) or Lost()
    most = f"{limit.points:g} {'point' if limit.points == 1 else 'points'} of {front.by.name}"
    tried, name = f"of the {limit.steps} networks that were tried", limit.chosen
    if not limit.kept:
        sentence = f"None {tried} loses at most {most} on the search split; {name} {_loses(found.search_drop)}."
        return Verdict("missed", sentence, _on_test(found, limit))
    sentence = (
        f"{name} is the fastest {tried} that loses at most {most} on the search split: it "
        f"{_loses(found.search_drop)} and takes {_share(ours)} of the dense network's time."
    )
    states: Mapping[str | None, State] = {None: "kept", "kept": "kept", "missed": "missed", "undecided": "undecided"}
    return Verdict(states[limit.confirmed], sentence, (*_close(front, limit, ours), *_on_test(found, limit)))


def _close(front: Front, limit: DropLimit, ours: Point) -> tuple[str, ...]:
    """Name the other networks that keep the limit and may be as fast as the chosen one, by their intervals."""
    if ours.ratio is None:
        return ()
    lost = {target.folder: target.lost.search_drop for target in front.targets if target.lost is not None}
    chosen, close = known_ends(*_interval(ours)), []
    for point in front.of("ours"):
        drop, other = lost.get(point.target), known_ends(*_interval(point))
        if point.target == ours.target or point.ratio is None or drop is None or drop > limit.points:
            continue
        if chosen is None or other is None or other[0] <= chosen[1]:
            close.append(point.target)
    return (f"Its time cannot be told apart from that of {', '.join(close)}.",) if close else ()


def _on_test(found: Lost, limit: DropLimit) -> tuple[str, ...]:
    if found.test_drop is None:
        return ()
    noise = "its noise is not known" if found.error is None else f"standard error {_points(found.error)}"
    said = {"kept": "the limit is kept", "missed": "the limit is missed"}.get(
        limit.confirmed or "", "whether the limit is kept cannot be told"
    )
    return (f"On the test split it {_loses(found.test_drop)} ({noise}): {said}.",)


def _loses(points: float | None) -> str:
    return f"gains {-points:.2f}" if points is not None and points <= -0.005 else f"loses {_points(points)}"


def _points(value: float | None) -> str:
    return ABSENT if value is None else f"{value if abs(value) >= 0.005 else 0:.2f}"


def closing_front(front: Front | Mapping[str, Any]) -> Table:
    """Return the delivered networks side by side; print `judge_front(front)` below it."""
    front = Front.tolerant(front)
    numbers = ("latency", "of dense", f"{front.by.name}, test", "against dense")
    table = Table("", *numbers, right=numbers)
    for row in _rows(front, ("dense", "ours")):
        cells = (row["target"] or "dense", row["latency"], row["share"], row["tested"], row["change"])
        table.add(*(cell.translate(PLAIN) for cell in cells))
    return table


def _context(front: Front, recipe: str) -> dict[str, Any]:
    """Return everything that the template prints."""
    charts = (_delivered(front), _scored(front))
    return {
        "model": front.model.removeprefix(f"{PYTHON}:") or "model not recorded",
        "data": front.data or "data not recorded",
        "verdict": judge_front(front),
        "finished": front.status == "finished",
        "from_python": front.data == PYTHON,
        "agent": front.agent,
        "charts": [chart for chart in charts if chart is not None],
        "targets": [_target(target) for target in front.targets],
        "points": list(_rows(front)),
        "metric": front.by.name,
        "searched_by": front.searched_by,
        "notes": [*front.notes, *_notes(front)],
        "effort": _effort(front),
        "recipe": recipe,
    }


def _target(target: TargetRun) -> dict[str, Any]:
    return {
        "folder": target.folder,
        "link": f"{quote(target.folder)}/{REPORT}" if target.status == "finished" else "",
        "limits": "; ".join(f"{name} {text}" for name, text in target.budgets.items()),
        "verdict": target.verdict or ("not finished" if target.status != "finished" else ABSENT),
        "known": str(target.known or 0) if target.continues else ABSENT,
        "evaluations": ABSENT if target.evaluations is None else str(target.evaluations),
        "seconds": duration(sum(target.seconds.values())) if target.seconds else ABSENT,
    }


def _rows(front: Front, kinds: Sequence[Kind] = ("dense", "uniform", "knapsack", "ours")) -> Iterator[dict[str, str]]:
    """Yield the points of these kinds as strings: dense, then those of each target."""
    dense = front.dense()
    order = [target.folder for target in front.targets]
    listed = [point for point in front.points if point.kind in kinds]
    points = sorted(listed, key=lambda point: order.index(point.target) if point.target in order else -1)
    for point in points:
        lost = None
        if dense is not None and point is not dense and None not in (point.tested, dense.tested):
            lost = float(point.tested or 0) - float(dense.tested or 0)
        yield {
            "kind": _named(front, point.kind),
            "target": point.target,
            "latency": milliseconds(point.latency_ms),
            "share": _share(point),
            "searched": percent(point.searched, 2),
            "tested": score(point.tested, front.by),
            "change": ABSENT if lost is None else score_change(lost, front.by),
            "file": "" if point.onnx is None else point.onnx.rpartition("/")[2],
            "link": quote(point.onnx) if point.onnx else "",
        }


def _named(front: Front, kind: str) -> str:
    """Return a kind of point by name; ours by the agent, which may be called like a network that needs no search."""
    return f"delivered ({front.agent})" if kind == "ours" and front.agent else kind


def _share(point: Point) -> str:
    if point.ratio is None:
        return ABSENT if point.predicted_ratio is None else f"{percent(point.predicted_ratio)} predicted"
    return percent_within(point.ratio, (None, None) if point.kind == "dense" else _interval(point))


def _interval(point: Point) -> Sequence[float | None]:
    return point.interval or (None, None)


def _notes(front: Front) -> Iterator[str]:
    yield (
        "Uniform and knapsack networks need no search, and are within the limits of the same target as the latency "
        "table predicts them: measured, they may take a little more, or leave a part unused. They are not trained: "
        "compare them on the search split only."
    )
    if front.dense_ms is not None:
        yield (
            f"A latency is the measured share of the dense network's time, times {milliseconds(front.dense_ms)}, the "
            "shortest time of the dense network in these runs. Each verdict is that of the run's own measurement, in "
            "which the dense network may have taken longer."
        )
    if any(point.kind == "ours" and point.ratio is None for point in front.points):
        yield "Latencies are predictions of the device's table: the device was not measured from here."
    if front.search_images:
        yield (
            f"The search split has {front.search_images:,} images that score a network, the test split "
            f"{'an unknown number' if front.test_images is None else f'{front.test_images:,}'}."
        )


def _effort(front: Front) -> str:
    """Say where the time went."""
    spent: dict[str, float] = {}
    for target in front.targets:
        for name, seconds in target.seconds.items():
            spent[name] = spent.get(name, 0.0) + float(seconds)
    if not spent:
        return ""
    parts = [f"{name} {duration(seconds)}" for name, seconds in sorted(spent.items(), key=lambda each: -each[1])]
    before = duration(front.prepare_seconds)
    return f"Preparation took {before}, the stages of all targets together: {', '.join(parts)}."


def _delivered(front: Front) -> Chart | None:
    """Plot the test score of the dense and the delivered networks against their latency."""
    dense = [point for point in front.of("dense") if point.tested is not None]
    ours = [point for point in front.of("ours") if point.tested is not None and point.share is not None]
    if not ours:
        return None
    scale = 100 if front.share else 1
    with drawing() as (figure, axes):
        for kind, found in (("dense", dense), ("ours", ours)):
            _line(axes, front, kind, found, [scale * float(point.tested or 0) for point in found])
        _label(axes, front, f"{front.by.name}, test split{' (%)' if front.share else ''}")
        figure.legend(loc="outside lower center", ncols=2)
        svg = to_svg(figure, "front-test")
    listed = ", ".join(f"{score(each.tested, front.by)} in {_share(each)} of the dense time" for each in ours)
    caption = "Left is faster, up is better. Each can be deployed."
    return Chart(svg, "As delivered", f"Delivered networks: {listed}.", caption)


def _scored(front: Front) -> Chart | None:
    """Plot the score on the search split before training against the latency, with the networks that need no search."""
    kinds = {
        kind: [point for point in front.of(kind) if point.searched is not None and point.share is not None]
        for kind in ("dense", "uniform", "knapsack", "ours")
    }
    if not kinds["ours"] or not (kinds["uniform"] or kinds["knapsack"]):
        return None
    with drawing() as (figure, axes):
        for kind, found in kinds.items():
            _line(axes, front, kind, found, [100 * float(point.searched or 0) for point in found])
        _label(axes, front, f"{front.searched_by or 'score'}, search split (%)")
        figure.legend(loc="outside lower center", ncols=4)
        svg = to_svg(figure, "front-search")
    alt = "Scores before training: " + "; ".join(
        f"{kind} {', '.join(f'{percent(each.searched)} at {percent(each.share)}' for each in found)}"
        for kind, found in kinds.items()
        if found
    )
    caption = "Before training, on the split that the search reads. Ours were chosen by these scores, the others not."
    return Chart(svg, "What the search brings", f"{alt}.", caption)


def _line(axes: Axes, front: Front, kind: str, points: Sequence[Point], heights: Sequence[float]) -> None:
    """Draw the points of a kind with a line through them; hollow ones have a predicted latency."""
    if not points:
        return
    role, marker = _LOOKS[kind]
    name = _named(front, kind)
    colour, places = COLOURS[role], [_place(front, point) for point in points]
    axes.plot(places, heights, color=colour, linewidth=1.4 if kind == "ours" else 0.8)
    both = list(zip(places, heights, points, strict=True))
    measured = [(x, y) for x, y, point in both if point.ratio is not None]
    predicted = [(x, y) for x, y, point in both if point.ratio is None]
    look: dict[str, Any] = {"linestyle": "none", "color": colour, "marker": marker, "markersize": 5.5}
    if measured:
        axes.plot(*zip(*measured, strict=True), label=name, **look)
    if predicted:
        look["markerfacecolor"] = "none"
        axes.plot(*zip(*predicted, strict=True), label=None if measured else f"{name}, predicted", **look)


def _place(front: Front, point: Point) -> float:
    """Return a point's place on the axis of latency: milliseconds, or per cent of the dense network's time."""
    share = point.share or 0.0
    return 100 * share if front.dense_ms is None else share * front.dense_ms


def _label(axes: Axes, front: Front, height: str) -> None:
    axes.set_xlabel("latency, % of the dense network's" if front.dense_ms is None else "latency (ms)")
    axes.set_ylabel(height)
    axes.grid(axis="x")
    axes.margins(y=0.12, x=0.08)
