"""A recipe's objects on this machine: network, data, pruning space and budgets.

Every invalid request is rejected here, before the run's folder is created.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import replacing
from compressor.core.progress import say
from compressor.latency.networks import with_distinct_weights
from compressor.run.device import latency_table, opset_of, provider_of, request_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from compressor.budgets.base import Budget, BudgetSpec, CachedValues
    from compressor.data import DataBundle, Preprocessing
    from compressor.latency.table import LatencyTable
    from compressor.models import Published
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe
    from compressor.search.networks import Methods


class DenseFile:
    """ONNX file of a run's dense network: in a temporary folder until the run has one.

    It is exported before anything is measured or searched, so that failures show within seconds.

    Args:
        known: File of a resumed run; nothing is exported if it exists.
        recipe, model, example: Network and a batch of one input.

    Raises:
        CompressorError: The network cannot be exported, or the file's outputs differ from the network's.
    """

    def __init__(self, known: Path | None, recipe: Recipe, model: nn.Module, example: Tensor) -> None:
        self._path: Path | None = None
        if known is None or not known.exists():
            folder = tempfile.mkdtemp(prefix="compressor-dense-")
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._path = Path(folder) / "dense.onnx"
            self._write(self._path, recipe, model, example)

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
    def _write(path: Path, recipe: Recipe, model: nn.Module, example: Tensor) -> None:
        from export.convert.to_onnx import export_onnx
        from export.errors import ExportError

        try:
            export_onnx(with_distinct_weights(model), example, path, opset=opset_of(recipe))
        except ExportError as error:
            raise CompressorError(
                f"{recipe.model} cannot be exported, and neither could a slim network of it: {error.message}",
                error.hint,
            ) from error


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
        compensation: How candidates and the delivered network are compensated.
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
    compensation: Methods
    callers: dict[str, CachedValues] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
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
        from compressor.search.networks import methods
        from compressor.search.reward import soft_reward
        from compressor.search.sites import check_workers

        load_plugins()
        specs = budget_specs(recipe)
        notes: list[str] = []
        provider_of(recipe).check(recipe.precision)
        check_workers(recipe.search.workers, recipe.search.brief_iterations)
        _check_epochs(recipe)
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
        compensation = methods(recipe, space, example)
        if compensation.note:
            notes.append(compensation.note)
        if recipe.pruning.importance == "auto":
            importance = "l1" if compensation.scored == "off" else "reconstruction"
            recipe = recipe.changed({"pruning": {"importance": importance}})
        model.to(torch_device)
        job = cls(
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
            compensation=compensation,
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

    @property
    def trained(self) -> bool:
        """Whether the dense network is trained as loaded: its weights are given, and its last layer is theirs."""
        from compressor.models.weights import FRESH_HEAD

        return self.teacher is not None and not getattr(self.teacher, FRESH_HEAD, False)

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


@dataclass(frozen=True)
class Loaded:
    """Result of `load`.

    Attributes:
        recipe: Recipe with image size and preprocessing filled in.
        data: Images, prepared for the network.
        model: Network in training mode on the CPU.
        notes: Notes for the user, such as an assumed preprocessing.
    """

    recipe: Recipe
    data: DataBundle
    model: nn.Module
    notes: tuple[str, ...]


def load(recipe: Recipe, weights: str | None = None) -> Loaded:
    """Load the images and the network of a resolved recipe.

    Args:
        recipe: Resolved recipe.
        weights: Weights used instead of the recipe's; the images are still prepared for the recipe's weights.

    Raises:
        CompressorError: A part is not available, or the network takes images with another number of channels.
    """
    import torch

    from compressor.models import create_model, input_channels

    data = load_images(recipe)
    torch.manual_seed(recipe.seed)
    said: list[str] = []
    model = create_model(
        recipe.model, data.num_classes, weights or recipe.weights, data.input_shape, said.append
    )
    for sentence in said:
        say(sentence)
    channels = input_channels(model, data.input_shape)
    if channels != data.preprocessing.channels:
        order = "grey" if channels == 1 else "rgb"
        if recipe.data.channel_order is not None:
            raise CompressorError(
                f"{recipe.model} takes images of {channels} channel{'s' if channels > 1 else ''}, but "
                f"data.channel_order is {recipe.data.channel_order}.",
                f"Omit it, or set it to {order}.",
            )
        data = data.prepared(_wanted(recipe, order).at(data.preprocessing.size))
    notes = (*data.notes, *said, *_assumed(recipe, data.preprocessing))
    return Loaded(_completed(recipe, data.preprocessing), data, model, notes)


def load_images(recipe: Recipe) -> DataBundle:
    """Load the images of a resolved recipe, prepared as it says; in color unless it says that they are gray."""
    from compressor.data import load_data

    return load_data(recipe.data.source, seed=recipe.seed, wanted=_wanted(recipe, recipe.data.channel_order))


def described(recipe: Recipe, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return a preprocessing and its origin for the manifest."""
    usual = _usual(recipe)
    mine = preprocessing.to_dict()
    theirs = _wanted(recipe.changed({"data": _UNSAID}), preprocessing.channel_order).at(preprocessing.size)
    other = [
        name for name, value in theirs.to_dict().items() if value != mine[name] and name != "resize_size"
    ]
    origin = "assumed: usual for ImageNet" if usual is None else usual.origin
    if other:
        origin += f"; {', '.join(other)} set by the recipe"
    return {**mine, "origin": origin}


_UNSAID = {"mean": None, "std": None, "crop_share": None, "interpolation": None, "range": 1}


def _usual(recipe: Recipe) -> Published | None:
    """Return what is published about a recipe's weights; None if the network is not from a library."""
    from compressor.models import published

    return published(recipe.model) if recipe.weights != "none" else None


def _wanted(recipe: Recipe, channel_order: str | None) -> Any:
    from compressor.data import Preprocessing, Wanted

    usual, data = _usual(recipe), recipe.data
    return Wanted(
        usual=Preprocessing(**usual.preprocessing) if usual is not None else Preprocessing(),
        image_size=recipe.image_size,
        mean=data.mean,
        std=data.std,
        crop_share=data.crop_share,
        interpolation=data.interpolation,
        channel_order=channel_order,
        range=data.range,
    )


def _completed(recipe: Recipe, preprocessing: Preprocessing) -> Recipe:
    """Return the recipe with explicit preprocessing values, so that images are prepared alike on every machine."""
    return recipe.changed(
        {
            "image_size": preprocessing.size,
            "data": {
                "mean": preprocessing.mean,
                "std": preprocessing.std,
                "crop_share": preprocessing.crop_share,
                "interpolation": preprocessing.interpolation,
                "channel_order": preprocessing.channel_order,
                "range": preprocessing.range,
            },
        }
    )


def _assumed(recipe: Recipe, preprocessing: Preprocessing) -> Iterator[str]:
    """Yield a note if nothing says how the images for the weights were prepared.

    The note depends on the numbers alone, not on their origin: a resumed run, whose recipe has them all, gets the same.
    """
    usual = _usual(recipe)
    given = recipe.weights not in ("none", "default")
    if not given and (usual is not None or not recipe.own_network or recipe.data_kind == "digits"):
        return
    expected = _wanted(recipe.changed({"data": _UNSAID}), preprocessing.channel_order).at(preprocessing.size)
    if (preprocessing.mean, preprocessing.std) != (expected.mean, expected.std):
        return
    whose = recipe.weights if given else recipe.model
    source = (
        "the usual ImageNet values are assumed" if usual is None else f"the values of {usual.origin} are used"
    )
    yield (
        f"{whose} does not say how its images were prepared: {source}, {preprocessing.describe()}. "
        "Change it with --mean, --std, --set data.crop_share=... and data.interpolation=...."
    )
