"""The front of a run with several targets, `front.json`, as typed records: the only reader and writer of the file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from compressor.core.manifest import Document, Interval, Number, Record
from compressor.core.metrics import ACCURACY, Metric

FRONT = "front.json"
SCHEMA = 1

_NAME = r"[A-Za-z_][A-Za-z0-9._-]*"
Folder = Annotated[str, Field(pattern=f"^({_NAME})?$")]
"""Name of a target's folder, directly below that of the front; empty for none."""

File = Annotated[str, Field(pattern=f"^{_NAME}/{_NAME}$")]
"""Path of a file in such a folder."""

Kind = Literal["dense", "uniform", "knapsack", "ours"]
Confirmed = Literal["kept", "missed", "undecided"]


class Lost(Record):
    """What a network has lost against the dense one, in points: per cent of a share, else units of the score.

    Attributes:
        search, search_dense: Scores on the search split after the run's own treatment.
        search_drop: Difference of the two in points, by which the latency is narrowed down.
        search_images: Images of the search split; None if they are not known.
        test_drop: Difference on the test split in points.
        error: Standard error of `test_drop` in points; None if it is not known.
    """

    search: Number | None = None
    search_dense: Number | None = None
    search_drop: Number | None = None
    search_images: int | None = None
    test_drop: Number | None = None
    error: Number | None = None


class TargetRun(Record):
    """One target: its folder below that of the front, its limits by name, and how its run ended.

    Attributes:
        state, verdict: Its verdict in a word and as a sentence, as on its own page.
        continues: Folder of the target whose search it continued; empty for the first.
        known: Plans that were scored before its search began.
        evaluations: Plans that its own search scored.
        seconds: Time of each stage, and of `compare`, the measurement of the networks without a search.
        lost: Loss of accuracy, if that is what is limited.
    """

    folder: Folder = ""
    budgets: dict[str, str] = Field({})
    status: str = ""
    exit_code: int | None = None
    state: str = ""
    verdict: str = ""
    continues: Folder = ""
    known: int | None = None
    evaluations: int | None = None
    seconds: dict[str, Number] = Field({})
    lost: Lost | None = None


class Point(Record):
    """One network of the front.

    Attributes:
        kind: "dense"; "uniform" and "knapsack", which no search found and which are not trained; or "ours".
        target: Folder of the target within whose limits it lies; empty for the dense network.
        widths: Channels of each group, and with `pruning.depth` 1 or 0 for each block.
        ratio, interval: Measured time as a share of the dense network's, and its 95 % interval.
        predicted_ratio: The same by the latency table.
        latency_ms: Measured time, from `ratio` and the time of the dense network on the quiet device.
        searched: Score on the search split as the search scores its candidates: compensated where that is on, and not
            trained.
        tested: Score on the test split as delivered; of the dense network and of ours only.
        onnx: Path of the file to deploy, relative to the front's folder; of ours only.
    """

    kind: Kind = "ours"
    target: Folder = ""
    widths: list[int] = Field([])
    ratio: Number | None = None
    interval: Interval | None = None
    predicted_ratio: Number | None = None
    latency_ms: Number | None = None
    searched: Number | None = None
    tested: Number | None = None
    onnx: File | None = None

    @property
    def share(self) -> float | None:
        """Time as a share of the dense network's: measured, else predicted."""
        return self.predicted_ratio if self.ratio is None else self.ratio


class DropLimit(Record):
    """The limit of lost accuracy, and the fastest network that keeps it.

    Attributes:
        points: Most points that may be lost.
        steps: Networks that were tried, and `most_steps` how many may be.
        chosen: Folder of the fastest network that keeps the limit on the search split; if none does, of the one that
            loses least.
        kept: Whether it keeps the limit on the search split.
        confirmed: Whether it does on the test split: undecided if the limit is within a standard error of its loss.
    """

    points: Number = float("nan")
    steps: int = 0
    most_steps: int = 0
    chosen: Folder = ""
    kept: bool | None = None
    confirmed: Confirmed | None = None


class Front(Document):
    """The content of `front.json`.

    Attributes:
        agent: Name of the agent that found "ours".
        metric, share: What `tested` and the loss are scores by; see `core.metrics.Metric`.
        searched_by: What `searched` is: "accuracy" or another metric, or "closeness to the dense network's outputs".
        dense_ms: Time of the dense network on the quiet device; None if nothing was measured.
        prepare_seconds: Time before the first run: data, network and latency table.
    """

    model_config = ConfigDict(frozen=False)
    schema_version: int | None = Field(None, alias="schema")
    status: str = ""
    exit_code: int | None = None
    model: str = ""
    data: str = ""
    device: str = ""
    agent: str = ""
    epochs: int | None = None
    seed: int | None = None
    metric: str = ACCURACY
    share: bool = True
    searched_by: str = ""
    search_images: int | None = None
    test_images: int | None = None
    dense_ms: Number | None = None
    prepare_seconds: Number | None = None
    targets: list[TargetRun] = Field([])
    points: list[Point] = Field([])
    max_drop: DropLimit | None = None
    notes: list[str] = Field([])

    @property
    def by(self) -> Metric:
        """The metric of the test split."""
        return Metric(self.metric, self.share)

    def dense(self) -> Point | None:
        """Return the dense network's point; None if it is not known yet."""
        return next((point for point in self.points if point.kind == "dense"), None)

    def of(self, kind: Kind) -> list[Point]:
        """Return the points of a kind, the fastest first."""
        found = [point for point in self.points if point.kind == kind]
        return sorted(found, key=lambda point: float("inf") if point.share is None else point.share)
