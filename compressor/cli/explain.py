"""`compress measure RUN --explain`: show on the terminal, in the manifest and in the report where the time goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import sha256_file
from compressor.core.records import RECIPE
from compressor.recipe import Recipe, load_recipe
from compressor.run.folder import RunDir
from export.device.here import CPU

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.latency.explain import Line
    from compressor.latency.table import LatencyTable
    from compressor.run.layer_times import Pairs

MOST_LINES = 25
"""Maximum number of lines in the terminal's table; the manifest and the report have all."""

MOST_SENTENCES = 8


def explain_again(
    folder: Path, profiles: tuple[Path, Path] | None = None, factory: str | None = None
) -> Iterator[Any]:
    """Profile a run's dense and slim networks, print why the slim one is not faster, and rewrite the report.

    Args:
        folder: Folder of a finished run.
        profiles: Layer profiles of the dense and the slim engine that trtexec wrote on the run's device; by default
            both networks are profiled on this machine.
        factory: Function that builds the run's network if it is the user's own code; see `models.names`.

    Raises:
        CompressorError: The run has exported nothing yet, or a profile does not belong to its networks.
    """
    from compressor.core.manifest import Manifest
    from compressor.report import write_report
    from compressor.report.explain import gap
    from compressor.report.page import REPORT
    from compressor.run.layer_times import explain_run, read_profiles
    from compressor.run.onnx_files import DENSE, MODEL

    with closing(RunDir.open(folder)) as run:
        for name in (DENSE, MODEL):
            if not run.file(name).exists():
                raise CompressorError(
                    f"{folder} has no {name} yet.", f"Finish it first: compress --resume {folder}"
                )
        recipe = load_recipe(run.file(RECIPE)).resolved()
        table = _table(run)
        here = recipe.device == "local" and (table is None or table.fields.runtime.name == CPU)
        predicted, note = _predicted(run, recipe, table, factory) if here or profiles else (None, "")
        if profiles is not None:
            machine, block, size = _device(recipe, table)
            found = read_profiles(*profiles, run, element_bytes=size, block=block)
            where = f"{recipe.device}, TensorRT's layer profile"
            lines = explain_run(
                run, threads=1, predicted=predicted, profiles=found, machine=machine, where=where
            )
        else:
            lines = explain_run(run, threads=recipe.threads, predicted=predicted)
        explanation = run.manifest["explanation"]
        yield from _header(explanation, recipe, here or profiles is not None)
        yield table_of_lines(lines)
        if len(lines) > MOST_LINES:
            yield f"and {len(lines) - MOST_LINES} more lines, in the report."
        yield gap(Manifest.tolerant(run.manifest))
        sentences = [line.sentence for line in lines if line.sentence]
        yield from (f"- {sentence}" for sentence in sentences[:MOST_SENTENCES])
        if table is not None and table.estimated and predicted:
            yield "The predictions are estimated, not measured."
        if note:
            yield note
        page = write_report(run.path)
        run.save(files={**run.manifest.get("files", {}), REPORT: sha256_file(page)})
        yield f"Wrote {page}"


def _header(explanation: dict[str, Any], recipe: Recipe, on_device: bool) -> Iterator[str]:
    yield (
        f"On {explanation['where']}: dense {explanation['dense_ms']:.3f} ms, slim {explanation['slim_ms']:.3f} ms. "
        f"Peaks: {explanation['peaks']}."
    )
    if not on_device:
        whose = "this machine's GPU" if recipe.device == "local" else recipe.device
        yield f"The run is for {whose}; these times are from this machine's CPU."
        if recipe.device != "local":
            yield (
                "For the device's own times, profile both engines there (trtexec --exportProfile) and add "
                "--dense-profile FILE --slim-profile FILE."
            )


def table_of_lines(lines: Sequence[Line]) -> Table:
    """Return the terminal's table, the largest possible gains first."""
    from rich.table import Table

    from compressor.report.formats import ABSENT, count, percent, significant

    known = any(line.predicted_slim_ms is not None for line in lines)
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("operator", overflow="fold")
    right = [
        "MACs",
        "of dense",
        "dense ms",
        "slim ms",
        *(["predicted"] if known else []),
        "share",
        "bound by",
    ]
    for name in (*right, "of peak", "padding", "gap ms"):
        table.add_column(name, justify="left" if name == "bound by" else "right")
    total = sum(line.slim_ms or 0.0 for line in lines)
    guessed = sum(line.predicted_slim_ms or 0.0 for line in lines)

    def ms(value: float | None) -> str:
        return ABSENT if value is None else significant(value)

    for line in lines[:MOST_LINES]:
        guess = line.predicted_slim_ms
        table.add_row(
            line.name,
            count(line.slim_macs) if line.slim_macs else ABSENT,
            percent(line.slim_macs / line.dense_macs, 0) if line.dense_macs else ABSENT,
            ms(line.dense_ms),
            ms(line.slim_ms),
            *([ABSENT if guess is None else f"{ms(guess)} ({percent(guess / guessed, 0)})"] if known else []),
            percent((line.slim_ms or 0.0) / total, 0) if total else ABSENT,
            line.bound or ABSENT,
            percent(line.peak_share, 0),
            percent(line.padding, 0) if line.padding else ABSENT,
            f"{line.gap_ms:+.4f}",
        )
    return table


def _table(run: RunDir) -> LatencyTable | None:
    from compressor.latency.table import LatencyTable
    from compressor.run.stages import TABLE

    return LatencyTable.read(run.file(TABLE)) if run.file(TABLE).exists() else None


def _predicted(
    run: RunDir, recipe: Recipe, table: LatencyTable | None, factory: str | None
) -> tuple[Pairs | None, str]:
    """The table's prediction of every operator, or why there is none."""
    from compressor.latency.local import require_same_machine
    from compressor.run.layer_times import kept_widths, predicted_pairs, run_space

    if table is None:
        return None, "The run has no latency table, so nothing was predicted."
    try:
        if recipe.device == "local":
            require_same_machine(table, recipe.threads)
        space = run_space(run, table, factory)
        return predicted_pairs(table, space, kept_widths(run, space)), ""
    except CompressorError as error:
        return None, f"Nothing was predicted: {error.message} {error.hint}".rstrip()


def _device(recipe: Recipe, table: LatencyTable | None) -> tuple[Any, int, int]:
    """Return the peak rates of a run's device, its channel block and its bytes per number.

    Raises:
        CompressorError: The run is for this machine, or the device's peaks are unknown.
    """
    from compressor.latency.machine import estimated_machine
    from compressor.latency.roofline import ELEMENT_BYTES
    from compressor.latency.table import shipped_table

    if recipe.device == "local":
        raise CompressorError(
            "Layer profiles of TensorRT belong to a run for a TensorRT device; this one is for this machine.",
            "Leave out --dense-profile and --slim-profile.",
        )
    known = (
        each.fields.roofline.get(recipe.precision) for each in (table, shipped_table(recipe.device)) if each
    )
    fields = next((each for each in known if each is not None), None)
    if fields is None:
        raise CompressorError(
            f"The peak rates of {recipe.device} in {recipe.precision} are not known: only shipped tables have them.",
            "Leave out --dense-profile and --slim-profile: both networks are then explained on this machine.",
        )
    return estimated_machine(fields, recipe.device), fields.block, ELEMENT_BYTES[recipe.precision]
