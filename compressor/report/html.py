"""The report: one HTML page without scripts or requests, for deciding whether to deploy the network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compressor.core.files import write_atomic
from compressor.report import explain, plots, records
from compressor.report.collect import REPORT, Collected, collect, section, sentences, text
from compressor.report.comparison import comparison, tiles
from compressor.report.judgement import budget_lines, judge, measured_to_the_end
from compressor.report.layers import hottest, stubborn
from compressor.report.svg import Chart
from export.text import plain


def write_report(run_path: Path) -> Path:
    """Write `report.html` into a run's folder from its files, and return its path.

    The same files give the same bytes. The page of an unfinished run says what is missing.

    Raises:
        CompressorError: The folder has no manifest or a damaged one, or the page cannot be written.
    """
    page = run_path / REPORT
    write_atomic(page, render(collect(run_path)))
    return page


def render(run: Collected) -> str:
    """Render the page. The template cleans and escapes every text from the run's files; the project's own figures are
    inserted as they are.
    """
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
    environment.filters["drawn"] = lambda chart: Markup(
        chart.svg
    )  # the figures escape their own texts
    return environment.get_template("report.html.j2").render(**context(run)) + "\n"


def _plain(value: Any) -> Any:
    """Remove control characters and format marks from what the template prints."""
    return type(value)(plain(value, lines=True)) if isinstance(value, str) else value


def context(run: Collected) -> dict[str, Any]:
    """Return everything that the template prints, as strings or small objects of strings."""
    manifest = run.manifest
    return {
        "model": text(manifest, "model", "model not recorded"),
        "data": text(manifest, "data", "data not recorded"),
        "finished": measured_to_the_end(manifest),
        "verdict": judge(manifest),
        "tiles": tiles(manifest),
        "notes": _notes(run),
        "budgets": budget_lines(manifest),
        "comparison": comparison(manifest),
        "comparison_notes": _present(
            text(section(manifest, "accuracy"), "dense_note"),
            explain.accuracy_resolution(manifest),
            explain.measurement(manifest),
            explain.prediction_error(manifest),
            "MACs are multiply-adds as fvcore counts them: one multiply-add is one.",
        ),
        "rounds": records.rounds(manifest),
        "removal": explain.removal(manifest),
        "groups": records.groups(manifest),
        "skipped": records.skipped(manifest),
        "layer_charts": _charts(plots.layer_bars(manifest, key, f"layers-{key}") for key in ("macs", "ms")),
        "layers": records.layers(manifest),
        "beside_layers": explain.beside_layers(manifest),
        "speed": explain.speed(manifest),
        "hot": hottest(manifest),
        "stubborn": stubborn(manifest),
        "explained": explain.explained(manifest),
        "effort": explain.effort(manifest),
        "search_charts": _charts(
            (
                plots.reward_curve(manifest, run.episodes, "reward"),
                plots.candidate_scatter(manifest, run.episodes, "candidates"),
            )
        ),
        **records.sources(manifest),
        "method": records.method(manifest),
        "images": records.images(manifest),
        "training_charts": _charts(
            plots.training_curve(manifest, key, f"training-{key}") for key in ("loss", "accuracy")
        ),
        "parity": explain.parity(manifest),
        "checks": explain.checks(manifest),
        "engines": records.engines(manifest),
        "engine_note": text(manifest, "engine_note"),
        "stages": records.stages(manifest),
        "facts": records.facts(manifest),
        "recipe": run.recipe,
        "files": records.files(run),
    }


def _present(*lines: str) -> list[str]:
    return [line for line in lines if line]


def _charts(found: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in found if chart is not None]


def _notes(run: Collected) -> list[str]:
    notes = sentences(run.manifest, "notes")
    if run.damaged:
        notes.append(f"{run.damaged} lines of the episode log could not be read and are left out.")
    return notes
