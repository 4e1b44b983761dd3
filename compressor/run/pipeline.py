"""The main path of a run.

    recipe -> prepare -> [search -> probe]* -> fine-tune -> export -> measure -> report

Latency does not depend on the weights, so a plan is measured right after the search, before fine-tuning. If it misses
the target, or is faster than necessary, the table is refitted with that measurement and the search continues.

Every stage stores what later stages need in the run's folder. A resumed run takes the same path and skips the stages
that have finished.

If a launcher started several processes, the first one takes this path, and the others only train (`run.together`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from compressor.core.files import write_atomic
from compressor.core.progress import say
from compressor.core.records import RECIPE
from compressor.models.onnx_file import NETWORK, open_onnx
from compressor.recipe import Recipe, load_recipe
from compressor.run import front
from compressor.run.contract import Contract
from compressor.run.conversions import export
from compressor.run.device import resolved
from compressor.run.finetuning import finetune, finetuned_network
from compressor.run.finish import finish
from compressor.run.folder import RunFolder, new_run_path, runs_folder, stopped_in
from compressor.run.follower import follow, follows
from compressor.run.job import Job
from compressor.run.load import Loader, load, refuse_other_files
from compressor.run.measure import measure, probe
from compressor.run.onnx_files import DENSE
from compressor.run.result import RunResult
from compressor.run.resuming import changed_since, function_values, rewrite, table_of
from compressor.run.stages import begin, choose, search
from compressor.run.together import gather, leading, processes, send_result
from compressor.run.trackers import check_tracker
from compressor.run.tracking import followed


def run_recipe(recipe: Recipe, out: str | Path | None = None) -> RunResult:
    """Run a recipe from the beginning; the command line calls this.

    Args:
        recipe: Network, data, budgets and settings.
        out: Folder of the run, new or empty; None for a new one under `runs/`.

    Raises:
        CompressorError: Something in the recipe is not available; nothing was written.
    """
    return started(recipe, None if out is None else Path(out))


def started(recipe: Recipe, out: Path | None, loader: Loader = load) -> RunResult:
    """Run a recipe from the beginning, with objects from a loader; see `Job.prepare`."""
    if follows():
        return _followed(loader)
    with leading():
        recipe = resolved(recipe).placed(Path.cwd())
        check_tracker(recipe.track)
        path = out or new_run_path(runs_folder(), recipe.label)
        RunFolder.require_empty(path)
        if recipe.several:
            return _sent(front.begin(recipe, path, loader, _all_stages))
        job = Job.prepare(recipe, loader=loader)
        gather(job.recipe, job.task)
        with RunFolder.create(path, job.recipe.to_yaml()) as run, stopped_in(path):
            say(f"The run's folder is {run.path}")
            return _sent(_all_stages(run, job))


def resume(folder: Path, overrides: Mapping[str, Any] | None = None) -> RunResult:
    """Continue a stopped run; the result is the same as without the stop.

    Args:
        folder: Folder of the run.
        overrides: Recipe fields that the caller expects. Learning rates may differ, so that a training whose loss
            became infinite can continue from its checkpoint, and so may `export.max_drop` until the run has finished.
            The number of workers may differ too, because it does not change the result while each worker has the same
            threads. The recipe is then rewritten, with a note.

    Raises:
        CompressorError: The run was started with another recipe, or another process is working on the folder.
    """
    return continued(folder, overrides or {})


def continued(folder: Path, overrides: Mapping[str, Any], loader: Loader = load) -> RunResult:
    """Continue a stopped run, with objects from a loader; see `resume`."""
    if follows():
        return _followed(loader)
    folder = front.whole_of(folder)
    with leading(), RunFolder.open(folder) as run, stopped_in(folder):
        recipe = load_recipe(run.file(RECIPE)).changed(overrides).placed(Path.cwd())
        changed = changed_since(run, recipe)
        check_tracker(recipe.track)
        if recipe.several:
            return _sent(front.go_on(run, recipe, changed, loader, _all_stages))
        table, values = table_of(run, recipe), function_values(run)
        if loader is load:
            loader = partial(load, network=run.file(NETWORK))
        job = Job.prepare(recipe, table, loader=loader, values=values, dense=run.file(DENSE))
        refuse_other_files(recipe, run.manifest.splits, job.files)
        gather(job.recipe, job.task)
        if run.manifest.stages and (before := run.manifest.machine.get("processes", 1)) != processes():
            run.note(f"Resumed with {processes()} processes instead of {before}.")
        rewrite(run, recipe, changed)
        return _sent(_all_stages(run, job))


def _followed(loader: Loader) -> RunResult:
    """Take part in the run of another process, and return its result."""
    end = follow(loader)
    return RunResult.of(end, end["builder"])


def _sent(result: RunResult) -> RunResult:
    """Return a result after the other processes have it, too."""
    send_result(result.plain())
    return result


def _all_stages(run: RunFolder, job: Job) -> RunResult:
    """Take the main path of one run, and send its numbers to a tracker if the recipe names one."""
    from compressor.models.names import remember_factory

    if not job.recipe.from_python:
        remember_factory(job.recipe.model)
    job.dense_file.put(run.file(DENSE))
    if job.recipe.onnx and not run.file(NETWORK).exists():
        write_atomic(run.file(NETWORK), open_onnx(job.recipe.model).content)
    with followed(run, job.recipe):
        code = _stages(run, job)
    return RunResult(run.path, run.manifest.plain(), code, job.builder)


def _stages(run: RunFolder, job: Job) -> int:
    """Take the main path, whose stages are skipped if they have finished, and return the exit code."""
    from compressor.pruning.artefact import read_plan

    contract = Contract(run, job)
    run.stage("begin", partial(begin, run, job))
    while True:
        if run.finished("finetune"):  # nothing is decided again, and nothing of the search is needed
            plan = read_plan(run.path)
        else:
            find = partial(search, run, job, contract)
            plan = run.stage("search", find, saved=find)
            if contract.measurable:
                run.stage("probe", partial(probe, run, job, contract, plan))
                if contract.continue_search():
                    continue
            plan = choose(run, job, contract, plan)
        slim = run.stage(
            "finetune", partial(finetune, run, job, plan), saved=partial(finetuned_network, run, job)
        )
        run.stage("export", partial(export, run, job, plan, slim))
        run.stage("measure", partial(measure, run, job, contract, plan))
        if not contract.return_to_search(plan):
            break
    return finish(run, job, plan)
