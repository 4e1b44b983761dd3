"""The main command and the table of the others. A command's file parses flags and prints; the work is in `run/`.

No module imports torch before a command needs it, so that `compress --help` responds at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from compressor.cli import completion
from compressor.cli.commands import Commands, LogOption, QuietOption, markup, with_output
from compressor.cli.devices import devices
from compressor.cli.doctor import doctor
from compressor.cli.export import export
from compressor.cli.flags import (
    BatchOption,
    ImageSizeOption,
    JsonOption,
    StreamsOption,
    TaskOption,
    ThreadsOption,
    number_or_text,
    recipe_of,
    with_settings,
)
from compressor.cli.flags import overrides as overrides_of
from compressor.cli.measure import measure
from compressor.cli.predict import predict
from compressor.cli.processes import in_first_process
from compressor.cli.profile import profile
from compressor.cli.recipes import recipes
from compressor.cli.report import report
from compressor.cli.runs import clean, compare, list_runs
from compressor.cli.share import card, push
from compressor.cli.terminal import BAD_INPUT, friendly, out, output_as, show, show_json, written_out
from compressor.core.agents import AGENTS
from compressor.core.errors import CompressorError
from compressor.core.processes import stoppable
from compressor.core.tables import Table

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from compressor.run.result import RunResult


app = typer.Typer(
    name="compress",
    cls=Commands,
    help="Compress a CNN until it meets a device's budget, as measured.\n\n"
    "Example: compress --model resnet50 --latency 50%\n\n"
    "Exit codes: 0 every budget is met as measured; 3 the best plan found misses one; 4 none is missed, but one is "
    "only predicted or undecided; 2 invalid input; 1 an internal error; 130 after Ctrl-C, 143 after SIGTERM: "
    "continue the run with --resume.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=markup(),
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from compressor import __version__

        out.print(f"compressor {__version__}", highlight=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def compress_command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="torchvision name, timm:NAME, cifar_resnet20, FILE.onnx, or module:factory.",
            autocompletion=completion.models,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe: YAML file or shipped name.", autocompletion=completion.recipes),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(help="Latency budget, of one batch: 5ms, 50% or 0.5x; 70%,50%,35% for a network each."),
    ] = None,
    flops: Annotated[str | None, typer.Option(help="Multiply-add budget: 50%, 0.5x or 2G.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameter budget: 30%, 0.3x or 8M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory budget: 50%, 0.5x or 20MB.")] = None,
    energy: Annotated[
        str | None, typer.Option(help="Energy budget of one input, where the device counts it: 5mJ, 50% or 0.5x.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="The other way round: the fastest network that loses at most these points of accuracy."),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="package.module:function<=VALUE; may be repeated.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="local, or a name from: compress devices.", autocompletion=completion.devices),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, int8, mixed or auto.")] = None,
    threads: ThreadsOption = None,
    batch: BatchOption = None,
    percentile: Annotated[
        float | None,
        typer.Option(help="Percentile of single runs that the latency is: 99; by default 50, the median."),
    ] = None,
    streams: StreamsOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, shapes, cifar10[:PATH], cifar100[:PATH], or one of folder, imagenet, images, masks and coco "
            "with :PATH."
        ),
    ] = None,
    task: TaskOption = None,
    image_size: ImageSizeOption = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each channel, as 0.5,0.5,0.5; by default that of the weights.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of each channel, as --mean.")] = None,
    weights: Annotated[str | None, typer.Option(help="default, none, or a file with a state dict.")] = None,
    accept_dense: Annotated[
        bool,
        typer.Option("--accept-dense", help="Continue with a dense network that is no better than guessing."),
    ] = False,
    agent: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(AGENTS)}, or one of an installed package.", autocompletion=completion.agents
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Total number of training epochs, search and fine-tuning together.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="Channel counts are multiples of this; or auto, or measured.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="all, or inner (keeps residual-coupled channels).")] = None,
    importance: Annotated[str | None, typer.Option(help="l1, l2, bn, taylor, fpgm or random.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(help="Processes that score candidates in parallel: a number, or ray://host:port."),
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Send the run's numbers to a tracker, too: mlflow or wandb.")
    ] = None,
    accept_predicted: Annotated[
        bool, typer.Option("--accept-predicted", help="Exit with 0, not 4, if a budget is only predicted.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field: training.batch_size=32.")
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; by default a new one under runs/.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the recipe, the groups and the costs; run nothing.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    log: LogOption = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compress a network until it meets its budgets on the device."""
    context.with_resource(output_as(quiet, log))
    if context.invoked_subcommand is not None:
        return
    overrides = overrides_of(
        {
            "model": model, "device": device, "precision": precision, "threads": threads, "batch": batch,
            "percentile": percentile, "streams": streams,
            "accept_dense": accept_dense or None,
            "data": {"source": data, "mean": mean, "std": std},
            "task": task, "image_size": image_size, "weights": weights, "agent": agent, "epochs": epochs, "seed": seed,
            "track": track,
            "budgets": {
                "latency": latency, "flops": flops, "params": params, "memory": memory,
                "energy": energy, "max_drop": max_drop, "functions": budget or None,
            },
            "pruning": {"granularity": granularity, "scope": scope, "importance": importance},
            "contract": {"accept_predicted": accept_predicted or None},
            "search": {"workers": None if workers is None else number_or_text(workers)},
        }
    )  # fmt: skip
    with friendly():
        overrides = with_settings(overrides, settings or [])
        if resume is not None:
            if dry_run:
                raise CompressorError("--resume continues a run, and --dry-run runs nothing.", "Leave out one of them.")
            _resume(resume, overrides, recipe, out_dir, json)
        if not overrides and recipe is None:
            out.print(context.get_help())
            raise typer.Exit(BAD_INPUT)
        wanted = recipe_of(recipe, overrides)
        if dry_run:
            _dry_run(wanted, json)
            raise typer.Exit
        from compressor.run.pipeline import run_recipe

        _finish(run_recipe(wanted, out_dir), json)


def _resume(folder: Path, overrides: dict[str, Any], recipe: str | None, out_dir: Path | None, json: bool) -> None:
    from compressor.run.pipeline import resume

    if recipe is not None or out_dir is not None:
        raise CompressorError(
            "--resume uses the recipe and the folder of its run.", "Leave out --recipe and --out."
        )
    _finish(resume(folder, overrides), json)


def _dry_run(recipe: Recipe, json: bool) -> None:
    """Print what a recipe would do; as JSON, texts and rows by the names of their parts."""
    from compressor.cli.dry_run import described

    if not json:
        show(part for _, part in described(recipe))
        return
    found: dict[str, Any] = {"lines": []}
    for name, part in described(recipe):
        if name == "lines":
            found["lines"].append(part)
        else:
            found[name] = part.records() if isinstance(part, Table) else part
    show_json(found)


VERDICT_COLOURS = {"kept": "green", "none": "", "missed": "red"}  # any other verdict is amber, as in the report


def _finish_json(result: RunResult) -> NoReturn:
    """Print the result of a run as JSON and end with its exit code."""
    from compressor.report import judge_front, verdict

    manifest = result.manifest
    said = judge_front(manifest).sentence if result.runs else verdict(manifest)
    of_front, of_run = ("targets", "points", "max_drop"), ("budgets", "accuracy", "latency", "cost", "notes")
    known = {name: manifest[name] for name in (of_front if result.runs else of_run) if name in manifest}
    summary = {"directory": str(result.directory), "exit_code": result.exit_code, "verdict": said}
    show_json({**summary, **known})
    raise typer.Exit(result.exit_code)


def _notes(result: RunResult) -> Iterator[str]:
    """Yield the notes of a run; of several runs each once, after the names of those that it is not common to all of."""
    runs = result.runs or (result,)
    places: dict[str, list[str]] = {}
    for each in runs:
        for note in each.manifest.get("notes", []):
            places.setdefault(note, []).append(each.directory.name)
    for note, names in places.items():
        yield note if len(names) == len(runs) else f"{', '.join(names)}: {note}"


def _finish(result: RunResult, json: bool) -> None:
    """Print the result of a run and end with its exit code."""
    from compressor.core.manifest import Manifest
    from compressor.report import checks, closing_front, closing_table, judge, judge_front
    from compressor.run.finish import OPEN, open_words

    manifest = result.manifest
    if json:
        _finish_json(result)
    if result.runs:
        show([closing_front(manifest)])
        judged = judge_front(manifest)
    else:
        show([closing_table(manifest), *checks(manifest)])
        judged = judge(manifest)
    show(f"Note: {note}" for note in _notes(result))
    show([" ".join((judged.sentence, *judged.remarks))], style=VERDICT_COLOURS.get(judged.state, "yellow"))
    if result.exit_code == OPEN and result.chosen is None:
        manifests = [Manifest.tolerant(each.manifest) for each in result.runs or (result,)]
        show([open_words(budget for each in manifests for budget in each.budgets)])
    show([f"All files are in {result.directory} (open report.html)."])
    raise typer.Exit(result.exit_code)


for _command in (profile, export, predict, measure, report, compare, card, push, clean, devices, recipes, doctor):
    app.command()(with_output(_command))
app.command("list")(with_output(list_runs))


def main() -> None:
    """Entry point of the `compress` command."""
    with stoppable(), written_out():
        in_first_process(app)
