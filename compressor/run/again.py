"""What can be done again with a finished run: measure its networks, explain their times, write its report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import sha256_file
from compressor.core.records import RECIPE
from compressor.recipe import Recipe, load_recipe
from compressor.run.folder import RunFolder
from compressor.run.onnx_files import DENSE, MODEL
from export.device.here import CPU

if TYPE_CHECKING:
    from compressor.core.manifest import Explanation
    from compressor.latency.explain import Line
    from compressor.latency.table import LatencyTable
    from compressor.run.layer_times import Pairs

SHOWN_LINES = 25
"""Number of operators that are shown; the manifest and the report have all."""

SHOWN_SENTENCES = 8


@contextmanager
def _exported(folder: Path) -> Iterator[RunFolder]:
    """Open and lock the run in a folder, whose dense and slim ONNX files must exist."""
    with RunFolder.open(folder) as run:
        for name in (DENSE, MODEL):
            if not run.file(name).exists():
                raise CompressorError(
                    f"{folder} has no {name} yet.", f"Finish it first: compress --resume {folder}"
                )
        yield run


def report_again(folder: Path) -> tuple[Path, str]:
    """Write a run's report again from its manifest; return its path and the run's verdict."""
    from compressor.core.manifest import MANIFEST, Manifest
    from compressor.report import verdict, write_report

    RunFolder.tidy(folder)
    return write_report(folder), verdict(Manifest.read_tolerant(folder / MANIFEST))


def measure_again(folder: Path) -> Iterator[str]:
    """Time a run's dense and slim networks again on its device; the manifest does not change.

    A device that is not measured from here is replaced by this machine's CPU, with a sentence that says so.
    """
    from compressor.latency.local import LocalCpu
    from compressor.latency.paired import in_words
    from compressor.latency.provider import Turns
    from compressor.run.device import provider_of, request_of

    with _exported(folder) as run:
        recipe = load_recipe(run.file(RECIPE))
        before = run.manifest.latency
        target = run.manifest.rounds[-1].target_ratio if run.manifest.rounds else None
        provider = provider_of(recipe)
        runtime = before.runtime or provider.runtime
        if not (provider.measures and runtime.startswith(provider.runtime)):
            provider = LocalCpu()
            if recipe.device != "local" or not runtime.startswith(CPU):
                yield _from_here(recipe)
        turns = Turns(recipe.contract.repeats, target, recipe.contract.seconds)
        timing = provider.time(run.file(DENSE), run.file(MODEL), request_of(recipe), turns, _table(run))
        for name, stats in (("dense", timing.dense), ("slim", timing.slim)):
            yield (
                f"{name}: median {stats.median_ms:.3f} ms, p90 {stats.p90_ms:.3f} ms, p99 {stats.p99_ms:.3f} ms "
                f"({stats.runtime} {stats.version}, {stats.threads} threads, {stats.runs} runs)"
            )
        ratio = timing.ratio
        yield (
            f"slim takes {ratio.value:.1%} of the dense network's time, 95 % interval "
            f"{ratio.low:.1%}-{ratio.high:.1%}, after {ratio.bursts} bursts in turns"
        )
        if target is not None:
            yield f"target {target:.1%}: {in_words(ratio.verdict(target))}"
        if timing.noise:
            yield timing.noise
        if before.measured_ms:
            where = f"on {before.device}, {before.runtime}"
            yield f"the run itself measured {before.measured_ms:.3f} ms {where}"


def explain_again(
    folder: Path, profiles: tuple[Path, Path] | None = None, factory: str | None = None
) -> Iterator[str | list[Line]]:
    """Profile a run's dense and slim networks, say why the slim one is not faster, and rewrite the report.

    Args:
        folder: Folder of a finished run.
        profiles: Layer profiles of the dense and the slim engine that trtexec wrote on the run's device; by default
            both networks are profiled on this machine.
        factory: Function that builds the run's network if it is the user's own code; see `models.names`.

    Yields:
        Lines for the user, and once all operators, the largest possible gains first.

    Raises:
        CompressorError: The run has exported nothing yet, or a profile does not belong to its networks.
    """
    from compressor.report import write_report
    from compressor.report.explain import gap
    from compressor.report.page import REPORT
    from compressor.run.device import resolved
    from compressor.run.layer_times import explain_run, read_profiles

    with _exported(folder) as run:
        recipe = resolved(load_recipe(run.file(RECIPE)))
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
        assert run.manifest.explanation is not None  # set by `explain_run`
        yield from _header(run.manifest.explanation, recipe, here or profiles is not None)
        yield lines
        if len(lines) > SHOWN_LINES:
            yield f"and {len(lines) - SHOWN_LINES} more lines, in the report."
        yield gap(run.manifest)
        sentences = [line.sentence for line in lines if line.sentence]
        yield from (f"- {sentence}" for sentence in sentences[:SHOWN_SENTENCES])
        if table is not None and table.estimated and predicted:
            yield "The predictions are estimated, not measured."
        if note:
            yield note
        page = write_report(run.path)
        run.manifest.files = {**run.manifest.files, REPORT: sha256_file(page)}
        run.save()
        yield f"Wrote {page}"


def _header(explanation: Explanation, recipe: Recipe, on_device: bool) -> Iterator[str]:
    yield (
        f"On {explanation.where}: dense {explanation.dense_ms:.3f} ms, slim {explanation.slim_ms:.3f} ms. "
        f"Peaks: {explanation.peaks}."
    )
    if not on_device:
        yield _from_here(recipe)
        if recipe.device != "local":
            yield (
                "For the device's own times, profile both engines there (trtexec --exportProfile) and add "
                "--dense-profile FILE --slim-profile FILE."
            )


def _from_here(recipe: Recipe) -> str:
    whose = "this machine's GPU" if recipe.device == "local" else recipe.device
    return f"The run is for {whose}; these times are from this machine's CPU."


def _table(run: RunFolder) -> LatencyTable | None:
    from compressor.latency.table import LatencyTable
    from compressor.run.stages import TABLE

    return LatencyTable.read(run.file(TABLE)) if run.file(TABLE).exists() else None


def _predicted(
    run: RunFolder, recipe: Recipe, table: LatencyTable | None, factory: str | None
) -> tuple[Pairs | None, str]:
    """The table's prediction of every operator, or why there is none."""
    from compressor.run.device import provider_of, request_of
    from compressor.run.layer_times import kept_widths, predicted_pairs, run_space

    if table is None:
        return None, "The run has no latency table, so nothing was predicted."
    try:
        if recipe.device == "local":
            provider_of(recipe).require_same(table, request_of(recipe))
        space = run_space(run, table, factory)
        return predicted_pairs(table, space, kept_widths(run, space)), ""
    except CompressorError as error:
        return None, f"Nothing was predicted: {error.message} {error.hint}".rstrip()


def _device(recipe: Recipe, table: LatencyTable | None) -> tuple[Any, int, int]:
    """Return the peak rates of a run's device, its channel block and its bytes per number.

    Raises:
        CompressorError: The run is for this machine, or the device's peaks are unknown.
    """
    from compressor.latency.estimate import ELEMENT_BYTES
    from compressor.latency.peaks import estimated_machine
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
