"""The recipe itself: a frozen, validated description of a whole run, and what follows from its fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from compressor.core.agents import agent_class, registry
from compressor.core.conditions import Conditions
from compressor.core.metrics import PYTHON, SCENES
from compressor.recipe.parts import (
    SEPARATOR,
    Budgets,
    Contract,
    Data,
    Export,
    Part,
    Positive,
    Pruning,
    Search,
    Training,
)
from compressor.recipe.validation import merged, validated
from compressor.recipe.yaml_text import write_yaml

SEARCH_RATES = {True: 0.01, False: 0.05}
"""Highest learning rate of the search, by whether the weights are pretrained; `FINETUNE_RATE` is fine-tuning's."""

FINETUNE_RATE = 0.02

OWN_RATES = {True: 0.002, False: 0.01}
"""The same for a loss of the user's own, whose scale is not known; by whether the weights are given. The first is also
fine-tuning's."""

CONTEXT_SIZE = 128
"""State size of the joint agent's environment model, as published."""

ADAMW_RATES = {True: 0.0001, False: 0.001}
"""The same for AdamW, whose steps do not grow with the gradient."""

WEIGHT_DECAYS = {"sgd": 1e-4, "adamw": 0.05}

ImageSize = Positive | Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
"""A square's side, or "HEIGHTxWIDTH"."""

AgentName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,99}$")]
"""Which agents there are is known where agents are: a name that none has is refused before a run begins."""


def _with_source(value: Any) -> Any:
    """Convert text alone to a part with that source."""
    if isinstance(value, str):
        return {"source": value}
    if not isinstance(value, (Mapping, Data)):
        raise ValueError("expected a source such as digits or folder:PATH, or fields such as source and mean")
    return value


class Recipe(Part):
    """A complete run: network, data, budgets and search."""

    model: str = Field(
        description="a torchvision name, timm:NAME, cifar_resnet20 to cifar_resnet110, FILE.onnx, or module:factory."
    )
    weights: str = Field(
        "default",
        description="default, none, or a file with a state dict. On digits default trains from scratch; for networks "
        "without published default weights (cifar_*, module:factory) it is none.",
    )
    data: Annotated[Data, BeforeValidator(_with_source)] = Field(
        Data(), description="Images and how they are prepared; text alone is the source, such as folder:PATH."
    )
    task: Literal["classification", "segmentation", "detection"] | None = Field(
        None,
        description="What the network does; by default that of the data: segmentation for masks:PATH, detection for "
        "coco:PATH, else classification. shapes has masks and boxes, so that the task has to be given.",
    )
    image_size: ImageSize | None = Field(
        None,
        description="Height and width of an input in pixels, 224 or 96x128; by default: 32 for digits, CIFAR and "
        "cifar_* networks; for a folder its images' own if they are small and equal; else that of the weights' "
        "training, or 224.",
    )
    device: str = Field("local", description="local, the name of a latency table, or ssh://user@host.")
    precision: Literal["auto", "fp32", "fp16", "int8", "mixed"] = Field(
        "auto",
        description="Precision on the device; auto is fp16, or the device's first precision if it does not run fp16, "
        "as on a CPU. mixed (here or over ssh) is fp32 (with TensorRT fp16) or int8 per layer, whichever is faster "
        "for its width; the search prices layers so, and shares of latency are those of the dense network in floats.",
    )
    threads: Positive = Field(
        1, description="Threads inside one operator where the device is this machine's CPU (ONNX Runtime's intra-op)."
    )
    batch: Annotated[int, Field(ge=1, le=4096)] = Field(
        1, description="Inputs of one run: the latency is that of the whole batch, and the ONNX files take this batch."
    )
    percentile: Annotated[float, Field(ge=50, le=99)] = Field(
        50,
        description="Percentile of single runs that is the latency: 50 for the median of an undisturbed device, as in "
        "99 for a time that one run in a hundred exceeds, other load included.",
    )
    streams: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Copies of the network that run at the same time; the latency is that of a run under this load."
    )
    agent: AgentName = Field(
        "joint",
        description="What decides the widths: the name of an agent of the toolkit (docs/method/agents.md), or of one "
        "that an installed package registers.",
    )
    accept_dense: bool = Field(
        False,
        description="Whether to continue with given weights that are no better than guessing, or far below their "
        "published accuracy.",
    )
    epochs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Total number of training epochs, search and fine-tuning together; by default: by the data. 0 "
        "trains nothing: a network with weights is only pruned and compensated.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of all random numbers.")
    track: Literal["none", "mlflow", "wandb"] = Field(
        "none",
        description="Tracker that the run's numbers are sent to as well, through its own client and as its environment "
        "variables say; TensorBoard's curves are written in any case.",
    )
    budgets: Budgets = Field(Budgets(), description="Limits of the slim network.")
    pruning: Pruning = Field(Pruning(), description="What may be removed.")
    search: Search = Field(Search(), description="Search for the widths.")
    training: Training = Field(Training(), description="How the weights are trained.")
    contract: Contract = Field(Contract(), description="How the latency target is verified by measurement.")
    export: Export = Field(Export(), description="Files for the device.")

    @model_validator(mode="after")
    def _settings_fit_the_agent(self) -> Recipe:
        if self.search.settings:  # an agent's module is only imported where it has to be
            agent_class(self.agent).Settings(**self.search.settings)
        return self

    @property
    def data_kind(self) -> str:
        """The data without its path: digits, cifar10, folder, masks, coco, shapes and so on, or python."""
        return self.data.source.partition(":")[0]

    @property
    def small_data(self) -> bool:
        """Whether the data comes with the toolkit: small pictures, on which networks are trained from scratch."""
        return self.data_kind in ("digits", "shapes")

    @property
    def classifies(self) -> bool:
        """Whether the network tells classes of whole images, and nothing else."""
        return self.task in (None, "classification")

    @property
    def own_network(self) -> bool:
        """Whether a function of the user's builds the network, which may give it trained weights."""
        return ":" in self.model and not self.model.startswith("timm:")

    @property
    def several(self) -> bool:
        """Whether the recipe asks for more than one run; see `recipe.targets`."""
        given = (*self.budgets.given().values(), *self.budgets.functions)
        return self.budgets.max_drop is not None or any(SEPARATOR in text for text in given)

    @property
    def onnx(self) -> bool:
        """Whether the network is an ONNX file, which has its weights."""
        return self.model.endswith(".onnx")

    @property
    def from_python(self) -> bool:
        """Whether network and data are objects of a Python program, which no file can name."""
        return self.data_kind == PYTHON

    @property
    def labelled(self) -> bool:
        """Whether the data that the recipe names has labels."""
        return self.data_kind != "images"

    @property
    def usual_rates(self) -> tuple[float, float]:
        """Highest learning rates of the search and of fine-tuning where the recipe gives none."""
        if self.training.optimizer == "adamw":
            return ADAMW_RATES[self.pretrained], ADAMW_RATES[True]
        if self.from_python:
            return OWN_RATES[self.pretrained], OWN_RATES[True]
        return SEARCH_RATES[self.pretrained], FINETUNE_RATE

    @property
    def conditions(self) -> Conditions:
        """The conditions under which networks are timed."""
        return Conditions(self.batch, self.percentile, self.streams)

    @property
    def label(self) -> str:
        """Name of the run's folder without its time."""
        if self.from_python:
            return self.model.removeprefix(f"{PYTHON}:")
        return f"{Path(self.model).stem if self.onnx else self.model}-{self.data_kind}"

    @property
    def pretrained(self) -> bool:
        """Whether the run starts from trained weights."""
        if self.onnx:
            return True
        unpublished = self.model.startswith("cifar_") or self.own_network
        return self.weights != "none" and not (
            self.weights == "default" and (self.small_data or unpublished)
        )

    def resolved(self) -> Recipe:
        """Return the same recipe with every field filled in that follows from others."""
        own = self.model.startswith("cifar_")
        small = self.data_kind in ("digits", "cifar10", "cifar100") or own
        scratch_epochs = {"digits": 20, "shapes": 20, "imagenet": 90}.get(self.data_kind, 60)
        pretrained = self.pretrained
        weights = self.weights if pretrained else "none"
        embedded = self.small_data
        # of digits, two batches rank plans as eight do (Spearman 0.98 to 1.00), at three quarters of the time of three
        norm_batches = 2 if self.data_kind == "digits" else 3 if embedded else 10
        batch_size = 32 if embedded else 128 if self._task() == "classification" else 16
        search_rate, finetune_rate = self.usual_rates
        share = self.search.epochs_share
        if not self.labelled and share is None:
            share = 0.0
        if share is None:
            share = 0.6 if not pretrained else 1 / 3 if self.agent == "joint" else 0.0
        precision = self.precision
        if precision == "auto":
            from export.device.here import gpu_backend

            precision = "fp32" if self.device == "local" and gpu_backend() is None else "fp16"
        return self.changed(
            {
                "weights": weights,
                "task": self._task(),
                "image_size": self.image_size or (32 if small else None),
                "precision": precision,
                "epochs": (scratch_epochs // 3 if pretrained else scratch_epochs)
                if self.epochs is None
                else self.epochs,
                "search": {
                    "epochs_share": share,
                    "batch_norm_batches": self.search.batch_norm_batches or norm_batches,
                    "context_size": self._context_size(),
                    "measure": self._measure(),
                },
                "training": {
                    "batch_size": self.training.batch_size or batch_size,
                    "mixed_precision": _own_precision()
                    if self.training.mixed_precision == "auto"
                    else self.training.mixed_precision,
                    "learning_rate": self.training.learning_rate or search_rate,
                    "finetune_learning_rate": self.training.finetune_learning_rate or finetune_rate,
                    "weight_decay": WEIGHT_DECAYS[self.training.optimizer]
                    if self.training.weight_decay is None
                    else self.training.weight_decay,
                },
            }
        )

    def _task(self) -> str:
        """Return the task: as given, or that of the data."""
        return self.task or SCENES.get(self.data_kind, "classification")

    def _measure(self) -> str:
        """Return what scores candidates; what a Python program gives stays automatic."""
        if self.search.measure == "auto" and not self.from_python and self._task() == "classification":
            return "accuracy" if self.labelled else "closeness"
        return self.search.measure

    def _context_size(self) -> int | None:
        """Return the environment model's size; None for other agents, so that a joint one can set it later."""
        given = self.search.context_size
        return CONTEXT_SIZE if given is None and self.agent == "joint" else given

    def changed(self, overrides: Mapping[str, Any], source: str = "the command line") -> Recipe:
        """Return the recipe with some fields replaced; nested parts are merged field by field.

        Raises:
            CompressorError: An override does not fit its field.
        """
        plain = dict(overrides)
        if isinstance(plain.get("data"), str):  # a source alone leaves the preprocessing as it is
            plain["data"] = _with_source(plain["data"])
        return validated(Recipe, merged(self.model_dump(mode="json"), plain), source)

    def placed(self, base: Path) -> Recipe:
        """Return the recipe with whole paths, so that it is the same from any folder; relative ones begin at `base`."""
        changes: dict[str, Any] = {}
        kind, _, where = self.data.source.partition(":")
        if kind in _PLACED and where:
            changes["data"] = {"source": f"{kind}:{_whole(where, base)}"}
        if not self.from_python and self.weights not in ("default", "none"):
            changes["weights"] = _whole(self.weights, base)
        if self.onnx:
            changes["model"] = _whole(self.model, base)
        return self.changed(changes) if changes else self

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `load_recipe` reads back as the same recipe."""
        return write_yaml(self.model_dump(mode="json"))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with the settings of each agent under `search.settings`."""
    schema = Recipe.model_json_schema()
    schema["properties"]["agent"]["examples"] = registry.names()
    schema["allOf"] = []
    for name in registry.names():
        schema["$defs"][f"{name}_settings"] = agent_class(name).Settings.model_json_schema()
        settings = {"properties": {"settings": {"$ref": f"#/$defs/{name}_settings"}}}
        chosen = {"properties": {"agent": {"const": name}}, "required": ["agent"]}
        if name == Recipe.model_fields["agent"].default:
            del chosen["required"]
        schema["allOf"].append({"if": chosen, "then": {"properties": {"search": settings}}})
    return schema


_PLACED = ("cifar10", "cifar100", "folder", "imagenet", "images", "masks", "coco")
"""Kinds of data that lie at a path."""


def _whole(path: str, base: Path) -> str:
    return str(base / Path(path).expanduser())


CPU_INFO = Path("/proc/cpuinfo")


def _own_precision(cpu_info: Path | None = None) -> str:
    """Return bf16 if this CPU has matrix units for it (AMX), which make training about three times as fast; else no.

    avx512_bf16 alone does not count: with its dot products a training step took 1.0 to 1.7 times as long as in float32.

    Args:
        cpu_info: Linux's description of the CPU; if it cannot be read, the result is no. None for `CPU_INFO`.
    """
    try:
        content = (cpu_info or CPU_INFO).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no"
    flags = {flag for line in content.splitlines() if line.startswith("flags") for flag in line.split()}
    return "bf16" if "amx_bf16" in flags else "no"
