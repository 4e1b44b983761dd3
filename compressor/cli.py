"""The command line: parsing and printing only.

Nothing here imports torch before a command that needs it runs, so that `compress --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.recipe import Recipe

app = typer.Typer(
    name="compress",
    help="Compress a CNN until it keeps the budget that a device sets, as measured.\n\n"
    "Example: compress --model resnet50 --latency 50%",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

BAD_INPUT = 2  # exit code: something the user can mend


@contextmanager
def _friendly() -> Iterator[None]:
    """Show progress, and end with one clear message and exit code 2 where the user can mend something."""
    from compressor.display import RichDisplay
    from compressor.progress import shown_on
    from export.errors import ExportError

    signal.signal(signal.SIGINT, _first_interrupt)
    try:
        with shown_on(RichDisplay(err)):
            yield
    except (CompressorError, ExportError) as error:
        _fail(error.message, error.hint)
    except KeyboardInterrupt:
        # Nothing is left to stop, and one that came while Python shuts down would spoil the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _fail("Stopped. What was finished is kept.", "Go on with: compress --resume RUN")


def _fail(message: str, hint: str = "") -> None:
    err.print("[bold red]Error:[/]", end=" ")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    if hint:
        err.print(hint, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(BAD_INPUT)


def _first_interrupt(_signal: int, _frame: Any) -> None:
    signal.signal(signal.SIGINT, _second_interrupt)
    raise KeyboardInterrupt


def _second_interrupt(_signal: int, _frame: Any) -> None:
    # Every file appears by rename, so that leaving at once loses nothing that was finished.
    os.write(2, b"\nStopped at once. Go on with: compress --resume RUN\n")
    os._exit(BAD_INPUT)


def _version(wanted: bool) -> None:
    if wanted:
        from compressor import __version__

        out.print(f"compressor {__version__}", highlight=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def compress_command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="torchvision name, timm:NAME, cifar_resnet20, or module:factory.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe: YAML file or shipped name.")] = None,
    latency: Annotated[str | None, typer.Option(help="Latency budget: 5ms, 50% or 0.5x.")] = None,
    flops: Annotated[str | None, typer.Option(help="Multiply-add budget: 50%, 0.5x or 2G.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameter budget: 30%, 0.3x or 8M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory budget: 50%, 0.5x or 20MB.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="package.module:function<=VALUE; may be repeated.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="local, or a name from: compress devices.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, int8 or auto.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime on this machine's CPU.")] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10[:PATH], cifar100[:PATH], folder:PATH, imagenet:PATH.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of an input in pixels.")] = None,
    weights: Annotated[str | None, typer.Option(help="default, none, or a file with a state dict.")] = None,
    agent: Annotated[
        str | None, typer.Option(help="joint, stepwise, knapsack, uniform or random.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="All the training there is, search and fine-tuning together.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="Channel counts are multiples of this; or auto.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="all, or inner (residual-coupled channels stay).")] = None,
    importance: Annotated[str | None, typer.Option(help="l1, l2, bn, taylor, fpgm or random.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field: training.batch_size=32.")
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The run's folder; a new one under runs/ if left out.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the recipe, the groups and the costs; run nothing.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compress a network until it keeps its budgets on the device."""
    if context.invoked_subcommand is not None:
        return
    overrides = _overrides(
        {
            "model": model, "device": device, "precision": precision, "threads": threads, "data": data,
            "image_size": image_size, "weights": weights, "agent": agent, "epochs": epochs, "seed": seed,
            "budgets": {
                "latency": latency, "flops": flops, "params": params, "memory": memory,
                "functions": budget or None,
            },
            "pruning": {"granularity": granularity, "scope": scope, "importance": importance},
        }
    )  # fmt: skip
    with _friendly():
        overrides = _with_settings(overrides, settings or [])
        if resume is not None:
            _resume(resume, overrides, recipe, out_dir)
        if not overrides and recipe is None:
            out.print(context.get_help())
            raise typer.Exit(BAD_INPUT)
        wanted = _recipe(recipe, overrides)
        if dry_run:
            from compressor.commands import describe

            for part in describe(wanted):
                out.print(part, highlight=False, soft_wrap=isinstance(part, str))
            raise typer.Exit
        _run(wanted, out_dir)


def _resume(folder: Path, overrides: dict[str, Any], recipe: str | None, out_dir: Path | None) -> None:
    from compressor.pipeline import resume

    if recipe is not None or out_dir is not None:
        raise CompressorError(
            "--resume goes on with the recipe and the folder of its run.", "Leave out --recipe and --out."
        )
    _finish(resume(folder, overrides))


def _run(recipe: Recipe, out_dir: Path | None) -> None:
    from compressor.pipeline import compress

    _finish(compress(recipe, out=out_dir))


def _finish(result: Any) -> None:
    from compressor.report import closing_table, verdict

    out.print(closing_table(result.manifest))
    for note in result.manifest.get("notes", []):
        out.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)
    out.print(verdict(result.manifest), highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"Everything lies in {result.directory} (open report.html).",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    raise typer.Exit(result.exit_code)


def _overrides(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, nested as in the recipe."""
    given: dict[str, Any] = {}
    for name, value in flags.items():
        inside = _overrides(value) if isinstance(value, dict) else value
        if inside is not None and inside != {}:
            given[name] = inside
    granularity = given.get("pruning", {}).get("granularity")
    if isinstance(granularity, str) and granularity.isdigit():
        given["pruning"]["granularity"] = int(granularity)
    return given


def _with_settings(overrides: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Add `--set part.field=value`, whose value is read as YAML."""
    import yaml

    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip("."):
            raise CompressorError(
                f"--set {setting}: expected FIELD=VALUE.", "For example: --set training.batch_size=32"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise CompressorError(f"--set {setting}: the value is no YAML.", "Quote it.") from None
        *parts, last = path.split(".")
        place = overrides
        for part in parts:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise CompressorError(f"--set {setting}: {part!r} is not a part of the recipe.")
        place[last] = value
    return overrides


def _recipe(name: str | None, overrides: dict[str, Any]) -> Recipe:
    from compressor.recipe import find_recipe, load_recipe, parse_recipe

    if name is None:
        return parse_recipe(overrides, "The command line")
    return load_recipe(find_recipe(name)).changed(overrides, "The command line")


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="The network, as for compress.")],
    data: Annotated[str, typer.Option(help="Decides the input's size and the number of classes.")] = "digits",
    image_size: Annotated[int | None, typer.Option(help="Height and width of an input in pixels.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
) -> None:
    """Measure the latency table that a network needs on this machine."""
    with _friendly():
        from compressor.commands import profile as measure_table

        fields = _overrides({"model": model, "data": data, "image_size": image_size, "threads": threads})
        for line in measure_table(_recipe(None, fields | {"weights": "none"})):
            out.print(line, highlight=False, soft_wrap=True)


@app.command()
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
    with _friendly():
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


@app.command()
def measure(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
) -> None:
    """Measure a run's dense and slim networks again on this machine."""
    with _friendly():
        from compressor.commands import measure_again

        for line in measure_again(run):
            out.print(line, highlight=False, soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html anew from its manifest."""
    with _friendly():
        from compressor.report.html import write_report

        out.print(f"Wrote {write_report(run)}", highlight=False, soft_wrap=True)


@app.command()
def devices() -> None:
    """List the devices whose latency is known, and how it is known."""
    with _friendly():
        from rich.table import Table

        from compressor.latency.devices import devices as known

        table = Table("device", "runtime", "precision", "how known", box=None, header_style="bold")
        for entry in known():
            table.add_row(entry.name, entry.runtime, ", ".join(entry.precisions), entry.how)
        out.print(table)


@app.command()
def recipes(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema that editors check recipes with.")
    ] = False,
) -> None:
    """List the recipes that come with the toolkit."""
    with _friendly():
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


def main() -> None:
    """Entry point of the `compress` command."""
    try:
        app()
    except BrokenPipeError:
        # The reader of our output (head, less) went away; that is its right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
