"""A recipe's objects on this machine: network, data, pruning space and budgets.

Every invalid request is rejected here, before the run's folder is created.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.run.device import latency_table, provider_of, request_of
from compressor.run.trial import DenseFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from compressor.budgets.base import Budget, BudgetSpec, CachedValues
    from compressor.data import DataBundle
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe


@dataclass
class Job:
    """A resolved recipe with everything loaded.

    Attributes:
        recipe: Resolved recipe, with measured channel steps as numbers, so that a resumed run has the same steps.
        model: Dense network on `torch_device`; agents that train change its weights.
        teacher: Dense network as loaded, if it is pretrained; else None.
        factory: Function that rebuilds the network for the artifact.
        data: Train, search and test splits.
        space: Prunable channels of `model`.
        table: Latency table of the device; None if no latency budget needs it.
        torch_device: Device for training, "cpu" or "cuda".
        notes: Sentences that the user must see beside the numbers.
        dense_file: ONNX file of the dense network, until the run has it.
        callers: Callers of function and energy budgets, by name.
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
        """Whether the device can be measured from here: this machine, or reachable over ssh."""
        return provider_of(self.recipe).measures

    def budgets(self, table: LatencyTable | None = None) -> list[Budget]:
        """Return the recipe's budgets in absolute numbers, by `table` or the job's own table.

        Raises:
            CompressorError: No widths can meet one of them.
        """
        from compressor.budgets.limits import reachable, resolve

        budgets = resolve(
            budget_specs(self.recipe), self.space, table or self.table, self.callers, self.recipe.precision
        )
        reachable(budgets, self.space)
        return budgets

    def latency_share(self, dense_ms: float) -> float | None:
        """Return the latency target as a share of the dense network's latency; None without a target.

        Args:
            dense_ms: Latency of the dense network on the quiet device, in milliseconds.
        """
        (asked,) = [each for each in budget_specs(self.recipe) if each.name == "latency"] or (None,)
        if asked is None or self.table is None:
            return None
        return asked.value if asked.relative else asked.value / dense_ms

    @property
    def asks_for_latency(self) -> bool:
        """Whether one of the budgets is a latency."""
        return any(each.name == "latency" for each in budget_specs(self.recipe))

    @property
    def latency_in_ms(self) -> bool:
        """Whether the latency budget is in milliseconds rather than a share."""
        return any(each.name == "latency" and not each.relative for each in budget_specs(self.recipe))


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
        recipe: Resolved recipe.
        table: Latency table of the device, from the folder of a resumed run; None to measure or load it.
        profile_limit_s: Time limit for measuring this machine if its table is unknown, in seconds; None for the
            default.
        values: Values that function budgets have returned in a resumed run, by budget and widths; the functions are
            not called again for these widths, because a noisy function would return another value.
        dense: Dense network's ONNX file of a resumed run; exported if it is missing.

    Raises:
        CompressorError: Something in the recipe is not available; the hint says how to fix it.
    """
    import torch

    from compressor.budgets.energy import EnergyMeter, find_counters
    from compressor.budgets.function import FunctionCaller
    from compressor.core.agents import agent_class
    from compressor.core.plugins import load_plugins
    from compressor.models import factory_of
    from compressor.run.inputs import load
    from compressor.search.reward import soft_reward
    from compressor.search.sites import check_workers

    load_plugins()
    specs = budget_specs(recipe)
    notes: list[str] = []
    provider_of(recipe).check(recipe.precision)
    check_workers(recipe.search.workers, recipe.search.brief_iterations)
    agent_class(recipe.agent)  # refuses an unknown one
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
        steps = provider_of(recipe).measured_steps(space, example, request_of(recipe))
        recipe = recipe.changed({"pruning": {"granularity": steps}})
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
        )

    space = traced(1 if isinstance(pruning.granularity, str) else pruning.granularity)
    if pruning.granularity == "auto":
        space = traced(provider_of(recipe).steps(space.groups, recipe.precision))
    if not space.groups:
        reasons = "; ".join(f"{part.name}: {part.reason}" for part in space.skipped[:5])
        raise CompressorError(
            f"Nothing in {recipe.model} can be pruned ({reasons}).", "See --dry-run for all parts."
        )
    return space
