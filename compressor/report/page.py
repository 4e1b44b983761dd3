"""The report: one HTML page without scripts or requests, for deciding whether to deploy the network.

Its only source is the run's folder. A run may be unfinished, or from another version: what is missing or invalid is
"not known" on the page, so that no number is printed that was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.answers import Answers, read_answers
from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.manifest import MANIFEST, Episode, Manifest, read_episode
from compressor.core.metrics import PYTHON
from compressor.core.records import EPISODES, RECIPE
from compressor.report import explain, plots, records
from compressor.report.classes import by_class, shown_pictures
from compressor.report.comparison import comparison, tiles
from compressor.report.judgement import budget_lines, judge, measured_to_the_end
from compressor.report.next_steps import next_steps, repeat_command, resume_command
from compressor.report.svg import Chart
from compressor.report.tradeoff import tradeoff
from export.errors import ExportError
from export.files import read_bytes
from export.text import plain

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT = "report.html"
MOST_PICTURES = 8
LARGEST_PICTURE = 60_000
"""Most bytes of a picture that the page embeds."""


@dataclass(frozen=True)
class Collected:
    """Content of a run's files.

    Attributes:
        damaged: Number of lines of the episode log that are not JSON objects.
        sizes: Bytes of the files that exist in the folder.
        folder: Whole path of the run's folder.
        answers: Answers of both networks on the test split.
        pictures: Content of the kept pictures of that split, by their places in it.
    """

    manifest: Manifest
    episodes: tuple[Episode, ...]
    damaged: int
    recipe: str
    sizes: Mapping[str, int]
    folder: Path
    answers: Answers
    pictures: Mapping[int, bytes]


def write_report(run_path: Path) -> Path:
    """Write `report.html` into a run's folder from its files, and return its path.

    The same files give the same bytes. The page of an unfinished run says what is missing.

    Raises:
        CompressorError: The folder has no manifest or a damaged one, or the page cannot be written.
    """
    page = run_path / REPORT
    write_atomic(page, render(collect(run_path)))
    return page


def collect(run: Path) -> Collected:
    """Read a run's manifest, episodes and recipe.

    Raises:
        CompressorError: The folder has no manifest, or it is not a JSON object.
    """
    if not (run / MANIFEST).is_file():
        raise CompressorError(
            f"{run} holds no {MANIFEST}, so there is nothing to report.",
            "Give the folder of a run: compress report RUN",
        )
    manifest = Manifest.read_tolerant(run / MANIFEST)
    episodes, damaged = _read_episodes(run / EPISODES)
    recipe = run / RECIPE
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    inside = (name for name in manifest.files if records.inside(name))
    sizes = {name: (run / name).stat().st_size for name in inside if (run / name).is_file()}
    answers = read_answers(run)
    return Collected(manifest, episodes, damaged, text, sizes, run.resolve(), answers, _read_pictures(run, answers))


def _read_pictures(run: Path, answers: Answers) -> dict[int, bytes]:
    """Return the pictures that the answers name and that are small enough for the page."""
    found = {}
    for picture in answers.pictures[:MOST_PICTURES]:
        if picture.file is not None:
            with suppress(ExportError):
                found[picture.image] = read_bytes(run / picture.file, "picture", LARGEST_PICTURE)
    return found


def _read_episodes(path: Path) -> tuple[tuple[Episode, ...], int]:
    """Return the episodes of a log and the number of unreadable lines.

    A last line without a newline was not finished by a killed run; it counts as neither.
    """
    if not path.is_file():
        return (), 0
    kept: list[Episode] = []
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            kept.append(read_episode(record))
        else:
            damaged += 1
    return tuple(kept), damaged


def render(run: Collected) -> str:
    """Render the page of a run."""
    return rendered("report.html.j2", context(run))


def rendered(template: str, content: Mapping[str, Any]) -> str:
    """Render a page. The template cleans and escapes every text from a run's files; the project's own figures are
    inserted as they are.
    """
    return _templates().get_template(template).render(**content) + "\n"


@cache
def _templates() -> Environment:
    """The templates, each compiled once: that takes longer than to print a page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("compressor.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = lambda chart: Markup(chart.svg)  # the figures escape their own texts
    return environment


def _plain(value: Any) -> Any:
    """Remove control characters and format marks from what the template prints."""
    return type(value)(plain(value, lines=True)) if isinstance(value, str) else value


def context(run: Collected) -> dict[str, Any]:
    """Return everything that the template prints, as strings or small objects of strings."""
    manifest = run.manifest
    comparison_notes = (
        manifest.accuracy.dense_note,
        explain.accuracy_resolution(manifest),
        explain.measurement(manifest),
        explain.prediction_error(manifest),
        "MACs are multiply-adds as fvcore counts them: one multiply-add is one.",
    )
    picture = next((each.file for each in run.answers.pictures if each.image in run.pictures), None)
    unread = f"{run.damaged} lines of the episode log could not be read and are left out."
    return {
        "model": manifest.model.removeprefix(f"{PYTHON}:") or "model not recorded",
        "data": manifest.data or "data not recorded",
        "source": explain.source(manifest),
        "header": explain.header(manifest),
        "from_python": manifest.data == PYTHON,
        "finished": measured_to_the_end(manifest),
        "verdict": judge(manifest),
        "tiles": tiles(manifest),
        "notes": [*manifest.notes, *([unread] if run.damaged else [])],
        "budgets": budget_lines(manifest),
        "comparison": comparison(manifest),
        "comparison_notes": [note for note in comparison_notes if note],
        "front": tradeoff(manifest),
        "classes": by_class(run.answers),
        "deployed": manifest.deployed.file if manifest.deployed is not None else "",
        "pictures": shown_pictures(run.answers, run.pictures),
        "resume": resume_command(run.folder),
        "next": next_steps(manifest, run.folder, picture),
        "repeat": repeat_command(run.folder),
        "rounds": records.rounds(manifest),
        "removal": explain.removal(manifest),
        "groups": records.groups(manifest),
        "skipped": records.skipped(manifest),
        "layer_charts": _charts(plots.layer_bars(manifest, key, f"layers-{key}") for key in ("macs", "ms")),
        "layers": records.layers(manifest),
        "layers_timed": records.timed(manifest),
        "beside_layers": explain.beside_layers(manifest),
        "speed": explain.speed(manifest),
        "hot": records.hottest(manifest),
        "stubborn": records.stubborn(manifest),
        "explained": explain.explained(manifest),
        "batch": "input" if manifest.conditions.batch == 1 else f"batch of {manifest.conditions.batch}",
        "effort": explain.effort(manifest),
        "search_charts": _charts(
            (
                plots.reward_curve(manifest, run.episodes, "reward"),
                plots.candidate_scatter(manifest, run.episodes, "candidates"),
            )
        ),
        **records.sources(manifest),
        "method": records.method(manifest),
        "images": explain.images(manifest),
        "compensation": explain.compensation(manifest),
        "training_charts": _charts(
            plots.training_curve(manifest, key, f"training-{key}") for key in ("loss", "accuracy")
        ),
        "parity": explain.parity(manifest),
        "checks": explain.checks(manifest),
        "engines": records.engines(manifest),
        "exports": records.exports(manifest),
        "mixed": records.mixed(manifest),
        "engine_note": manifest.engine_note or "",
        "stages": records.stages(manifest),
        "facts": records.facts(manifest),
        "recipe": run.recipe,
        "files": records.files(manifest, run.sizes),
    }


def _charts(found: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in found if chart is not None]
