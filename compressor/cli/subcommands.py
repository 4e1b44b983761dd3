"""The commands beside the main one: parsing and printing only, with torch imported where it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.export import export
from compressor.cli.flags import overrides, recipe_of
from compressor.cli.terminal import friendly, out, stdout
from compressor.core.errors import CompressorError


def profile(
    model: Annotated[str | None, typer.Option(help="The network, as for compress.")] = None,
    data: Annotated[str, typer.Option(help="Decides the input's size and the number of classes.")] = "digits",
    image_size: Annotated[int | None, typer.Option(help="Height and width of an input in pixels.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime on this machine's CPU.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="ssh://user@host, or with --bundle or --import the name of the device.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or int8, for other devices than this machine; fp16 if left out."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A new folder: what to carry to a device and run there.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--import", help="The folder of a bundle, with the device's results in it.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="How long this machine may be measured, such as 90s or 5min; 75s for its CPU and 10min for a GPU "
            "if left out."
        ),
    ] = None,
) -> None:
    """Measure the latency table that a network needs: on this machine, over ssh, or by a folder carried there."""
    with friendly():
        from compressor.cli import remote_profile
        from compressor.cli.commands import profile as measure_here

        if time_limit is not None and (results or bundle or device not in (None, "local")):
            raise CompressorError(
                "--time-limit is for this machine; a device measures all networks of its bundle.",
                "Leave it out. On the device, run.sh takes --duration SECONDS and --processes N.",
            )
        if results is not None:
            if model is not None or bundle is not None or precision is not None:
                raise CompressorError(
                    "--import takes everything from the folder.",
                    "Leave out --model, --bundle and --precision.",
                )
            lines = remote_profile.import_results(results, device)
        else:
            if model is None:
                raise CompressorError("Which network is to be measured?", "For example: --model resnet50")
            fields = {"model": model, "data": data, "image_size": image_size, "threads": threads}
            recipe = recipe_of(
                None, overrides({**fields, "device": device, "precision": precision}) | {"weights": "none"}
            )
            if bundle is not None:
                if device is None:
                    raise CompressorError(
                        "Which device is the bundle for?",
                        "For example: --device jetson-orin-nano-8gb, or a name of your own",
                    )
                lines = remote_profile.write_bundle(recipe, bundle)
            elif recipe.device.startswith("ssh:"):
                lines = remote_profile.profile_remote(recipe)
            elif recipe.device == "local":
                lines = measure_here(recipe, time_limit)
            else:
                raise CompressorError(
                    f"{device} is not this machine.",
                    "Give ssh://user@host, or write a folder to carry there: --bundle DIR",
                )
        for line in lines:
            out.print(line, highlight=False, markup=False, soft_wrap=True)


def measure(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Say operator by operator why the slim network is not faster.")
    ] = False,
    dense_profile: Annotated[
        Path | None,
        typer.Option(help="With --explain: what trtexec --exportProfile wrote of the dense engine."),
    ] = None,
    slim_profile: Annotated[
        Path | None,
        typer.Option(help="With --explain: what trtexec --exportProfile wrote of the slim engine."),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(help="With --explain: module:factory of the network, where it was not run from here."),
    ] = None,
) -> None:
    """Measure a run's dense and slim networks again on this machine."""
    with friendly():
        from compressor.cli.commands import measure_again
        from compressor.cli.explain import explain_again

        if (dense_profile is None) != (slim_profile is None) or (dense_profile is not None and not explain):
            raise CompressorError(
                "Layer profiles explain two networks together.",
                "Give --explain, --dense-profile FILE and --slim-profile FILE.",
            )
        profiles = (dense_profile, slim_profile) if dense_profile and slim_profile else None
        for line in explain_again(run, profiles, factory) if explain else measure_again(run):
            out.print(
                line, highlight=False, soft_wrap=isinstance(line, str), markup=not isinstance(line, str)
            )


def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html anew from its manifest."""
    with friendly():
        from compressor.core.files import read_json
        from compressor.core.records import MANIFEST
        from compressor.report import verdict, write_report
        from compressor.run.folder import RunDir

        RunDir.tidy(run)
        out.print(f"Wrote {write_report(run)}", highlight=False, soft_wrap=True)
        out.print(verdict(read_json(run / MANIFEST)), highlight=False, soft_wrap=True)


def devices() -> None:
    """List the devices whose latency is known, and how it is known."""
    with friendly():
        from rich.table import Table

        from compressor.latency.devices import devices as known

        table = Table(box=None, header_style="bold")
        for column in ("device", "runtime", "precision", "how known"):
            table.add_column(column, overflow="fold")
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
        from compressor.search.registry import agent_names

        if schema:
            fields = Recipe.model_json_schema()
            fields["properties"]["agent"]["examples"] = agent_names()
            stdout.write(json.dumps(fields, indent=2) + "\n")
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
