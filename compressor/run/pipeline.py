"""The main path of a run.

    recipe -> prepare -> [search -> probe]* -> fine-tune -> export -> measure -> report

Latency does not depend on the weights, so a plan is measured right after the search, before fine-tuning. If it misses
the target, or is faster than necessary, the table is refitted with that measurement and the search continues.

Every stage stores what later stages need in the run's folder. A resumed run takes the same path and skips the stages
that have finished.

If a launcher started several processes, the first one takes this path, and the others only train (`run.together`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError, Stopped
from compressor.core.files import write_atomic
from compressor.core.manifest import MANIFEST
from compressor.core.processes import stopped
from compressor.core.progress import say
from compressor.core.records import RECIPE
from compressor.recipe import Recipe, load_recipe
from compressor.recipe.validation import validated
from compressor.run.contract import Contract
from compressor.run.device import provider_of, request_of, resolved
from compressor.run.finish import finish
from compressor.run.folder import RunFolder, new_run_path, runs_folder
from compressor.run.follower import follow, follows
from compressor.run.job import Job
from compressor.run.load import Loader, load
from compressor.run.measure import measure, probe, stored_table
from compressor.run.onnx_files import DENSE, MODEL, export
from compressor.run.stages import begin, choose, finetune, finetuned_network, search
from compressor.run.together import gather, leading, processes, send_result

if TYPE_CHECKING:
    from torch import nn

    from compressor.latency.table import LatencyTable


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        directory: Folder of the run.
        manifest: Content of its `manifest.json`.
        exit_code: 0 if every budget is met as measured, 3 if the best plan found misses one, 4 if one is only
            predicted or undecided.
        builder: What builds the dense network's structure; see `run.load.Loaded`.
    """

    directory: Path
    manifest: Mapping[str, Any]
    exit_code: int
    builder: Any = field(repr=False, default=None)

    @cached_property
    def model(self) -> nn.Module:
        """The slim network on the CPU, in eval mode."""
        from compressor.pruning.artefact import load

        return load(self.directory, factory=self.builder)

    @property
    def onnx(self) -> Path:
        """The slim network's ONNX file."""
        return self.directory / MODEL


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
        path = out or new_run_path(runs_folder(), recipe.label)
        RunFolder.require_empty(path)
        job = Job.prepare(recipe, loader=loader)
        gather(job.recipe, job.task)
        with RunFolder.create(path, job.recipe.to_yaml()) as run, _stopped_in(path):
            say(f"The run's folder is {run.path}")
            return _all_stages(run, job)


def resume(folder: Path, overrides: Mapping[str, Any] | None = None) -> RunResult:
    """Continue a stopped run; the result is the same as without the stop.

    Args:
        folder: Folder of the run.
        overrides: Recipe fields that the caller expects. Learning rates may differ, so that a training whose loss
            became infinite can continue from its checkpoint. The number of workers may differ too, because it does not
            change the result while each worker has the same threads. The recipe is then rewritten, with a note.

    Raises:
        CompressorError: The run was started with another recipe, or another process is working on the folder.
    """
    return continued(folder, overrides or {})


def continued(folder: Path, overrides: Mapping[str, Any], loader: Loader = load) -> RunResult:
    """Continue a stopped run, with objects from a loader; see `resume`."""
    if follows():
        return _followed(loader)
    with leading(), RunFolder.open(folder) as run, _stopped_in(folder):
        recipe = load_recipe(run.file(RECIPE)).changed(overrides).placed(Path.cwd())
        changed = _changed_since(run, recipe)
        table, values = _table_of(run, recipe), _function_values(run)
        job = Job.prepare(recipe, table, loader=loader, values=values, dense=run.file(DENSE))
        gather(job.recipe, job.task)
        if run.manifest.stages and (before := run.manifest.machine.get("processes", 1)) != processes():
            run.note(f"Resumed with {processes()} processes instead of {before}.")
        if changed:
            note = f"Resumed with other settings: {'; '.join(changed)}."
            write_atomic(run.file(RECIPE), recipe.to_yaml())
            if run.manifest.stages:
                run.manifest.recipe = recipe.model_dump(mode="json")
                run.manifest.notes = [*run.manifest.notes, note]
                run.save()
            say(note)
        return _all_stages(run, job)


def _followed(loader: Loader) -> RunResult:
    """Take part in the run of another process, and return its result."""
    end = follow(loader)
    return RunResult(Path(end["directory"]), end["manifest"], end["exit_code"], end["builder"])


def _all_stages(run: RunFolder, job: Job) -> RunResult:
    """Take the main path; each stage is skipped if it has finished."""
    from compressor.models.names import remember_factory
    from compressor.pruning.artefact import read_plan

    if not job.recipe.from_python:
        remember_factory(job.recipe.model)
    job.dense_file.put(run.file(DENSE))
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
    code = finish(run, job, plan)
    result = RunResult(run.path, run.manifest.plain(), code, job.builder)
    send_result(result.directory, result.manifest, code)
    return result


@contextmanager
def _stopped_in(folder: Path) -> Iterator[None]:
    """Add the run's folder to an interrupt, also to one that a library or a lost process turned into another error."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(folder) from stop
    except Exception as error:
        if stopped():
            raise Stopped(folder) from error
        raise


_FREE = (
    "accept_dense",
    "training.learning_rate",
    "training.finetune_learning_rate",
    "search.workers",
    "search.evaluation_seconds",
    "contract.accept_predicted",
)
"""Fields that may change when a run is resumed."""


def _changed_since(run: RunFolder, recipe: Recipe) -> list[str]:
    """Describe the fields in which a recipe differs from the one that the run was started with.

    Raises:
        CompressorError: A field differs that may not.
    """
    if run.manifest.recipe:
        begun = validated(Recipe, run.manifest.recipe, f"the recipe in {run.file(MANIFEST)}")
    else:  # killed before its first stage, or started by an earlier version
        begun = load_recipe(run.file(RECIPE))
    begun = begun.placed(Path.cwd())  # runs of earlier versions hold relative paths
    before, now = (dict(_fields(each.model_dump(mode="json"))) for each in (begun, recipe))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changed = {name: f"{name} is {before.get(name)}, not {now.get(name)}" for name in names}
    if refused := [said for name, said in changed.items() if name not in _FREE]:
        raise CompressorError(
            f"The run in {run.path} was started with another recipe: {'; '.join(refused)}.",
            f"Resume it without these options and with its original {RECIPE}, or start a new run with --out DIR.",
        )
    return list(changed.values())


def _fields(plain: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a recipe and of its parts, with their dotted names."""
    for name, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{within}{name}.")
        else:
            yield within + name, value


def _table_of(run: RunFolder, recipe: Recipe) -> LatencyTable | None:
    """Return the latency table of the running search, corrected by the measurements since.

    Raises:
        CompressorError: The table is damaged, or more must be measured and it belongs to another device.
    """
    table = stored_table(run)
    if table is None:
        return None
    if not run.finished("measure"):
        provider_of(recipe).require_same(table, request_of(recipe))
    for predicted, measured in run.manifest.corrections:
        table = table.refit([(predicted, measured)], lower=True)
    return table


def _function_values(run: RunFolder) -> dict[str, dict[tuple[int, ...], float]]:
    """Return the values of the user's functions in the search so far, by budget and widths."""
    from compressor.search.records import FORMAT

    state = run.checkpoint("search").load()
    if state is None or state.get("format") != FORMAT:  # the search reports another format, with a hint
        return {}
    known = state["env"]["functions"]
    return {name: {tuple(widths): float(value) for widths, value in known[name]} for name in known}
