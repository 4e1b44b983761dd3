"""What a recipe means on this machine: the network, its data, its pruning space, its budgets.

Everything that can be refused is refused here, before a run's folder appears.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.run.device import check_device, latency_table, runtime_of, steps_of
from compressor.run.trial import DenseFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from compressor.budgets.base import Budget
    from compressor.budgets.function import CachedValues
    from compressor.budgets.parse import BudgetSpec
    from compressor.data import DataBundle
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe


@dataclass
class Job:
    """A resolved recipe with everything loaded.

    Attributes:
        recipe: resolved; measured channel steps stand in it as numbers, so that a resumed run has the same.
        model: the dense network on `torch_device`; agents that train change its weights.
        teacher: the dense network as it was loaded, where it is pretrained; else None.
        factory: how to build the network anew, for the artefact.
        data: train, search and test splits.
        space: what may be removed from `model`.
        table: latency of the device; None where no latency budget asks for it.
        torch_device: where training runs, "cpu" or "cuda".
        notes: sentences that the user must see beside the numbers.
        dense_file: the dense network's ONNX file, until the run has it.
        callers: of the functions that are budgets and of energy, by name.
    """

    recipe: Recipe
    model: nn.Module
    teacher: nn.Module | None
    factory: dict[str, Any]
    data: DataBundle
    space: PruningSpace
    table: LatencyTable | None
    torch_device: str
    notes: list[str]
    dense_file: DenseFile
    callers: dict[str, CachedValues] = field(default_factory=dict)

    @property
    def measurable(self) -> bool:
        """Whether the device can be measured from here: it is this machine, or is reached over ssh."""
        return self.recipe.device == "local" or self.over_ssh

    @property
    def over_ssh(self) -> bool:
        """Whether the device is reached over ssh."""
        return self.recipe.device.startswith("ssh:")

    def budgets(self, table: LatencyTable | None = None) -> list[Budget]:
        """The budgets of the recipe in absolute numbers, by `table` or the job's own.

        Raises:
            CompressorError: one of them cannot be reached by any widths.
        """
        from compressor.budgets.resolve import reachable, resolve

        budgets = resolve(
            budget_specs(self.recipe), self.space, table or self.table, self.callers, self.recipe.precision
        )
        reachable(budgets, self.space)
        return budgets

    def latency_share(self, dense_ms: float) -> float | None:
        """The latency that is asked for as a share of the dense network's; None where none is asked for.

        Args:
            dense_ms: What the dense network takes on the quiet device: what milliseconds are a share of.
        """
        (asked,) = [each for each in budget_specs(self.recipe) if each.name == "latency"] or (None,)
        if asked is None or self.table is None:
            return None
        return asked.value if asked.relative else asked.value / dense_ms

    @property
    def asks_for_latency(self) -> bool:
        """Whether a latency is among the budgets."""
        return any(each.name == "latency" for each in budget_specs(self.recipe))

    @property
    def latency_in_ms(self) -> bool:
        """Whether a latency is asked for in milliseconds, not as a share."""
        return any(each.name == "latency" and not each.relative for each in budget_specs(self.recipe))


def budget_specs(recipe: Recipe) -> Sequence[BudgetSpec]:
    """The budgets of a recipe, parsed.

    Raises:
        CompressorError: one is malformed; the accepted forms are named.
    """
    from compressor.budgets.parse import parse_budget, parse_function_budget

    specs = [parse_budget(name, text) for name, text in recipe.budgets.given().items()]
    return [*specs, *(parse_function_budget(text) for text in recipe.budgets.functions)]


def reward_weights(recipe: Recipe) -> dict[str, float]:
    """The weights of the reward's soft factors by the names of the budgets."""
    weights = recipe.search.reward
    return {
        "latency": weights.latency, "macs": weights.flops, "params": weights.params, "memory": weights.memory
    }  # fmt: skip


def prepare(
    recipe: Recipe,
    table: LatencyTable | None = None,
    *,
    profile_limit_s: float | None = None,
    values: Mapping[str, Mapping[tuple[int, ...], float]] | None = None,
    dense: Path | None = None,
) -> Job:
    """Load and trace everything that a resolved recipe names.

    Args:
        recipe: resolved.
        table: the device's latency where it is known already, from the folder of the run that goes on.
        profile_limit_s: how long this machine may be measured where its table is not known; None is the usual.
        values: by budget and widths what functions have given already, in the run that goes on; they are not asked
            again for these, since a noisy one would answer otherwise.
        dense: where the run that goes on has the dense network's ONNX file; it is exported where that is missing.

    Raises:
        CompressorError: whatever in the recipe cannot be had, with the mend.
    """
    import torch

    from compressor.budgets.energy import EnergyMeter, find_counters
    from compressor.budgets.function import FunctionCaller
    from compressor.core.plugins import load_plugins
    from compressor.models import factory_of
    from compressor.run.inputs import load
    from compressor.search.registry import create_agent
    from compressor.search.reward import soft_reward
    from compressor.search.sites import check_workers

    load_plugins()
    specs = budget_specs(recipe)
    notes: list[str] = []
    check_device(recipe)
    check_workers(recipe.search.workers, recipe.search.brief_iterations)
    create_agent(recipe.agent, settings=recipe.search.settings)  # only to have its settings checked
    counters = find_counters(recipe.device) if recipe.budgets.energy else None
    torch_device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load(recipe)
    recipe, data, model = loaded.recipe, loaded.data, loaded.model
    notes += loaded.notes
    factory = factory_of(model)
    assert factory is not None  # create_model leaves it on every network
    teacher = copy.deepcopy(model).eval() if recipe.weights != "none" else None
    example = torch.zeros(1, *data.input_shape)
    space = trace(recipe, model, example)
    dense_file = DenseFile(dense, recipe, model, example)
    if recipe.pruning.granularity == "measured":
        recipe = recipe.changed({"pruning": {"granularity": steps_of(recipe, space, example)}})
        space = trace(recipe, model, example)
    if table is None and any(spec.name == "latency" for spec in specs):
        table = latency_table(recipe, space, example, profile_limit_s)
    if not specs:
        notes.append("No budget was given: nothing is pruned. Give --latency, --flops, --params or --memory.")
    model.to(torch_device)
    job = Job(
        recipe=recipe,
        model=model,
        teacher=teacher.to(torch_device) if teacher is not None else None,
        factory=factory,
        data=data,
        space=space,
        table=table,
        torch_device=torch_device,
        notes=notes,
        dense_file=dense_file,
        callers={
            spec.name: FunctionCaller(
                spec.name, space, recipe.budgets.function_seconds, recipe.budgets.function_repeats
            )
            for spec in specs
            if spec.is_function
        },
    )
    if counters is not None:
        job.callers["energy"] = EnergyMeter(space, counters, recipe.threads, recipe.export.opset)
    for name, caller in job.callers.items():
        caller.known.update((values or {}).get(name, {}))
    soft_reward(reward_weights(recipe), job.budgets())
    return job


def trace(recipe: Recipe, model: nn.Module, example: Tensor) -> PruningSpace:
    """The pruning space of a recipe's network, with the channel steps that suit its device where none are given.

    Raises:
        CompressorError: nothing in the network can be pruned.
    """
    from compressor.latency.devices import recommended_steps
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
        )

    space = traced(1 if isinstance(pruning.granularity, str) else pruning.granularity)
    if pruning.granularity == "auto":
        space = traced(recommended_steps(space.groups, runtime_of(recipe), recipe.precision))
    if not space.groups:
        reasons = "; ".join(f"{part.name}: {part.reason}" for part in space.skipped[:5])
        raise CompressorError(
            f"Nothing in {recipe.model} can be pruned ({reasons}).", "See --dry-run for all parts."
        )
    return space
