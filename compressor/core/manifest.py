"""The manifest of a run, `manifest.json`, as typed records: the only reader and writer of the file.

    manifest = Manifest.read(path)          # for the run itself: refuses a damaged file
    manifest = Manifest.tolerant(content)   # for the report: what is invalid counts as absent
    manifest.write(path)

Only the fields that were set are written, so that an unfinished run lacks the sections that it has not reached. Keys
that this version does not know are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from compressor.core.conditions import MEDIAN, Conditions
from compressor.core.errors import CompressorError
from compressor.core.files import read_json, write_atomic
from compressor.core.metrics import ACCURACY, Metric

if TYPE_CHECKING:
    from typing_extensions import Self

MANIFEST = "manifest.json"
SCHEMA = 1
LARGEST = 1e30
"""A report takes a number beyond this for damage: it is far above anything that a run counts or measures."""

_TOLERANT = {"tolerant": True}

How = Literal["measured", "counted", "computed"]
Verdict = Literal["kept", "missed", "undecided", "predicted"]


def kept(verdict: Verdict) -> bool | None:
    """Return whether a budget with this verdict is met; None if that is not known."""
    return {"kept": True, "missed": False}.get(verdict)


def _possible(value: float, info: ValidationInfo) -> float:
    if not abs(value) <= (LARGEST if info.context is _TOLERANT else sys.float_info.max):
        raise ValueError("expected a finite number")
    return value


Number = Annotated[int | float, AfterValidator(_possible)]
Interval = Annotated[list[Number | None], Field(min_length=2, max_length=2)]
"""Lower and upper end; an upper end of None is unknown."""
Ends = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Record(BaseModel):
    """A part of the manifest: its fields are checked when it is created or read, and do not change."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, populate_by_name=True)
    essential: ClassVar[tuple[str, ...]] = ()
    """Fields without which only a report reads the record."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _absent_if_invalid(cls, value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return read(value)
        except ValidationError:
            if info.context is not _TOLERANT:
                raise
            return cls.model_fields[str(info.field_name)].get_default(call_default_factory=True)

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> Record:
        missing = [name for name in self._needed() if name not in self.model_fields_set]
        if missing and info.context is not _TOLERANT:
            raise ValueError(f"{', '.join(missing)} missing")
        return self

    def _needed(self) -> tuple[str, ...]:
        return self.essential


class Stage(Record):
    """When a stage started and finished, in UTC, and its seconds over all attempts."""

    started: str | None = None
    finished: str | None = None
    seconds: Number | None = None


class Budget(Record):
    """A budget and how the network meets it; `target` and the costs are in `unit`.

    `how` says how `measured` is found: it may also be counted or computed.
    """

    essential = ("name", "unit", "target", "dense")
    name: str = ""
    unit: str = ""
    target: Number = float("nan")
    dense: Number = float("nan")
    predicted: Number | None = None
    measured: Number | None = None
    kept: bool | None = None
    verdict: Verdict | None = None
    how: How | None = None

    def judged(self, verdict: Verdict, **costs: float | None) -> Budget:
        """Return the budget with its result; `costs` are fields that the result changes."""
        return self.model_copy(update={**costs, "verdict": verdict, "kept": kept(verdict)})


class Measurement(Record):
    """The slim network's latency, measured in turns with the dense one's, and what that says about the target.

    Attributes:
        dense_ms, measured_ms, target_ms: Dense and slim network and the target, on the quiet device.
        predicted_ms, predicted_ratio: The table's prediction of the slim network.
        ratio, interval: Slim time as a share of dense time, and its 95 % interval.
        target_ratio: The target as a share of the dense network's time.
        bursts, seconds: Effort of the measurement.
        verdict, kept: Whether the target is met; None if the measurement cannot decide it.
        widths: Channels of the measured plan, in the order of the groups.
        file: Checksum of the timed file; empty if the widths alone determine its time.
    """

    essential = (
        "predicted_ms", "measured_ms", "target_ms", "dense_ms", "predicted_ratio", "ratio", "interval", "target_ratio",
        "verdict", "kept", "widths",
    )  # fmt: skip
    predicted_ms: Number = float("nan")
    measured_ms: Number = float("nan")
    target_ms: Number = float("nan")
    dense_ms: Number = float("nan")
    predicted_ratio: Number = float("nan")
    ratio: Number = float("nan")
    interval: Interval = [None, None]
    target_ratio: Number = float("nan")
    bursts: int = 0
    seconds: Number = 0.0
    verdict: Literal["kept", "missed", "undecided"] | None = None
    kept: bool | None = None
    widths: list[int] = []
    file: str = ""

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval[0] or 0.0

    @property
    def high(self) -> float:
        """Upper end of the interval; infinite if it is unknown."""
        return float("inf") if self.interval[1] is None else self.interval[1]


class Latency(Record):
    """The final latency; without a measurement it holds the table's predictions.

    `batch`, `percentile` and `streams` are what `measured_ms` and `dense_ms` are of (`core.conditions`); with another
    percentile than the median, `tail` is that percentile over the median of the same runs. `inputs_per_s` is the
    throughput of all streams at the mean time of these runs. The dense network is in the same precision, or in FP32 if
    that is mixed.
    """

    device: str = ""
    runtime: str | None = None
    precision: str = ""
    batch: Number | None = None
    percentile: Number | None = None
    estimated: bool = False
    predicted_ms: Number | None = None
    predicted_dense_ms: Number | None = None
    measured_ms: Number | None = None
    dense_ms: Number | None = None
    threads: Number | None = None
    streams: Number | None = None
    ratio: Number | None = None
    interval: Interval | None = None
    bursts: int | None = None
    sittings: int | None = None
    seconds: Number | None = None
    median_ms: Number | None = None
    p90_ms: Number | None = None
    p99_ms: Number | None = None
    dense_median_ms: Number | None = None
    dense_p90_ms: Number | None = None
    dense_p99_ms: Number | None = None
    tail: Number | None = None
    dense_tail: Number | None = None
    inputs_per_s: Number | None = None
    dense_inputs_per_s: Number | None = None
    runs: Number | None = None


class Accuracy(Record):
    """Scores of the networks on the test split by one metric; see `core.metrics.Metric`.

    `split` is "test", or for batches of the user's own that leave none the "training" or "search" inputs.

    `finetuned` is that of the delivered network, before its export. If training lowered the score on the search split,
    the network before training is delivered, and `discarded` is the score of the trained one.
    """

    metric: str = ACCURACY
    share: bool = True
    split: str = ""
    images: int | None = None
    dense: Number | None = None
    dense_note: str = ""
    pruned: Number | None = None
    compensated: Number | None = None
    finetuned: Number | None = None
    discarded: Number | None = None
    exported: Number | None = None
    exported_images: int | None = None

    @property
    def by(self) -> Metric:
        """The metric that the scores are values of."""
        return Metric(self.metric, self.share)


class Compensated(Record):
    """What compensation did to the slim network before fine-tuning; see `compressor.pruning.compensate`.

    Attributes:
        method: "moments" or "layers".
        images: Images that it used, without labels.
        refitted: Layer -> its squared error on the images that chose its fit, as a share of the sliced layer's.
        left: Layer that lost inputs and stays as sliced -> the reason.
        error, error_cut: Squared error of the network's outputs relative to the dense network's, and that of the
            network that is only sliced.
        statistics: Of its batch norms: "dense" or "own".
        seconds: Its time.
    """

    method: str = ""
    images: int | None = None
    refitted: dict[str, Number] = {}
    left: dict[str, str] = {}
    error: Number | None = None
    error_cut: Number | None = None
    statistics: str = ""
    seconds: Number | None = None


class Episode(Record):
    """A scored plan of the search: its reward and its predicted cost for each budget."""

    reward: Number | None = None
    accuracy: Number | None = None
    costs: dict[str, Number] = {}
    phase: str = ""


class Candidate(Episode):
    """A scored plan as the manifest lists it; `given_up` if its evaluation was stopped early."""

    source: str = ""
    epoch: int | None = None
    given_up: bool = False
    chosen: bool = False


class Baseline(Record):
    """A network that needs no search, scored within the budgets of the run: dense, uniform or knapsack."""

    name: str = ""
    widths: list[int] = []
    accuracy: Number | None = None
    costs: dict[str, Number] = {}


class MethodPart(Record):
    """One part of the agent's method, here and in its publication."""

    part: str = ""
    setting: str = ""
    here: str = ""
    published: str = ""
    same: bool = False
    by: str = ""
    why: str = ""
    effect: str = ""


class Method(Record):
    """How the search compares with the publication of its method."""

    source: str = ""
    parts: list[MethodPart] = []


class Finalist(Record):
    """A candidate that was scored again as it would be delivered."""

    candidate_score: Number | None = None
    score: Number | None = None
    chosen: bool = False


class Search(Record):
    """The search over all rounds."""

    agent: str = ""
    evaluations: int | None = None
    episodes: int | None = None
    seconds: Number | None = None
    timing: dict[str, Number] = {}
    best_reward: Number | None = None
    method: Method | None = None
    #: Limit of each cost in the units of the candidates' costs; that of latency is in milliseconds of the table.
    targets: dict[str, Number] = {}
    candidates: list[Candidate] = []
    #: The best few candidates of the last round that had any, in the order in which the search had them.
    finalists: list[Finalist] = []
    #: Of the runs of a front only.
    baselines: list[Baseline] = []


class Epoch(Record):
    """One epoch of training."""

    phase: str = ""
    epoch: int | None = None
    loss: Number | None = None
    accuracy: Number | None = None
    regulariser: Number | None = None
    seconds: Number | None = None


class Group(Record):
    """Channels that are pruned together: how many there were and how many are kept; none in a removed block."""

    name: str = ""
    width: int | None = None
    kept: int | None = None
    coupled: bool = False


class Skipped(Record):
    """A part of the network that stays dense."""

    name: str = ""
    reason: str = ""


class OtherMacs(Record):
    """Multiply-adds of an operation outside the layers."""

    name: str = ""
    dense_macs: Number | None = None
    slim_macs: Number | None = None


class Layer(OtherMacs):
    """A layer of both networks; the times follow from `compress measure --explain`."""

    kind: str = ""
    dense_channels: list[int] = []
    slim_channels: list[int] = []
    dense_ms: Number | None = None
    slim_ms: Number | None = None
    predicted_dense_ms: Number | None = None
    predicted_slim_ms: Number | None = None
    bound: str | None = None
    padding: Number | None = None


class ExplainedLine(Layer):
    """One kernel of both networks, and its part of the gap; see `latency.explain.Line`."""

    layer: int | None = None
    peak_share: Number | None = None
    gap_ms: Number | None = None
    sentence: str = ""


class Explanation(Record):
    """Result of `compress measure --explain`; in precision `mixed` the dense network is in FP32."""

    where: str = ""
    precision: str = ""
    peaks: str = ""
    dense_ms: Number | None = None
    slim_ms: Number | None = None
    lines: list[ExplainedLine] = []


class SplitFiles(Record):
    """The files of a split: their number, and the SHA-256 of their names and labels in order."""

    images: int | None = None
    sha256: str = ""


class NetworkCost(Record):
    """Counts of one network."""

    macs: int | None = None
    params: int | None = None
    onnx_bytes: int | None = None
    safetensors_bytes: int | None = None


class Cost(Record):
    """Counts of both networks."""

    dense: NetworkCost = NetworkCost()
    slim: NetworkCost = NetworkCost()


class Check(Record):
    """An independent check of the slim network; `confirmed` is None if it could not run."""

    confirmed: bool | None = None
    words: str = ""
    seconds: Number | None = None


class Checks(Record):
    """The checks by other libraries."""

    torch_pruning: Check = Check()
    fvcore: Check = Check()


class Parity(Record):
    """Difference between the outputs of an exported file and of the network; see `export.convert.parity.Parity`."""

    max_abs: Number | None = None
    mean_abs: Number | None = None
    scale: Number | None = None
    top1_agreement: Number | None = None
    samples: int | None = None
    images: int | None = None
    allowed: Number | None = None
    tolerance: Number | None = None


class Engine(Record):
    """A built engine."""

    file: str = ""
    builder: str = ""
    precision: str = ""
    compute_capability: str = ""
    bytes: int | None = None


class PrecisionPlan(Record):
    """A measured plan of precisions; see `run.mixed`.

    Attributes:
        int8: Number of layers in INT8.
        predicted_ratio, ratio, interval: Its share of the time of the network in floats (FP32, with TensorRT FP16): by
            the times of its parts, where these could be measured, and as measured, with a 95 % interval.
        noise: What it adds to the outputs, as a share of their variance.
        score: On the search split.
        chosen: Whether the file has this plan.
    """

    int8: int = 0
    predicted_ratio: Number | None = None
    ratio: Number = float("nan")
    interval: Interval = [None, None]
    noise: Number = float("nan")
    score: Number = float("nan")
    chosen: bool = False

    @property
    def high(self) -> float:
        """Upper end of the interval; infinite if it is unknown."""
        return float("inf") if self.interval[1] is None else self.interval[1]


class LayerPrecision(Record):
    """The precision of a layer, and why: its noise in INT8 alone, and the times of its part in floats and in INT8."""

    name: str = ""
    precision: str = ""
    noise: Number | None = None
    float_ms: Number | None = None
    int8_ms: Number | None = None


class Export(Record):
    """A file that was exported in another precision, batch or format.

    The fields from `kept_fp32` on are those of FP16 and INT8, the last four those of mixed precision: `timed_on` says
    where its plans were timed. `trained_ranges` counts the activations whose ranges are those of the training.
    `weight_levels` is the largest whole number of an INT8 weight: 127, or 64 where sums on the CPU saturate.
    """

    file: str = ""
    bytes: int | None = None
    opset: int | None = None
    parity: Parity | None = None
    accuracy: Number | None = None
    images: int | None = None
    kept_fp32: list[str] = []
    kept_float: list[str] = []
    calibration: str = ""
    calibration_images: int | None = None
    calibration_classes: dict[str, int] = {}
    rest: str = ""
    runtime: str = ""
    rounding: str = ""
    trained_ranges: int = 0
    weight_levels: int | None = None
    timed_on: str = ""
    rule: str = ""
    plans: list[PrecisionPlan] = []
    layers: list[LayerPrecision] = []


class DeviceNetwork(Record):
    """Result of one network on a board; see `export.device.results.NetworkResult`."""

    name: str = ""
    precision: str = ""
    status: str = ""
    reason: str = ""
    onnx_sha256: str = ""
    engine_bytes: int | None = None
    flags: str = ""
    latency: dict[str, Any] | None = None
    parity: Parity | None = None


class DeviceRecord(Record):
    """Results of a bundle that ran on a board."""

    target: str = ""
    board: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    networks: Annotated[list[DeviceNetwork], Field(strict=False)] = []


class Document(Record):
    """The content of a JSON file: a record that can be read and written."""

    indent: ClassVar[int | None] = 2
    """Spaces before each nested line of the file; None for a file in one line."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file, to continue what it records or to add to it.

        Raises:
            CompressorError: The file is missing or damaged; the message names every invalid field.
        """
        try:
            return cls.model_validate(_object(path))
        except ValidationError as error:
            raise CompressorError(
                f"{path}: {'; '.join(dict.fromkeys(map(_problem, error.errors())))}.",
                "The file is damaged, or of another version: restore it, or start a new run with --out DIR.",
            ) from None

    @classmethod
    def tolerant(cls, content: Self | Mapping[str, Any]) -> Self:
        """Return it for reading only, whatever its content: a field that is invalid counts as absent."""
        if isinstance(content, cls):
            return content
        return cls.model_validate(dict(content), context=_TOLERANT)

    @classmethod
    def read_tolerant(cls, path: Path) -> Self:
        """Read the file for a report.

        Raises:
            CompressorError: The file is not a JSON object.
        """
        return cls.tolerant(_object(path))

    def write(self, path: Path) -> None:
        """Write the fields that were set; the file is replaced as a whole."""
        write_atomic(path, json.dumps(self.plain(), indent=self.indent, allow_nan=False) + "\n")

    def plain(self) -> dict[str, Any]:
        """Return the fields that were set as JSON values."""
        return self.model_dump(exclude_unset=True, by_alias=True)


class Manifest(Document):
    """The content of `manifest.json`.

    `splits` has the files of each split as the run began; data without files has none.
    `trained_ranges` has the least and the largest input of each layer in a fine-tuning for INT8.
    """

    model_config = ConfigDict(frozen=False)
    essential = ("model", "seed", "budgets", "accuracy", "rounds", "training", "notes")
    schema_version: int | None = Field(None, alias="schema")
    status: str = ""
    exit_code: int | None = None
    model: str = ""
    data: str = ""
    preprocessing: dict[str, Any] = {}
    splits: dict[str, SplitFiles] = {}
    seed: int | None = None
    agent: str = ""
    weights: str = ""
    epochs: int | None = None
    recipe: dict[str, Any] = {}
    versions: dict[str, str] = {}
    machine: dict[str, str | int | None] = {}
    stages: dict[str, Stage] = {}
    budgets: list[Budget] = []
    accuracy: Accuracy = Accuracy()
    latency: Latency = Latency()
    cost: Cost = Cost()
    skipped: list[Skipped] = []
    removed: list[str] = []
    rounds: list[Measurement] = []
    corrections: list[list[Number]] = []
    evaluations_before: int = 0
    missed: int = 0
    quiet_dense_ms: Number | None = None
    noise: Number | None = None
    search: Search | None = None
    compensation: Compensated | None = None
    training: list[Epoch] = []
    trained_ranges: dict[str, Ends] = {}
    groups: list[Group] = []
    layers: list[Layer] = []
    other_macs: list[OtherMacs] = []
    explanation: Explanation | None = None
    parity: Parity = Parity()
    checks: Checks = Checks()
    engines: list[Engine] = []
    engine_note: str | None = None
    exports: dict[str, Export] = {}
    devices: list[DeviceRecord] = []
    notes: list[str] = []
    #: Stage that trained -> what went wrong in it; the verdict repeats it.
    warnings: dict[str, str] = {}
    files: dict[str, str] = {}

    def _needed(self) -> tuple[str, ...]:
        return self.essential if self.finished("begin") else ()

    @property
    def conditions(self) -> Conditions:
        """The conditions of the latency: as measured, else as the recipe asks."""
        found = self.latency
        known = {"batch": found.batch, "percentile": found.percentile, "streams": found.streams}
        if found.batch is None:
            known = {name: self.recipe.get(name) for name in known}
        numbers = {name: value for name, value in known.items() if isinstance(value, int | float) and value > 0}
        return Conditions(
            int(numbers.get("batch", 1)), float(numbers.get("percentile", MEDIAN)), int(numbers.get("streams", 1))
        )

    @property
    def deployed(self) -> Export | None:
        """The file whose time is the run's latency, if it is in another precision than FP32."""
        return self.exports.get(self.latency.precision)

    @property
    def deployed_score(self) -> float | None:
        """The score on the test split of the file whose time is the run's latency."""
        file = self.deployed
        return self.accuracy.finetuned if file is None or file.accuracy is None else file.accuracy

    @property
    def deployed_by_onnxruntime(self) -> Export | None:
        """The deployed file, if it is in the form for ONNX Runtime; else `model.onnx` stands for it there."""
        file = self.deployed
        return file if file is not None and file.runtime == "onnxruntime" else None

    def finished(self, stage: str) -> bool:
        """Return whether a stage has finished."""
        return bool(stage in self.stages and self.stages[stage].finished)


def read_episode(line: Mapping[str, Any]) -> Episode:
    """Return a line of the episode log for a report."""
    return Episode.model_validate(dict(line), context=_TOLERANT)


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CompressorError(f"{path} holds {type(content).__name__}, expected an object.")
    return content


def _problem(found: Any) -> str:
    """Describe one invalid field; the names of union branches are left out of its place."""
    place = ".".join(str(part) for part in found["loc"] if part not in ("int", "float") and "[" not in str(part))
    given = "" if isinstance(found["input"], dict | list) else f" is {found['input']!r}"
    return f"'{place or MANIFEST}'{given}: {found['msg'][0].lower()}{found['msg'][1:]}"
