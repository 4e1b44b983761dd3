"""Several targets of one search: a run for each, and the front of their networks.

    recipe -> prepare -> [target -> inherit -> the main path of a run -> points]* -> front.json -> page

The runs follow one another, each in a folder of its own below that of the front. Network, data, latency table and what
is computed of the given weights are prepared once. The first run searches in full; each later one continues the search
of the one before it with its own budgets, so that the trained dense network, the measured groups, the scored plans and
what was learned of them serve all. Its table begins with the correction that earlier measurements suggest.

A resumed front takes the same path: finished runs are only read, and the unfinished one continues.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compressor.core.errors import CompressorError
from compressor.core.files import replacing
from compressor.core.front import FRONT, SCHEMA, DropLimit, Front, TargetRun
from compressor.core.manifest import MANIFEST, Manifest, Measurement
from compressor.core.metrics import AGREEMENT
from compressor.core.plugins import load_plugins
from compressor.core.progress import say
from compressor.core.records import RECIPE
from compressor.recipe.targets import Target, targets
from compressor.report import judge, write_front
from compressor.run.contract import Contract, correction_at, points_of
from compressor.run.device import provider_of, request_of
from compressor.run.finish import KEPT, MISSED, OPEN, exit_code
from compressor.run.folder import RunFolder, stopped_in
from compressor.run.job import Job, budget_specs, latency_budget
from compressor.run.load import refuse_other_files
from compressor.run.max_drop import Narrowing, check_alone, check_metrics, judged, lost, with_latency
from compressor.run.measure import stored_table
from compressor.run.onnx_files import DENSE
from compressor.run.points import in_milliseconds, points
from compressor.run.result import RunResult
from compressor.run.resuming import changed_since, function_values, rewrite, table_of
from compressor.run.stages import search
from compressor.run.together import gather

if TYPE_CHECKING:
    from compressor.latency.table import LatencyTable
    from compressor.recipe import Budgets, Recipe
    from compressor.run.load import Loader

Take = Callable[[RunFolder, Job], RunResult]
"""Takes the main path of one run, from wherever it stands."""


class Order(Protocol):
    """Decides which target is next."""

    def next(self, done: Sequence[TargetRun]) -> Target | None:
        """Return the target after these finished ones; None after the last."""


@dataclass(frozen=True)
class Listed:
    """The targets that a recipe lists, in its order."""

    targets: tuple[Target, ...]

    def next(self, done: Sequence[TargetRun]) -> Target | None:
        return self.targets[len(done)] if len(done) < len(self.targets) else None


def begin(recipe: Recipe, path: Path, loader: Loader, take: Take) -> RunResult:
    """Run a resolved recipe with several targets from the beginning.

    Args:
        recipe: Resolved recipe.
        path: Folder of the front, new or empty.
        loader: Loads the network and the data.
        take: The main path of one run.

    Raises:
        CompressorError: Something is not available, or a target cannot be reached; nothing was written.
    """
    started = time.monotonic()
    job = _prepared(recipe, loader, None)
    gather(job.recipe, job.task)
    recipe = _with_budgets(job.recipe, recipe.budgets)
    with RunFolder.create(path, recipe.to_yaml()) as folder, stopped_in(path):
        say(f"The folder of all runs is {path}")
        return _Front(folder, recipe, job, take, time.monotonic() - started).run()


def go_on(folder: RunFolder, recipe: Recipe, changed: Sequence[str], loader: Loader, take: Take) -> RunResult:
    """Continue a stopped front; see `begin`.

    Args:
        folder: Its folder, locked.
        recipe: Its recipe.
        changed: What differs from the recipe of its start; see `changed_since`.
        loader, take: As for `begin`.
    """
    started = time.monotonic()
    job = _prepared(recipe, loader, folder)
    gather(job.recipe, job.task)
    rewrite(folder, recipe, changed)
    return _Front(folder, recipe, job, take, time.monotonic() - started).run()


def whole_of(folder: Path) -> Path:
    """Return the folder of the front that a run belongs to, or the folder itself if it belongs to none."""
    above = folder.resolve().parent
    if (above / FRONT).is_file():
        known = Front.read_tolerant(above / FRONT)
        if any(target.folder == folder.resolve().name for target in known.targets):
            say(f"{folder} is one of the runs in {above}, which are continued together.")
            return above
    return folder


def prepared(recipe: Recipe, loader: Loader) -> dict[str, Job]:
    """Return the jobs of a resolved recipe's targets by name, without running anything; see `begin`."""
    job = _prepared(recipe, loader, None)
    listed = _to_prepare(recipe.budgets)
    return {each.name: job.within(_with_budgets(job.recipe, each.budgets), job.table) for each in listed}


def _prepared(recipe: Recipe, loader: Loader, folder: RunFolder | None) -> Job:
    """Load a recipe's objects, and refuse targets that cannot be reached.

    Args:
        recipe: Recipe with several targets.
        loader: Loads network and data.
        folder: Folder of a resumed front, of which table, dense file and values of functions are read.
    """
    load_plugins()
    listed = _to_prepare(recipe.budgets)
    recipes = [_with_budgets(recipe, target.budgets) for target in listed]
    for each in recipes:
        budget_specs(each)
    begun = [] if folder is None else [folder.file(each.folder) for each in _read(folder).targets]
    runs = [RunFolder(path) for path in begun if (path / RECIPE).is_file()]
    table = stored_table(runs[0]) if runs else None
    if table is not None and folder is not None and _read(folder).status != "finished":
        provider_of(recipe).require_same(table, request_of(recipe))
    job = Job.prepare(
        recipes[0],
        table,
        loader=loader,
        values=next((found for run in reversed(runs) if (found := function_values(run))), None),
        dense=runs[0].file(DENSE) if runs else None,
    )
    if runs and runs[0].file(MANIFEST).exists():
        refuse_other_files(recipe, Manifest.read(runs[0].file(MANIFEST)).splits, job.files)
    limits: dict[tuple[float, ...], str] = {}
    for target in listed:
        budgets = job.within(_with_budgets(job.recipe, target.budgets), job.table).budgets()
        same = limits.setdefault(tuple(each.target for each in budgets), target.name)
        if same != target.name:
            raise CompressorError(f"{same} and {target.name} are the same limit.", "Leave one of them out.")
    if recipe.budgets.max_drop is not None:
        check_metrics(job.task)
        Narrowing.of(job, recipe.budgets)
    return job


def _to_prepare(budgets: Budgets) -> tuple[Target, ...]:
    """Return the targets that must be reachable; of a limit of lost accuracy the dense network's own latency."""
    if budgets.max_drop is None:
        return targets(budgets)
    check_alone(budgets)
    return (Target("", with_latency(budgets, 1.0)),)


def _read(folder: RunFolder) -> Front:
    """Return the front as recorded so far."""
    return Front.read(folder.file(FRONT)) if folder.file(FRONT).exists() else Front()


def _with_budgets(recipe: Recipe, budgets: Budgets) -> Recipe:
    return recipe.changed({"budgets": budgets.model_dump(mode="json")})


class _Front:
    """One front from wherever it stands to its end."""

    def __init__(self, folder: RunFolder, recipe: Recipe, job: Job, take: Take, seconds: float) -> None:
        self._folder, self._recipe, self._job, self._take = folder, recipe, job, take
        self._limit = recipe.budgets.max_drop
        self._order: Order
        if self._limit is None:
            self._order = Listed(targets(recipe.budgets))
        else:
            self._order = Narrowing.of(job, recipe.budgets)
        self._front = _read(folder)
        self._record(
            schema_version=SCHEMA,
            status="running",
            model=recipe.model,
            data=recipe.data.source,
            device=recipe.device,
            agent=recipe.agent,
            epochs=recipe.epochs,
            seed=recipe.seed,
            metric=job.task.metric.name,
            share=job.task.metric.share,
            searched_by=_searched_by(job),
            search_images=_search_images(job),
            test_images=job.task.test_inputs,
            prepare_seconds=self._front.prepare_seconds or round(seconds, 1),
        )

    def run(self) -> RunResult:
        """Run the targets that are left, and write the front and its page."""
        results: list[RunResult] = []
        while (target := self._order.next(self._front.targets[: len(results)])) is not None:
            results.append(self._run(len(results), target))
        chosen, code = None, worst([each.exit_code for each in results])
        if self._limit is not None:
            found = judged(self._front, self._limit)
            chosen = next(each for each in results if each.directory.name == found.chosen)
            code = self._code(found, chosen)
            self._record(max_drop=found)
        self._record(status="finished", exit_code=code)
        write_front(self._folder.path)
        return RunResult(self._folder.path, self._front.plain(), code, self._job.builder, tuple(results), chosen)

    def _code(self, found: DropLimit, chosen: RunResult) -> int:
        """Return the exit code of a limit of lost accuracy: that of the network's other budgets, if it is worse."""
        own = {None: KEPT, "kept": KEPT, "undecided": OPEN, "missed": MISSED}[found.confirmed] if found.kept else MISSED
        others = [each for each in Manifest.tolerant(chosen.manifest).budgets if each.name != "latency"]
        return worst([own, exit_code(others, self._recipe.contract.accept_predicted)])

    def _run(self, place: int, target: Target) -> RunResult:
        """Run one target, or return the result of a finished one."""
        path, before = self._folder.file(target.name), self._front.targets[:place]
        entry = next(iter(self._front.targets[place:]), TargetRun())
        if entry.folder == target.name and entry.status == "finished":
            manifest = Manifest.read(path / MANIFEST)
            code = exit_code(manifest.budgets, self._recipe.contract.accept_predicted)
            return RunResult(path, manifest.plain(), code, self._job.builder)
        recipe = _with_budgets(self._job.recipe, target.budgets)
        limits = recipe.budgets.given() | {f"function {i}": text for i, text in enumerate(recipe.budgets.functions)}
        entry = TargetRun(folder=target.name, budgets=limits, status="running", known=entry.known or 0)
        self._record(targets=[*before, entry])
        say(f"Target {place + 1}: {target.name}")
        with self._opened(path, recipe) as run:
            searched = run.finished("finetune")  # the search is not looked at again
            notes: list[str] = []
            if before:
                entry = self._inherit(run, before[-1], entry)
                self._record(targets=[*before, entry])
                notes = [
                    f"The search continues that of {entry.continues} and begins with {entry.known} scored plans: this "
                    "recipe alone would search from the beginning."
                ]
            self._job.compute_shared()
            job = self._job.within(recipe, self._table(run, recipe, before), notes)
            result = self._take(run, job)
            if self._limit is not None:
                if searched and not job.trained:  # the dense network that the search has trained is restored
                    search(run, job, Contract(run, job))
                entry = entry.model_copy(update={"lost": lost(run, job)})
            started, known = time.monotonic(), [each for each in self._front.points if each.target != target.name]
            found = [*known, *points(run, job, with_dense=not known)]
            seconds = {name: float(stage.seconds or 0) for name, stage in run.manifest.stages.items()}
            said = judge(run.manifest)
            entry = entry.model_copy(
                update={
                    "status": "finished",
                    "exit_code": result.exit_code,
                    "state": said.state,
                    "verdict": said.sentence,
                    "evaluations": run.manifest.search.evaluations if run.manifest.search is not None else None,
                    "seconds": {**seconds, "compare": round(time.monotonic() - started, 1)},
                }
            )
        manifests = [Manifest.read(self._folder.file(each.folder) / MANIFEST) for each in (*before, entry)]
        self._record(targets=[*before, entry], **in_milliseconds(found, manifests))
        return result

    @contextmanager
    def _opened(self, path: Path, recipe: Recipe) -> Iterator[RunFolder]:
        """Open the folder of a target's run, or create it."""
        if not (path / RECIPE).exists():
            with RunFolder.create(path, recipe.to_yaml()) as run:
                yield run
            return
        with RunFolder.open(path) as run:
            if run.manifest.status != "finished":
                rewrite(run, recipe, changed_since(run, recipe))
            yield run

    def _inherit(self, run: RunFolder, before: TargetRun, entry: TargetRun) -> TargetRun:
        """Let a run that has not begun continue the search of the one before it; return its entry of the front."""
        from compressor.search.inherit import inherit

        entry = entry.model_copy(update={"continues": before.folder})
        if run.manifest.stages:
            return entry
        earlier = RunFolder(self._folder.file(before.folder))
        with replacing(run.file(DENSE)) as temporary:
            shutil.copyfile(earlier.file(DENSE), temporary)
        known = inherit(earlier.checkpoint("search"), run.checkpoint("search"))
        if not known:
            say(f"{earlier.path} has lost the state of its search: this one starts from the beginning.")
        return entry.model_copy(update={"known": known})

    def _table(self, run: RunFolder, recipe: Recipe, before: Sequence[TargetRun]) -> LatencyTable | None:
        """Return the table of a run: its own if it has begun, else corrected by what earlier targets measured."""
        own, base, budget = table_of(run, recipe), self._job.table, latency_budget(recipe)
        if own is not None or base is None or budget is None:
            return base if own is None else own
        manifests = [Manifest.read(self._folder.file(each.folder) / MANIFEST) for each in before]
        rounds: list[Measurement] = [each for manifest in manifests for each in manifest.rounds]
        if not rounds:
            return base
        aim = (1 - recipe.contract.margin) * budget.share(base.dense_ms(self._job.space))
        correction = correction_at(aim, points_of(base, self._job.space, rounds))
        corrected = base.refit([correction], lower=True)
        try:
            self._job.within(recipe, corrected).budgets()
        except CompressorError:  # only the base table lets it begin
            return base
        return corrected

    def _record(self, **fields: object) -> None:
        """Set fields of the front and write it."""
        for name, value in fields.items():
            setattr(self._front, name, value)
        self._front.write(self._folder.file(FRONT))


def _searched_by(job: Job) -> str:
    """Say what candidates are scored by."""
    metric = job.task.on_search().metric
    if metric.name == AGREEMENT or job.recipe.search.measure == "closeness":
        return "closeness to the dense network's outputs"
    return metric.name if metric.share else f"{metric.name}, mapped to 0 to 100 %"


def _search_images(job: Job) -> int | None:
    """Return the number of inputs that score a candidate; None if a user's function reads them."""
    inputs, most = job.task.on_search().test_inputs, job.recipe.search.search_images
    return inputs if inputs is None or most is None else min(inputs, most)


def worst(codes: Sequence[int]) -> int:
    """Return the exit code of several runs: 3 if one misses a budget, else 4 if one is open, else 0.

    >>> worst([0, 4, 0]), worst([4, 3])
    (4, 3)
    """
    return next((code for code in (MISSED, OPEN) if code in codes), KEPT)
