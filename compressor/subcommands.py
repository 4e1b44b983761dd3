"""The commands beside the main one: parsing and printing only, with torch imported where it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.errors import CompressorError
from compressor.flags import overrides, recipe_of
from compressor.terminal import friendly, out


def profile(
    model: Annotated[str, typer.Option(help="The network, as for compress.")],
    data: Annotated[str, typer.Option(help="Decides the input's size and the number of classes.")] = "digits",
    image_size: Annotated[int | None, typer.Option(help="Height and width of an input in pixels.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
) -> None:
    """Measure the latency table that a network needs on this machine."""
    with friendly():
        from compressor.commands import profile as measure_table

        fields = overrides({"model": model, "data": data, "image_size": image_size, "threads": threads})
        for line in measure_table(recipe_of(None, fields | {"weights": "none"})):
            out.print(line, highlight=False, soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    precision: Annotated[str | None, typer.Option(help="Write the network in fp16 or int8 as well.")] = None,
    max_drop: Annotated[float, typer.Option(help="Points of accuracy that int8 may lose.")] = 1.0,
    target: Annotated[
        str | None,
        typer.Option(help="A board such as jetson-orin-nano-8gb, or ssh://user@host to run it there."),
    ] = None,
    board: Annotated[str, typer.Option(help="Which board it is that ssh reaches.")] = "jetson-orin-nano-8gb",
    bundle: Annotated[Path | None, typer.Option(help="NAME.tar.gz: everything that the board needs.")] = None,
    results: Annotated[Path | None, typer.Option("--import", help="Take in what a board sent back.")] = None,
) -> None:
    """Write a run's network in other precisions, bundle it for a board, or take in what the board measured."""
    with friendly():
        from compressor import reexport

        if results is not None and bundle is not None:
            lines = reexport.import_results(run, results, bundle)
        elif target is not None and bundle is not None:
            if target.startswith("ssh://"):
                lines = reexport.export_over_ssh(run, target, board, bundle)
            else:
                lines = reexport.export_bundle(run, target, bundle)
        elif precision is not None and target is None and results is None:
            lines = reexport.export_precision(run, precision, max_drop)
        else:
            raise CompressorError(
                "It is not clear what to export.",
                "Give --precision fp16 or int8; --target BOARD --bundle FILE; or --bundle FILE --import RESULTS.",
            )
        for line in lines:
            out.print(line, highlight=False, markup=False, soft_wrap=True)


def measure(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
) -> None:
    """Measure a run's dense and slim networks again on this machine."""
    with friendly():
        from compressor.commands import measure_again

        for line in measure_again(run):
            out.print(line, highlight=False, soft_wrap=True)


def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html anew from its manifest."""
    with friendly():
        from compressor.report.html import write_report

        out.print(f"Wrote {write_report(run)}", highlight=False, soft_wrap=True)


def devices() -> None:
    """List the devices whose latency is known, and how it is known."""
    with friendly():
        from rich.table import Table

        from compressor.latency.devices import devices as known

        table = Table("device", "runtime", "precision", "how known", box=None, header_style="bold")
        for entry in known():
            table.add_row(entry.name, entry.runtime, ", ".join(entry.precisions), entry.how)
        out.print(table)


def recipes(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema that editors check recipes with.")
    ] = False,
) -> None:
    """List the recipes that come with the toolkit."""
    with friendly():
        import json

        from rich.table import Table

        from compressor.recipe import Recipe, load_recipe, shipped_recipes

        if schema:
            print(json.dumps(Recipe.model_json_schema(), indent=2))
            raise typer.Exit
        table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
        for column in ("recipe", "model", "data", "device", "budget", "agent"):
            table.add_column(column, overflow="fold", no_wrap=column == "recipe")
        for name, path in shipped_recipes().items():
            entry = load_recipe(path)
            asked = ", ".join(f"{kind} {text}" for kind, text in entry.budgets.given().items())
            table.add_row(name, entry.model, entry.data_kind, entry.device, asked, entry.agent)
        out.print(table)


COMMANDS = (profile, export, measure, report, devices, recipes)
