"""The parts of a recipe: budgets, pruning, search, training, contract and export."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from compressor.recipe.validation import setting_error

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class AgentSettings(Part):
    """Base class of an agent's settings, `search.settings` of a recipe; every field has a default.

    A whole number counts as a number; nothing else is converted.

    Raises:
        CompressorError: A setting is unknown, or has the wrong type or a value out of its range.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @property
    def removes_blocks(self) -> bool:
        """Whether the agent may remove whole blocks where the recipe does not say so."""
        return True

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise setting_error(type(self), values, error) from None

    def scored_plans(self, most: int, *, joint_epochs: int, groups: int) -> int:
        """Return how many plans a search scores: at most `most`, and a setting `evaluations` says fewer.

        Args:
            most: Limit of the search.
            joint_epochs: Epochs that are trained while it searches.
            groups: Number of groups of the network.
        """
        return min(most, int(getattr(self, "evaluations", most)))


class NoSettings(AgentSettings):
    """Settings of agents without any."""


def _numbers(value: Any) -> Any:
    """Parse a list of numbers from a flag: "0.5,0.5,0.5", or a single number for every channel."""
    if isinstance(value, str) and value.isascii():
        return [part.strip() for part in value.strip("[]()").split(",")]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Numbers = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False)], ...],
    BeforeValidator(_numbers),
    Field(min_length=1, max_length=4),
]


class Data(Part):
    """Data for training and test, and its preprocessing. Fields without a value follow the preprocessing of the weights
    as published by timm or torchvision, else the usual one for ImageNet."""

    source: str = Field(
        "digits",
        description="digits, cifar10[:PATH], cifar100[:PATH], folder:PATH, imagenet:PATH; images:PATH, any tree of "
        "pictures without labels; masks:PATH, classes of pixels; coco:PATH, boxes; or shapes[:NUMBER], drawn ones."
    )
    mean: Numbers | None = Field(
        None, description="Mean of each channel, as in 0.485,0.456,0.406; one number for all channels alike."
    )
    std: Numbers | None = Field(None, description="Standard deviation of each channel, as mean.")
    crop_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Share of the scaled short side that the centre crop keeps: 0.875 scales to 256 for 224 pixels.",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        None, description="How images are scaled."
    )
    channel_order: Literal["rgb", "bgr", "grey"] | None = Field(
        None, description="Order of the channels; left out, grey for networks of one channel, else rgb."
    )
    range: Literal[1, 255] = Field(
        1, description="Largest value of a pixel before the mean is subtracted, and scale of mean and std."
    )

    @model_validator(mode="after")
    def _on_one_scale(self) -> Data:
        if self.mean is not None and not all(0 <= value <= self.range for value in self.mean):
            raise ValueError(
                f"data.mean is {self.mean}, expected from 0 to {self.range}; for pixels on the scale 0..255 give "
                "data.range=255 too"
            )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"data.std is {self.std}, expected above 0")
        return self


def _joined(value: Any) -> Any:
    """Write a list of limits as a flag has it: "70%,50%"."""
    several = isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value)
    return SEPARATOR.join(value) if several else value



SEPARATOR = ","
"""Between several limits of one budget."""

Limits = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[str])]
"""One limit, or several between commas: each is for a network of its own."""


class Budgets(Part):
    """Limits of the slim network; all given ones must be met. Percentages are relative to the dense network. Several
    limits of one budget, as in 70%,50%,35% or as a list, are for as many networks of one search."""

    latency: Limits | None = Field(
        None, description="Latency of one run (of a batch) on the device: 5ms, 50% or 0.5x."
    )
    flops: Limits | None = Field(None, description="Multiply-adds as fvcore counts them: 50%, 0.5x or 2G.")
    params: Limits | None = Field(None, description="Parameters: 30%, 0.3x or 8M.")
    memory: Limits | None = Field(None, description="Weights and peak activations: 50%, 0.5x or 20MB.")
    energy: Limits | None = Field(
        None, description="Energy of one input, where the device counts it: 5mJ, 50% or 0.5x."
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        lt=100,
        allow_inf_nan=False,
        description="The other way round: points of the metric that the fastest network may lose against the dense one "
        "on the search split; its latency is then found, and the network is confirmed on the test split.",
    )
    functions: tuple[str, ...] = Field(
        (),
        description="Python functions of the slim network or its plan: package.module:function<=VALUE; or budgets "
        "that an installed package registers: NAME<=VALUE.",
    )
    function_seconds: float = Field(
        60.0, gt=0, description="How long a function may take for one network before it is stopped."
    )
    function_repeats: Positive = Field(
        1, description="Calls of a function for each network, of which the median counts; for noisy ones."
    )

    def given(self) -> dict[str, str]:
        """Return the built-in budgets that are set: name -> text."""
        names = ("latency", "flops", "params", "memory", "energy")
        return {name: text for name in names if (text := getattr(self, name))}


class Pruning(Part):
    """What may be removed."""

    scope: Literal["all", "inner"] = Field(
        "all", description="all: residual-coupled channels too; inner: only those within a block."
    )
    granularity: Literal["auto", "measured"] | Positive | dict[str, Positive] = Field(
        "auto",
        description="Channel counts are multiples of this, for all groups or by pattern of their names; auto takes "
        "what the device computes best whatever the budget is, measured the steps after which latency jumps on this "
        "machine.",
    )
    min_share: Share = Field(0.1, description="The smallest share of its channels that a group may keep.")
    frozen: tuple[str, ...] = Field(
        (), description="Patterns (as in a shell) of layers that stay as they are."
    )
    depth: Literal["off", "auto"] | None = Field(
        None,
        description="auto: the search may also remove whole residual branches, around which the input runs unchanged. "
        "By default it may where a latency is a budget.",
    )
    importance: Literal["auto", "l1", "l2", "bn", "taylor", "fpgm", "random", "reconstruction"] = Field(
        "auto",
        description="How the channels of a group are ranked; auto is reconstruction, what compensation can replace "
        "least, where candidates are compensated, else l1.",
    )
    compensate: Literal["auto", "off", "moments", "layers"] = Field(
        "auto",
        description="How a slim network's layers are refitted to the dense one's outputs before any training: layer by "
        "layer, or from second moments of the dense network, cheaper and less exact; auto delivers layer by layer, and "
        "scores candidates of given weights so from fewer images, where the network allows it.",
    )
    compensation_images: Annotated[int, Field(ge=8)] = Field(
        512,
        description="Training images that this takes, and candidates a quarter of them; their labels are not used.",
    )


class RewardWeights(Part):
    """Exponents of the reward's soft factors: accuracy * (cost / its budget) ** weight. A negative one rewards a
    network that is cheaper than its budget; 0 leaves the cost out."""

    latency: float = Field(0.0, le=0, ge=-10, description="Weight of the latency, as in -0.07.")
    flops: float = Field(0.0, le=0, ge=-10, description="Weight of the multiply-adds.")
    params: float = Field(0.0, le=0, ge=-10, description="Weight of the parameters.")
    memory: float = Field(0.0, le=0, ge=-10, description="Weight of the memory.")


class Search(Part):
    """Search for the widths."""

    epochs_share: Share | None = Field(
        None,
        description="Share of the epochs for training the dense weights, before or during the search for the widths; "
        "the slim network has the rest. By default: 0.6 from scratch; with pretrained weights a third for "
        "agents that train jointly, none for others.",
    )
    max_evaluations: Positive = Field(
        200,
        description="Maximum number of networks scored in the search, and in each later continuation of it.",
    )
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="Time limit of the search in seconds, including its training; started work is finished.",
    )
    workers: Positive | Annotated[str, Field(pattern=r"^([0-9]{1,18}|ray://\S+)$")] | None = Field(
        None,
        description="Processes that score candidates in parallel: a number, or ray://host:port for a Ray cluster; by "
        "default one for each core of a machine without a GPU, once that is worth starting them.",
    )
    threads: Positive | None = Field(
        None,
        description="Threads that score one candidate. Accuracies are bit-identical for any number of workers if this "
        "is equal; by default: one, all cores for --workers 1 or a GPU, an equal share for another number of workers.",
    )
    evaluation_seconds: float = Field(
        1800.0,
        gt=0,
        description="Time limit of a worker for one candidate in seconds; after it the worker is replaced.",
    )
    batch_norm_batches: Positive | None = Field(
        None,
        description="Batches of 128 from which batch-norm statistics are re-estimated before a network is scored; "
        "by default: 2 on digits, 3 on shapes, else 10.",
    )
    search_images: Positive | None = Field(
        2000, description="Maximum number of images of the search split that score a network; null for all."
    )
    measure: Literal["auto", "accuracy", "closeness"] = Field(
        "auto",
        description="Score of a candidate on the search split: its accuracy, or its closeness to the dense network's "
        "outputs, exp(-d) with the mean Kullback-Leibler divergence d in nats at a temperature of 4, for which labels "
        "are not used; auto is accuracy if there are labels.",
    )
    brief_iterations: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Training steps on each candidate before it is scored, from the dense weights each time; for "
        "budgets at which untrained slim networks all score near chance. Needs one worker.",
    )
    reward: RewardWeights = Field(
        RewardWeights(),
        description="Soft factors of the reward; each needs a budget of its name, which may be 100%.",
    )
    align: Literal["tensor", "channel"] = Field(
        "tensor", description="Form of the joint agent's alignment term."
    )
    align_weight: float = Field(1e-4, ge=0, description="Weight of the alignment term; 0 turns it off.")
    context_size: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Size of the state of the joint agent's environment model, which describes the changing reward; "
        "0 turns it off. By default: 128, as published.",
    )
    settings: dict[str, int | float | bool | str | tuple[int, ...]] = Field(
        {}, description="Settings of the agent that differ from its defaults; the schema lists those of each agent."
    )


class Training(Part):
    """Training of the weights; fields without a value follow from the data and from the initial weights."""

    batch_size: Positive | None = Field(None, description="Images in a training step.")
    learning_rate: float | None = Field(None, gt=0, description="Highest learning rate of the first phase.")
    finetune_learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate of fine-tuning."
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with Nesterov momentum 0.9, or AdamW.")
    weight_decay: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="L2 penalty on the weights, for adamw apart from the gradient; by default: 1e-4, for adamw 0.05.",
    )
    schedule: Literal["cosine", "step"] = Field(
        "cosine", description="How the learning rate falls: cosine, or a tenth at 50 % and again at 75 %."
    )
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of the schedule in which the learning rate rises from zero."
    )
    one_schedule: bool = Field(
        False,
        description="Whether search and fine-tuning share one schedule of learning_rate; else fine-tuning has its own.",
    )
    accumulation: Positive = Field(
        1,
        description="Parts in which a batch goes through the network one after another, for less memory; their "
        "gradients are added before the step.",
    )
    grad_clip: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Largest norm of the gradient, 0 for no limit; by default: none, and 1 for a loss of your own.",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the target that is spread over all classes, such as 0.1."
    )
    mixup: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Alpha of mixup, such as 0.2: weighted means of two images and of their labels; 0 for none.",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Alpha of cutmix, such as 1: a rectangle of another image, and the labels by area; 0 for none. "
        "With mixup too, each batch has either.",
    )
    rand_augment: Annotated[int, Field(ge=0, le=30)] = Field(
        0, description="Magnitude of RandAugment's two operations on each training image, such as 9; 0 for none."
    )
    random_erasing: Share = Field(
        0.0, description="Probability that a rectangle of a training image is replaced by the mean color, such as 0.25."
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Exponential moving average of the weights, such as 0.99; 0 turns it off."
    )
    distill_weight: Share = Field(
        0.5, description="Share of the distillation loss in fine-tuning; 0 turns it off."
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto",
        description="Precision of the training steps; auto is bf16 on CPUs with AMX units (amx_bf16), else no: "
        "with avx512_bf16 alone it is no faster than float32.",
    )
    channels_last: bool = Field(
        False,
        description="Whether weights are held channels last while they train, as images always are; faster on GPUs "
        "with tensor cores.",
    )
    compile: bool = Field(
        False, description="Whether torch.compile compiles the network for training; its first steps take minutes."
    )
    quantize: Literal["no", "int8"] = Field(
        "no",
        description="int8: fine-tuning computes with weights and inputs rounded as in an INT8 file, which then has the "
        "ranges of this training in place of calibrated ones. Needs torchao (extra qat), and does not compile.",
    )

    @model_validator(mode="after")
    def _parts_of_two(self) -> Training:
        if self.accumulation > 1 and self.batch_size is not None and self.batch_size < 2 * self.accumulation:
            raise ValueError(
                f"training.accumulation is {self.accumulation} and training.batch_size {self.batch_size}; each part "
                "needs two images for batch norm"
            )
        return self

    @model_validator(mode="after")
    def _one_of_both(self) -> Training:
        if self.compile and self.quantize != "no":
            raise ValueError(f"training.quantize is {self.quantize}, which training.compile does not compile")
        return self


class Contract(Part):
    """How the latency target is verified by measurement."""

    margin: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.015,
        description="Margin below the latency target that the search aims at, as a share, against noise.",
    )
    max_rounds: Positive = Field(
        6,
        description="Maximum number of measurements of plans; until then the search continues after a latency that "
        "misses its target or is far below it. An earlier plan that replaces one that missed is measured once more.",
    )
    repeats: Positive = Field(
        5,
        description="Pairs of processes in which the dense and the slim network are timed in turns if there is no "
        "latency budget. With one, pairs are timed until it is decided.",
    )
    seconds: float = Field(
        90.0, gt=0, description="Time limit of one measurement in seconds; after it the result is undecided."
    )
    accept_predicted: bool = Field(
        False,
        description="Whether a budget that is only predicted, as on a device that cannot be reached, ends with exit "
        "code 0; else with 4.",
    )


class Export(Part):
    """Files for the device."""

    opset: Annotated[int, Field(ge=13, le=20)] = Field(17, description="ONNX operator set.")
    tolerance: float = Field(1e-4, gt=0, description="Largest difference allowed between ONNX and torch.")
    max_drop: float = Field(1.0, ge=0, lt=100, description="Percentage points that fp16, int8 or mixed may lose.")
    precisions: tuple[Literal["fp16", "int8", "mixed"], ...] = Field(
        (), description="Further precisions in which the network is written, as by compress export --precision."
    )
    rounding: Literal["nearest", "outputs"] = Field(
        "nearest",
        description="How int8 weights are rounded: each to the nearest, or for the outputs of its layer, which adds "
        "less noise and takes longer.",
    )
    engine: bool = Field(True, description="Whether to build an engine if a builder is installed.")
