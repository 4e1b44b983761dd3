"""The recipe: a frozen, validated description of a whole run.

A recipe is read from YAML or built from flags, and its fields are the documentation of both. `resolved()`
fills in what depends on other fields, so that the `recipe.yaml` of a run's folder repeats the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import CompressorError

AgentName = Literal["joint", "constrained", "stepwise", "knapsack", "uniform", "random"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Budgets(_Part):
    """What the slim network must keep; all that are given must hold. Percentages are of the dense network."""

    latency: str | None = Field(None, description="One input's latency on the device: 5ms, 50% or 0.5x.")
    flops: str | None = Field(None, description="Multiply-adds as fvcore counts them: 50%, 0.5x or 2G.")
    params: str | None = Field(None, description="Parameters: 30%, 0.3x or 8M.")
    memory: str | None = Field(None, description="Weights and peak activations: 50%, 0.5x or 20MB.")
    energy: str | None = Field(
        None, description="Energy of one input, where this machine's CPU reports it: 5mJ, 50% or 0.5x."
    )
    functions: tuple[str, ...] = Field(
        (), description="Python functions of the slim network or its plan: package.module:function<=VALUE."
    )
    function_seconds: float = Field(
        60.0, gt=0, description="How long a function may take for one network before it is stopped."
    )
    function_repeats: Positive = Field(
        1, description="Calls of a function for each network, of which the median counts; for noisy ones."
    )

    def given(self) -> dict[str, str]:
        """The built-in budgets that were asked for: name -> text."""
        names = ("latency", "flops", "params", "memory", "energy")
        return {name: text for name in names if (text := getattr(self, name))}


class Pruning(_Part):
    """What may be removed."""

    scope: Literal["all", "inner"] = Field(
        "all", description="all: residual-coupled channels too; inner: only those within a block."
    )
    granularity: Literal["auto", "measured"] | Positive | dict[str, Positive] = Field(
        "auto",
        description="Channel counts are multiples of this, for all groups or by pattern of their names; auto takes "
        "what the device computes best, measured the steps after which latency jumps on this machine.",
    )
    min_share: Share = Field(0.1, description="The smallest share of its channels that a group may keep.")
    frozen: tuple[str, ...] = Field(
        (), description="Patterns (as in a shell) of layers that stay as they are."
    )
    importance: Literal["l1", "l2", "bn", "taylor", "fpgm", "random"] = Field(
        "l1", description="How the channels of a group are ranked."
    )


class RewardWeights(_Part):
    """Exponents of the reward's soft factors: accuracy * (cost / its budget) ** weight. A negative one pays for a
    network that is cheaper than its budget asks; 0 leaves the cost out."""

    latency: float = Field(0.0, le=0, ge=-10, description="Weight of the latency, as in -0.07.")
    flops: float = Field(0.0, le=0, ge=-10, description="Weight of the multiply-adds.")
    params: float = Field(0.0, le=0, ge=-10, description="Weight of the parameters.")
    memory: float = Field(0.0, le=0, ge=-10, description="Weight of the memory.")


class Search(_Part):
    """How the widths are looked for."""

    epochs_share: Share | None = Field(
        None,
        description="Share of the epochs that the dense weights are trained for, while or before the widths are "
        "looked for; the slim network has the rest. Left out: 0.6 from scratch; of pretrained weights a third for "
        "agents that train jointly, none for others.",
    )
    max_evaluations: Positive = Field(200, description="The most networks that may be scored.")
    max_seconds: float | None = Field(None, gt=0, description="The longest time that the search may take.")
    workers: Positive | Annotated[str, Field(pattern=r"^(\d+|ray://\S+)$")] = Field(
        1,
        description="Processes that score candidates side by side: a number, or ray://host:port for a Ray cluster.",
    )
    threads: Positive | None = Field(
        None,
        description="Threads that score one candidate. Accuracies agree to the last digit between numbers of workers "
        "where this agrees; left out: all cores for one worker, the cores shared out for several, one on Ray.",
    )
    evaluation_seconds: float = Field(
        1800.0,
        gt=0,
        description="The longest that a worker may take for one candidate before it is replaced.",
    )
    batch_norm_batches: Positive | None = Field(
        None,
        description="Batches of 128 from which batch-norm statistics are re-estimated before a network is scored; "
        "left out: 3 on digits, else 10.",
    )
    search_images: Positive | None = Field(
        2000, description="The most images of the search split that score a network; null for all of them."
    )
    brief_iterations: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Training steps on each candidate before it is scored, from the dense weights each time; for "
        "budgets at which networks that are only cut all score near chance. Needs one worker.",
    )
    reward: RewardWeights = Field(
        RewardWeights(),
        description="Soft factors of the reward; each needs a budget of its name, which may be 100%.",
    )
    align: Literal["tensor", "channel"] = Field(
        "tensor", description="Form of the joint agent's alignment term."
    )
    align_weight: float = Field(1e-4, ge=0, description="Weight of the alignment term; 0 turns it off.")
    context_size: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Numbers of the joint agent's learned state of the changing reward (the paper: 128); 0 for none.",
    )
    settings: dict[str, int | float | bool | str | tuple[int, ...]] = Field(
        {}, description="Numbers of the agent's method that differ from its own defaults (docs/agents.md)."
    )


class Training(_Part):
    """How the weights are trained; fields left out follow from the data and from the weights at the start."""

    batch_size: Positive | None = Field(None, description="Images in a training step.")
    learning_rate: float | None = Field(None, gt=0, description="Highest learning rate of the first phase.")
    finetune_learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate of fine-tuning."
    )
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty on the weights.")
    schedule: Literal["cosine", "step"] = Field(
        "cosine", description="How the learning rate falls: cosine, or a tenth at 50 % and again at 75 %."
    )
    one_schedule: bool = Field(
        False,
        description="Whether search and fine-tuning share one schedule of learning_rate; else fine-tuning has its own.",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Exponential moving average of the weights, such as 0.99; 0 turns it off."
    )
    distill_weight: Share = Field(
        0.5, description="Share of the distillation loss in fine-tuning; 0 turns it off."
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto",
        description="Precision of the training steps; auto is bf16 on CPUs that multiply in it, else no.",
    )


class Contract(_Part):
    """How the promise in milliseconds is kept."""

    margin: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.03,
        description="The search aims this share below the latency target, so that noise does not break it.",
    )
    max_rounds: Positive = Field(
        4,
        description="The most measurements of plans; until then a latency that is missed, or kept by far, sends the "
        "search on.",
    )
    repeats: Positive = Field(
        5, description="Measurements of one network; the median of their medians counts."
    )


class Export(_Part):
    """What is written for the device."""

    opset: Annotated[int, Field(ge=13, le=20)] = Field(17, description="ONNX operator set.")
    tolerance: float = Field(1e-4, gt=0, description="Largest difference allowed between ONNX and torch.")
    max_drop: float = Field(1.0, ge=0, lt=100, description="Points of accuracy that fp16 or int8 may lose.")
    engine: bool = Field(True, description="Whether to build an engine where a builder is installed.")


class Recipe(_Part):
    """A whole run: which network, on which data, within which budget, found how."""

    model: str = Field(
        description="a torchvision name, timm:NAME, cifar_resnet20 to cifar_resnet110, or module:factory."
    )
    weights: str = Field(
        "default",
        description="default, none, or a file with a state dict. On digits, default trains from scratch.",
    )
    data: str = Field(
        "digits", description="digits, cifar10[:PATH], cifar100[:PATH], folder:PATH or imagenet:PATH."
    )
    image_size: Positive | None = Field(
        None,
        description="Height and width of an input in pixels; left out: 32 for digits and CIFAR, "
        "224 for ImageNet, for a folder its images' own.",
    )
    device: str = Field("local", description="local, the name of a latency table, or ssh://user@host.")
    precision: Literal["auto", "fp32", "fp16", "int8"] = Field(
        "auto", description="Precision on the device; auto is fp32 on a CPU and fp16 elsewhere."
    )
    threads: Positive = Field(1, description="Threads of the runtime where the device is this machine's CPU.")
    agent: AgentName = Field("joint", description="What decides the widths.")
    epochs: Positive | None = Field(
        None, description="All the training there is, search and fine-tuning together; left out: by the data."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of everything random.")
    budgets: Budgets = Field(Budgets(), description="What the slim network must keep.")
    pruning: Pruning = Field(Pruning(), description="What may be removed.")
    search: Search = Field(Search(), description="How the widths are looked for.")
    training: Training = Field(Training(), description="How the weights are trained.")
    contract: Contract = Field(Contract(), description="How the latency promise is kept.")
    export: Export = Field(Export(), description="What is written for the device.")

    @property
    def data_kind(self) -> str:
        """The data without its path: digits, cifar10, cifar100, folder or imagenet."""
        return self.data.partition(":")[0]

    @property
    def pretrained(self) -> bool:
        """Whether the run starts from trained weights."""
        return self.weights != "none" and not (self.weights == "default" and self.data_kind == "digits")

    def resolved(self) -> Recipe:
        """The same recipe with every field filled in that follows from others."""
        own = self.model.startswith("cifar_")
        small = self.data_kind in ("digits", "cifar10", "cifar100") or own
        scratch_epochs = {"digits": 20, "imagenet": 90}.get(self.data_kind, 60)
        weights = "none" if not self.pretrained else self.weights
        if weights == "default" and own:
            weights = "none"  # nobody publishes weights for these under a name that could be fetched
        pretrained = weights != "none"
        digits = self.data_kind == "digits"
        share = self.search.epochs_share
        if share is None:
            share = 0.6 if not pretrained else 1 / 3 if self.agent == "joint" else 0.0
        precision = self.precision
        if precision == "auto":
            from export.here import gpu_backend

            precision = "fp32" if self.device == "local" and gpu_backend() is None else "fp16"
        return self.changed(
            {
                "weights": weights,
                "image_size": self.image_size
                or (32 if small else 224 if self.data_kind == "imagenet" else None),
                "precision": precision,
                "epochs": self.epochs or (scratch_epochs // 3 if pretrained else scratch_epochs),
                "search": {
                    "epochs_share": share,
                    "batch_norm_batches": self.search.batch_norm_batches or (3 if digits else 10),
                },
                "training": {
                    "batch_size": self.training.batch_size or (32 if digits else 128),
                    "mixed_precision": _own_precision()
                    if self.training.mixed_precision == "auto"
                    else self.training.mixed_precision,
                    "learning_rate": self.training.learning_rate or (0.01 if pretrained else 0.05),
                    "finetune_learning_rate": self.training.finetune_learning_rate or 0.02,
                },
            }
        )

    def changed(self, overrides: Mapping[str, Any], source: str = "the command line") -> Recipe:
        """The recipe with some fields replaced; nested parts are merged field by field.

        Raises:
            CompressorError: an override does not fit its field.
        """
        return parse_recipe(_merged(self.model_dump(mode="json"), overrides), source)

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back as the same recipe."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _own_precision() -> str:
    """bf16 where this CPU has instructions for it: training is about three times as fast then."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "no"
    return "bf16" if "amx_bf16" in flags or "avx512_bf16" in flags else "no"


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        inside = merged.get(key)
        merged[key] = (
            _merged(inside, value) if isinstance(value, Mapping) and isinstance(inside, Mapping) else value
        )
    return merged


def parse_recipe(fields: Mapping[str, Any], source: str) -> Recipe:
    """Validate the fields of a recipe.

    Raises:
        CompressorError: every field that is wrong is named, with `source`, what came and what was expected.
    """
    try:
        return Recipe.model_validate(dict(fields))
    except ValidationError as error:
        problems = "; ".join(_explained(problem) for problem in error.errors())
        raise CompressorError(
            f"{source}: {problems}.", "The fields are listed by: compress recipes --schema"
        ) from None


def _explained(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(problem["loc"][-1]), _field_names(problem["loc"][:-1]), n=3, cutoff=0.5
        )
        return f"unknown field {where!r}" + (f" (did you mean {' or '.join(near)}?)" if near else "")
    if problem["type"] == "missing":
        return f"field {where!r} is missing"
    return f"field {where!r} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _field_names(location: Iterable[Any]) -> list[str]:
    part: type[BaseModel] = Recipe
    for name in location:
        annotation = part.model_fields[str(name)].annotation if str(name) in part.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        part = annotation
    return list(part.model_fields)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe's YAML file.

    Raises:
        CompressorError: the file is missing or no YAML, or a field is wrong (file and field are named).
    """
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressorError(
            f"The recipe {path} does not exist.", "List the shipped ones with: compress recipes"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CompressorError(
            f"The recipe {path} cannot be read as YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(fields, dict):
        raise CompressorError(
            f"The recipe {path} holds {type(fields).__name__}, expected fields such as 'model: resnet50'."
        )
    return parse_recipe(fields, str(path))


def shipped(folder: str) -> Path:
    """Where `recipes` or `latency_tables` lie: in the installed package, or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    inside = here / f"_{folder}"
    return inside if inside.is_dir() else here.parent / folder


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the toolkit: name -> file; those of a sub-folder are FOLDER/NAME and come last."""
    folder = shipped("recipes")
    found = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml")]
    return {
        path.as_posix(): folder / path.with_suffix(".yaml")
        for path in sorted(found, key=lambda path: (len(path.parts), path.as_posix()))
    }


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by a shipped one's name.

    Raises:
        CompressorError: there is none; the nearest names are given.
    """
    path = Path(name)
    if path.exists():
        return path
    known = shipped_recipes()
    wanted = name.removesuffix(".yaml")
    for candidate in (wanted, path.stem):
        if candidate in known:
            return known[candidate]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or sorted(known)[:5]
    raise CompressorError(
        f"There is no recipe {name!r}.", f"Nearest: {', '.join(near)}. All: compress recipes"
    )
