"""The secondary commands: parsing and printing only; torch is imported where it is needed."""

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
    data: Annotated[str, typer.Option(help="Determines the input size and the number of classes.")] = "digits",
    image_size: Annotated[int | None, typer.Option(help="Height and width of an input in pixels.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime on this machine's CPU.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="ssh://user@host; with --bundle or --import the device's name.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or int8, for other devices than this machine; by default fp16."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A new folder, to copy to a device and run there.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--import", help="The folder of a bundle, with the device's results in it.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="Time limit for measuring this machine, such as 90s or 5min; by default 75s for its CPU and 10min for "
            "a GPU."
        ),
    ] = None,
) -> None:
    """Measure the latency table of a network: on this machine, over ssh, or with a folder copied to the device."""
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
                raise CompressorError("No network was given.", "For example: --model resnet50")
            fields = {"model": model, "data": data, "image_size": image_size, "threads": threads}
            recipe = recipe_of(
                None, overrides({**fields, "device": device, "precision": precision}) | {"weights": "none"}
            )
            if bundle is not None:
                if device is None:
                    raise CompressorError(
                        "--bundle needs the name of its device.",
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
                    "Give ssh://user@host, or write a folder to copy there: --bundle DIR",
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
        typer.Option(help="With --explain: the dense engine's profile from trtexec --exportProfile."),
    ] = None,
    slim_profile: Annotated[
        Path | None,
        typer.Option(help="With --explain: the slim engine's profile from trtexec --exportProfile."),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(help="With --explain: module:factory of the network, if it was not run from here."),
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
    """Write a run's report.html again from its manifest."""
    with friendly():
        from compressor.core.manifest import MANIFEST, Manifest
        from compressor.report import verdict, write_report
        from compressor.run.folder import RunDir

        RunDir.tidy(run)
        out.print(f"Wrote {write_report(run)}", highlight=False, soft_wrap=True)
        out.print(verdict(Manifest.read_tolerant(run / MANIFEST)), highlight=False, soft_wrap=True)


def devices() -> None:
    """List the devices with known latency, and how it is known."""
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
        bool, typer.Option("--schema", help="Print the JSON schema with which editors check recipes.")
    ] = False,
) -> None:
    """List the recipes that are shipped with the toolkit."""
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
