"""End of a run: closing notes, report, checksums and exit code."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.answers import ANSWERS
from compressor.core.files import sha256_file
from compressor.core.front import FRONT, Front
from compressor.core.intervals import known_ends
from compressor.core.manifest import MANIFEST, Budget, Manifest
from compressor.core.metrics import PYTHON
from compressor.core.records import RECIPE
from compressor.latency.paired import interval_in_words
from compressor.models.onnx_file import NETWORK
from compressor.report.judgement import time_ratio, verdict_of
from compressor.report.next_steps import repeat_command
from compressor.run.deployable import DEPLOYED, write_deployable
from compressor.run.folder import RunFolder
from compressor.run.job import Job
from compressor.run.onnx_files import MODEL

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.recipe import Recipe

KEPT, MISSED, OPEN = 0, 3, 4
"""Exit codes: every budget is met as measured; the best plan found misses one; a budget is only predicted, or its
measurement is undecided."""

LONGER_S = 300.0
"""Time limit of one measurement that is suggested where a shorter one has not decided, in seconds."""

HARDLY_FASTER = 0.95  # of the dense network's time; pruning is expected to save more


def finish(run: RunFolder, job: Job, plan: ChannelPlan) -> int:
    """Write the files for use elsewhere, the report, the checksums and the verdict.

    Returns:
        The exit code.
    """
    manifest = run.manifest
    code = exit_code(manifest.budgets, job.recipe.contract.accept_predicted)
    notes = [*manifest.notes, *_closing_notes(run, job, plan), *_on_the_device(run, job.recipe)]
    manifest.status, manifest.exit_code, manifest.notes = "finished", code, list(dict.fromkeys(notes))
    run.save()
    write_deployable(run, job.recipe, job.task)
    run.stage("report", partial(write_page, run), again=True)
    return code


def write_page(run: RunFolder) -> Path:
    """Write the report of the manifest as it is now, and the checksums of all delivered files; return its path."""
    from compressor.report import write_report

    run.manifest.files = checksums(run)
    run.save()
    page = write_report(run.path)
    run.manifest.files = checksums(run)  # including the report's
    run.save()
    return page


def report_again(folder: Path) -> tuple[Path, str]:
    """Write a run's report again from its manifest, or that of several targets; return its path and the verdict."""
    from compressor.report import judge_front, verdict, write_front, write_report

    RunFolder.tidy(folder)
    if (folder / FRONT).is_file():
        return write_front(folder), judge_front(Front.read_tolerant(folder / FRONT)).sentence
    return write_report(folder), verdict(Manifest.read_tolerant(folder / MANIFEST))


def exit_code(budgets: Iterable[Budget], accept_predicted: bool = False) -> int:
    """Return the exit code that follows from the manifest's budgets.

    Args:
        budgets: Result of each budget.
        accept_predicted: Whether a prediction is sufficient.

    Returns:
        3 if a budget is missed; otherwise 4 if one is undecided, or only predicted and that is not accepted; else 0.
    """
    found = {verdict_of(budget) for budget in budgets}
    if "missed" in found:
        return MISSED
    if "undecided" in found or ("predicted" in found and not accept_predicted):
        return OPEN
    return KEPT


def open_words(budgets: Iterable[Budget]) -> str:
    """Return what exit code 4 says of these budgets, and what helps."""
    if any(verdict_of(budget) == "undecided" for budget in budgets):
        helps = "What is undecided needs a quieter machine or a longer measurement, in a new run."
    else:
        helps = "--accept-predicted makes it 0: budgets are only predicted."
    return f"Exit code {OPEN}: no budget is missed, but not every one is met as measured. {helps}"


def undecided_note(manifest: Manifest, folder: Path, seconds: float) -> str:
    """Return why a run's measurement has not decided its latency target, and what may decide it.

    Args:
        manifest: The run's manifest.
        folder: Its folder.
        seconds: Time limit of its measurements.
    """
    ends = known_ends(*(manifest.latency.interval or (None, None)))
    found = "there were too few runs to know how far its result is off"
    if ends is not None:
        found = (
            f"the slim network takes {interval_in_words(*ends)} of the dense one's time (95 % interval), and the "
            "target lies inside"
        )
    longer = f"{max(LONGER_S, 2 * seconds):g}"
    again = f"{repeat_command(folder)} --set contract.seconds={longer}"
    if manifest.data == PYTHON:  # its recipe alone cannot be run
        again = f'the same call with contract={{"seconds": {longer}}} and another out'
    return (
        f"The measurement cannot decide whether the latency target is met: {found}. A new run on a quiet machine, with "
        f"more time, may: {again}. This run keeps its verdict: --resume takes no other contract.seconds, and compress "
        f"measure {shlex.quote(str(folder))} measures again without judging anew."
    )


def _closing_notes(run: RunFolder, job: Job, plan: ChannelPlan) -> Iterator[str]:
    manifest, budgets = run.manifest, run.manifest.budgets
    pruned = bool(plan.removed) or plan.widths != job.space.dense().widths
    if any(verdict_of(budget) == "undecided" for budget in budgets):
        yield undecided_note(manifest, run.path, job.recipe.contract.seconds)
    if any(verdict_of(budget) == "predicted" for budget in budgets):
        yield not_measured(job.recipe, job.table is not None and job.table.estimated)
    if budgets and not pruned:
        how = "" if job.recipe.precision != "mixed" else " in mixed precision"
        yield f"The dense network already meets every budget{how}: nothing was pruned."
    if pruned and all(budget.name != "latency" for budget in budgets):
        yield from _hardly_faster(manifest)


def not_measured(recipe: Recipe, estimated: bool) -> str:
    """Return the note that a latency is the table's."""
    how = "estimated" if estimated else "predicted"
    return f"{recipe.device} is not this machine: its latency is {how}, not measured."


def _on_the_device(run: RunFolder, recipe: Recipe) -> Iterator[str]:
    """Yield the command that brings the network to a board that this run could not reach."""
    from export.device.bundle import TARGETS

    if recipe.device in TARGETS:
        yield (
            f"Engines are built on the {TARGETS[recipe.device].title}. Create the bundle for that: compress export "
            f"{shlex.quote(str(run.path))} --target {recipe.device} --bundle {recipe.device}.tar.gz"
        )


def _hardly_faster(manifest: Manifest) -> Iterator[str]:
    """Yield a warning if fewer multiply-adds or weights have saved hardly any measured time."""
    found, latency = time_ratio(manifest), manifest.latency
    if found is not None and found[1] == "measured" and found[0] >= HARDLY_FASTER:
        yield (
            f"The slim network takes {found[0]:.0%} of the dense one's measured time "
            f"({latency.measured_ms:.3g} of {latency.dense_ms:.3g} ms): there was no latency budget, and some "
            "channel counts may suit the device badly. Add --latency, or use --granularity measured; "
            "compress measure RUN --explain shows where the time goes."
        )


def checksums(run: RunFolder) -> dict[str, str]:
    """Return the SHA-256 checksums of the run's delivered files, by name."""
    names = [RECIPE, "channels.json", "model.safetensors", NETWORK, MODEL, *DEPLOYED, ANSWERS, "report.html"]
    for pattern in ("model.*.onnx", "model*.pt2", "engines/*"):
        names += sorted(str(path.relative_to(run.path)) for path in run.path.glob(pattern) if path.is_file())
    return {name: sha256_file(run.file(name)) for name in names if run.file(name).exists()}
