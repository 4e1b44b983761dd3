"""A run's objects on this machine: network, task, pruning space and budgets.

Every invalid request is rejected here, before the run's folder is created.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import replacing
from compressor.core.metrics import ACCURACY
from compressor.latency.assemble import with_batch
from compressor.latency.networks import with_distinct_weights
from compressor.run.device import (
    check_precision,
    device_precision,
    latency_table,
    opset_of,
    provider_of,
    request_of,
)
from compressor.run.load import Loader, load, network_facts
from compressor.run.together import check_batch, processes
from export.convert.trees import tensors_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from compressor.budgets.base import Budget, BudgetSpec, CachedValues
    from compressor.core.manifest import SplitFiles
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe
    from compressor.search.networks import Methods
    from compressor.training.task import Examined, Task


class DenseFile:
    """ONNX file of a run's dense network: in a temporary folder until the run has one.

    It is exported before anything is measured or searched, so that failures show within seconds.

    Args:
        known: File of a resumed run; nothing is exported if it exists.
        recipe, model, task: Network, and the arguments for one input and what its file says; the file takes the
            recipe's batch.

    Raises:
        CompressorError: The network cannot be exported, or the file's outputs differ from the network's.
    """

    def __init__(self, known: Path | None, recipe: Recipe, model: nn.Module, task: Task) -> None:
        self._path: Path | None = None
        if known is None or not known.exists():
            folder = tempfile.mkdtemp(prefix="compressor-dense-")
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._path = Path(folder) / "dense.onnx"
            self._write(self._path, recipe, model, task)

    def put(self, path: Path) -> None:
        """Put the complete file at `path`, unless it exists already."""
        if self._path is None:
            return
        if not path.exists():
            with replacing(path) as temporary:
                shutil.copyfile(self._path, temporary)
        self._path = None
        self._remove()

    @staticmethod
    def _write(path: Path, recipe: Recipe, model: nn.Module, task: Task) -> None:
        from export.convert.to_onnx import export_onnx
        from export.errors import ExportError

        try:
            batched, facts = with_batch(task.example, recipe.batch), network_facts(recipe, task)
            export_onnx(with_distinct_weights(model), batched, path, opset=opset_of(recipe), metadata=facts)
        except ExportError as error:
            raise CompressorError(
                f"{recipe.model} cannot be exported, and neither could a slim network of it: {error.message}",
                error.hint,
            ) from error


@dataclass
class Job:
    """A run's recipe with its objects, ready for the stages.

    Attributes:
        recipe: Resolved recipe, with measured channel steps as numbers, so that a resumed run has the same steps.
        model: Dense network on `torch_device`; agents that train change its weights.
        teacher: Dense network as loaded, if it is pretrained; else None.
        factory: What rebuilds the network for its artifact; None if its user has to.
        builder: What builds it here, for `pruning.artefact.load`.
        task: Batches, loss and scores.
        preprocessing: How images become inputs, for the manifest.
        space: Prunable channels of `model`.
        table: Latency table of the device; None if no latency budget needs it.
        torch_device: Device for training, "cpu" or "cuda".
        notes: Sentences that the user must see beside the numbers.
        dense_file: ONNX file of the dense network, until the run has it.
        compensation: How candidates and the delivered network are compensated.
        files: The data's files in each split, for the manifest.
        callers: Callers of function and energy budgets, by name.
        of_front: Whether the run is one of several, whose searches also score what they are compared with.
    """

    recipe: Recipe
    model: nn.Module
    teacher: nn.Module | None
    factory: dict[str, Any] | None
    builder: Callable[[], nn.Module] | str | None
    task: Task
    preprocessing: dict[str, Any]
    space: PruningSpace
    table: LatencyTable | None
    torch_device: str
    notes: list[str]
    dense_file: DenseFile
    compensation: Methods
    files: Mapping[str, SplitFiles] = field(default_factory=dict)
    callers: dict[str, CachedValues] = field(default_factory=dict)
    of_front: bool = False

    @classmethod
    def prepare(
        cls,
        recipe: Recipe,
        table: LatencyTable | None = None,
        *,
        loader: Loader = load,
        profile_limit_s: float | None = None,
        values: Mapping[str, Mapping[tuple[int, ...], float]] | None = None,
        dense: Path | None = None,
    ) -> Job:
        """Load a run's objects, trace the network, find the table, and refuse what cannot run here.

        Args:
            recipe: Resolved recipe.
            table: Latency table of the device, from the folder of a resumed run; None to measure or load it.
            loader: Loads the objects: those that the recipe names, or those of the caller.
            profile_limit_s: Time limit for measuring this machine if its table is unknown, in seconds; None for the
                default.
            values: Values that function budgets have returned in a resumed run, by budget and widths; the functions are
                not called again for these widths, because a noisy function would return another value.
            dense: Dense network's ONNX file of a resumed run; exported if it is missing.

        Raises:
            CompressorError: Something in the recipe is not available; the hint says how to fix it.
        """
        import torch

        from compressor.budgets.energy import find_meter
        from compressor.budgets.function import FunctionCaller
        from compressor.core.agents import agent_class
        from compressor.core.plugins import load_plugins
        from compressor.search.networks import methods
        from compressor.search.reward import soft_reward
        from compressor.search.sites import check_workers

        load_plugins()
        specs = budget_specs(recipe)
        notes: list[str] = []
        check_precision(recipe)
        provider_of(recipe).check_load(request_of(recipe))
        check_workers(recipe.search.workers, recipe.search.brief_iterations)
        _check_epochs(recipe)
        _check_quantized(recipe)
        _check_unlabelled(recipe)
        agent_class(recipe.agent)  # refuses an unknown one
        meter_of = find_meter(recipe.device, request_of(recipe)) if recipe.budgets.energy else None
        torch_device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = loader(recipe)
        recipe, model, example = loaded.recipe, loaded.model, loaded.task.example
        _check_head(recipe, model, loaded.task)
        notes += loaded.notes
        given = recipe.weights != "none" or not loaded.task.labelled
        teacher = copy.deepcopy(model).eval() if given else None
        _check_inputs(recipe, loaded.task)
        check_batch(recipe, loaded.task)
        depth_given = recipe.pruning.depth is not None
        recipe = with_depth(recipe)
        space = trace(recipe, model, example)
        dense_file = DenseFile(dense, recipe, model, loaded.task)
        if recipe.pruning.granularity == "measured":
            steps = provider_of(recipe).measured_steps(space, example, request_of(recipe))
            recipe = recipe.changed({"pruning": {"granularity": steps}})
            space = trace(recipe, model, example)
        if table is None and any(spec.name == "latency" for spec in specs):
            table = latency_table(recipe, space, example, profile_limit_s)
        if not depth_given and space.depth and not (table is not None and table.knows_blocks(space)):
            recipe = recipe.changed({"pruning": {"depth": "off"}})
            notes += _without_depth(space, table)
            space = trace(recipe, model, example)
        if not specs:
            notes.append("No budget was given: nothing is pruned. Give --latency, --flops, --params or --memory.")
        compensation = methods(recipe, space, loaded.task.calibration is not None)
        if compensation.note:
            notes.append(compensation.note)
        if recipe.pruning.importance == "auto":
            importance = "l1" if compensation.scored == "off" else "reconstruction"
            recipe = recipe.changed({"pruning": {"importance": importance}})
        _check_importance(recipe, loaded.task)
        model.to(torch_device)
        job = cls(
            recipe=recipe,
            model=model,
            teacher=teacher.to(torch_device) if teacher is not None else None,
            factory=loaded.factory,
            builder=loaded.builder,
            task=loaded.task,
            preprocessing=loaded.preprocessing,
            space=space,
            table=table,
            torch_device=torch_device,
            notes=notes,
            dense_file=dense_file,
            compensation=compensation,
            files=loaded.files,
            callers={
                spec.name: FunctionCaller(
                    spec.name, space, recipe.budgets.function_seconds, recipe.budgets.function_repeats
                )
                for spec in specs
                if spec.is_function
            },
        )
        if meter_of is not None:
            meter = meter_of(space)
            job.callers["energy"] = meter
            notes.append(f"Energy is that of one input, in total: {meter.source}.")
        for name, caller in job.callers.items():
            caller.known.update((values or {}).get(name, {}))
        soft_reward(reward_weights(recipe), job.budgets())
        return job

    @property
    def trained(self) -> bool:
        """Whether the dense network is trained as loaded: its weights are given, and its last layer is theirs."""
        return self.teacher is not None and not self.fresh_head

    @property
    def fresh_head(self) -> bool:
        """Whether the dense network was loaded with a new last layer."""
        return _fresh_head(self.recipe, self.model)

    @property
    def measurable(self) -> bool:
        """Whether the device can be measured from here: this machine, or reachable over ssh."""
        return provider_of(self.recipe).measures

    @property
    def metric(self) -> str:
        """Name of the score on the test split, for sentences."""
        name = self.task.metric.name
        return f"test {name}" if name == ACCURACY else name

    def tested(self, model: nn.Module) -> Examined:
        """Return a network's score on the test split, in the unit of the task's metric, and its answers."""
        return self.task.tested(model, self.goals, self.torch_device)

    def compute_shared(self) -> None:
        """Compute what all runs of a front need of the given weights; `within` hands it on."""
        self.goals  # noqa: B018  (cached)
        if self.teacher is not None:
            self.given  # noqa: B018

    def within(self, recipe: Recipe, table: LatencyTable | None, notes: Sequence[str] = ()) -> Job:
        """Return the same objects for one run of a front.

        Args:
            recipe: Its recipe, which differs from this one in the budgets.
            table: Latency table with which it begins or continues.
            notes: Further notes for the user.
        """
        other = copy.copy(self)  # also what is computed once
        other.recipe, other.table, other.notes = recipe, table, [*self.notes, *notes]
        other.of_front = True
        return other

    @cached_property
    def given(self) -> Examined:
        """The given dense network's result on the test split; computed once."""
        assert self.teacher is not None
        return self.tested(self.teacher)

    @cached_property
    def goals(self) -> Any:
        """What the test score compares with, if that is the dense network; computed once."""
        return self.task.test_goals(self.model if self.teacher is None else self.teacher, self.torch_device)

    def budgets(self, table: LatencyTable | None = None) -> list[Budget]:
        """Return the recipe's budgets in absolute numbers, by `table` or the job's own table.

        Raises:
            CompressorError: No widths can meet one of them, or none that the recipe's agent can choose.
        """
        from compressor.budgets.limits import reachable, resolve
        from compressor.core.agents import agent_class

        budgets = resolve(
            budget_specs(self.recipe), self.space, table or self.table, self.callers, device_precision(self.recipe)
        )
        reachable(budgets, self.space, None if _removes_blocks(self.recipe) else "knapsack")
        agent_class(self.recipe.agent)(settings=self.recipe.search.settings).check(self.space, budgets)
        return budgets

    @property
    def latency_budget(self) -> BudgetSpec | None:
        """The latency budget as requested; None without one."""
        return latency_budget(self.recipe)


def _check_epochs(recipe: Recipe) -> None:
    """Refuse to train nothing if nothing is trained."""
    if recipe.epochs == 0 and not recipe.pretrained and not recipe.own_network:
        raise CompressorError(
            f"With 0 epochs nothing is trained, and {recipe.model} has no weights.",
            "Give a state dict with --weights FILE, or --epochs 1 or more.",
        )


def _fresh_head(recipe: Recipe, model: nn.Module) -> bool:
    """Return whether loading gave a network a new last layer; what a Python program did with its own is not known."""
    from compressor.models.weights import FRESH_HEAD

    return not recipe.from_python and bool(getattr(model, FRESH_HEAD, False))


def _check_head(recipe: Recipe, model: nn.Module, task: Task) -> None:
    """Refuse to train nothing if the last layer is new."""
    if recipe.epochs == 0 and _fresh_head(recipe, model):
        raise CompressorError(
            f"With 0 epochs nothing is trained, and the last layer of {recipe.model} is new, for "
            f"{len(task.facts()['classes'])} classes.",
            "Train it with --epochs 1 or more, or give weights for these classes.",
        )


def _check_quantized(recipe: Recipe) -> None:
    """Refuse to fine-tune for INT8 where that cannot be."""
    if recipe.training.quantize == "no":
        return
    from compressor.training.fake_quantised import require_torchao

    if recipe.epochs == 0:
        raise CompressorError(
            f"training.quantize is {recipe.training.quantize}, and with 0 epochs nothing is trained.",
            "Give --epochs 1 or more, or leave it out.",
        )
    if processes() > 1:
        raise CompressorError(
            f"training.quantize is {recipe.training.quantize}, and {processes()} processes train: it takes one.",
            "Start one process, or leave it out.",
        )
    require_torchao()


def _check_unlabelled(recipe: Recipe) -> None:
    """Refuse what needs labels if the recipe's data has none."""
    if recipe.labelled:
        return
    if not recipe.pretrained and not recipe.own_network:
        raise CompressorError(
            f"{recipe.data.source} has no labels, and {recipe.model} has no trained weights to learn from.",
            "Give a state dict with --weights FILE.",
        )
    training = recipe.training.distill_weight == 0 and recipe.epochs
    for name, value in (
        ("search.measure: accuracy", recipe.search.measure == "accuracy"),
        ("search.epochs_share", recipe.search.epochs_share),
        ("search.brief_iterations", recipe.search.brief_iterations),
        ("training.label_smoothing", recipe.training.label_smoothing),
        ("training.distill_weight: 0", training),
    ):
        if value:
            raise CompressorError(f"{name} needs labels, and {recipe.data.source} has none.", "Leave it out.")


def _check_inputs(recipe: Recipe, task: Task) -> None:
    """Refuse what cannot be done with a network of several inputs."""
    if (count := len(tensors_in(task.example))) == 1:
        return
    provider = provider_of(recipe)
    for what, wanted in (
        ("INT8", {"int8", "mixed"} & {recipe.precision, *recipe.export.precisions}),
        ("A device over a network", provider.measures and not provider.is_here),
        ("An energy budget", recipe.budgets.energy is not None),
    ):
        if wanted:
            raise CompressorError(
                f"{what} takes networks of one input, and this one has {count}.",
                "Use fp32 or fp16, this machine or the table of a device, and other budgets.",
            )


def _check_importance(recipe: Recipe, task: Task) -> None:
    """Refuse a criterion whose data is missing."""
    chosen = recipe.pruning.importance
    if chosen == "taylor" and not task.labelled:
        raise CompressorError("pruning.importance is taylor, which needs labels.", "Choose l1 or reconstruction.")
    if chosen == "reconstruction" and task.calibration is None:
        raise CompressorError("pruning.importance is reconstruction, which needs inputs.", "Choose l1.")


def _without_depth(space: PruningSpace, table: LatencyTable | None) -> list[str]:
    """Say why no block of a network may be removed, if it has some."""
    if not space.blocks or table is None:
        return []
    return [
        f"Only channels are removed: the latency table of {table.device} was measured with all blocks. To let whole "
        "blocks go, too, measure the device again: compress profile."
    ]


def latency_budget(recipe: Recipe) -> BudgetSpec | None:
    """Return a recipe's latency budget; None if it has none."""
    return next((each for each in budget_specs(recipe) if each.name == "latency"), None)


def budget_specs(recipe: Recipe) -> Sequence[BudgetSpec]:
    """Parse a recipe's budgets.

    Raises:
        CompressorError: A budget is malformed; the message names the accepted forms.
    """
    from compressor.budgets.base import parse_budget, parse_named_budget

    specs = [parse_budget(name, text) for name, text in recipe.budgets.given().items()]
    return [*specs, *(parse_named_budget(text) for text in recipe.budgets.functions)]


def reward_weights(recipe: Recipe) -> dict[str, float]:
    """Return the weights of the reward's soft factors, by budget name."""
    weights = recipe.search.reward
    return {
        "latency": weights.latency, "macs": weights.flops, "params": weights.params, "memory": weights.memory
    }  # fmt: skip


def with_depth(recipe: Recipe) -> Recipe:
    """Let the search remove blocks where a latency is a budget, unless the recipe or its agent says otherwise."""
    if recipe.pruning.depth is not None:
        return recipe
    wanted = latency_budget(recipe) is not None and _removes_blocks(recipe)
    return recipe.changed({"pruning": {"depth": "auto" if wanted else "off"}})


def _removes_blocks(recipe: Recipe) -> bool:
    """Return whether a recipe's agent can remove whole blocks."""
    from compressor.core.agents import agent_class

    return bool(agent_class(recipe.agent).Settings(**recipe.search.settings).removes_blocks)


def trace(recipe: Recipe, model: nn.Module, example: tuple[Any, ...]) -> PruningSpace:
    """Trace a recipe's network, with the channel steps that suit its device if the recipe gives none.

    Raises:
        CompressorError: Nothing in the network can be pruned.
    """
    from compressor.pruning.space import PruningSpace

    pruning = recipe.pruning

    def traced(steps: int | dict[str, int]) -> PruningSpace:
        return PruningSpace(
            model,
            example,
            granularity=steps,
            min_width=pruning.min_share,
            frozen=pruning.frozen,
            scope=pruning.scope,
            depth=pruning.depth == "auto",
        )

    space = traced(1 if isinstance(pruning.granularity, str) else pruning.granularity)
    if pruning.granularity == "auto":
        space = traced(provider_of(recipe).steps(space.groups, device_precision(recipe)))
    if not space.groups:
        reasons = "; ".join(f"{part.name}: {part.reason}" for part in space.skipped[:5])
        raise CompressorError(
            f"Nothing in {recipe.model} can be pruned ({reasons}).", "See --dry-run for all parts."
        )
    return space
