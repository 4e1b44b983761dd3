"""The file format of a latency table (docs/method/latency.md describes it for people)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.core.errors import CompressorError
from compressor.core.files import parse_json
from compressor.latency.fit import KINDS
from compressor.latency.operators import Operators

SCHEMA_VERSION = 1

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Precision = Literal["fp32", "fp16", "int8", "mixed"]
"""Of networks; `mixed` is int8 or floats for each operator, whichever is faster."""

BLOCKS = {"fp16": 8, "int8": 32, "mixed": 8}
"""Channels that tensor cores compute at once, by precision; 1 in others. In mixed precision those of its floats."""

FASTEST_MS = 1e-5
"""No device computes an operator in ten nanoseconds: a smaller time has another unit."""


FASTEST_MACS_A_MS = {"onnxruntime-cpu": 2e9}
"""Multiply-adds per millisecond that no device of a runtime reaches: for a CPU ten times the peak of a core's vector
units, per thread."""

FASTEST_OF_ALL = 5e12
"""Multiply-adds per millisecond that no device reaches: several times those of the largest accelerators."""

SLOWEST_MACS_A_MS = 1e3
"""Multiply-adds per millisecond that every device exceeds, in operators with more than `LARGE` multiply-adds."""

LARGE = 1e7
MAX_SUM_RATIO = 50.0
"""Largest ratio between the operators' sum and the whole network's time, in either direction, at which both can be in
milliseconds."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceFields(_Part):
    """The device that was measured, or for which the table is estimated."""

    name: str = Field(description="Name that --device takes.")
    sku: str = Field(default="", description="The processor or module as its maker names it.")
    compute_capability: str = Field(
        default="", description="CUDA compute capability, such as 8.7; empty for a CPU."
    )
    power_mode: str = Field(
        default="", description="Power mode or frequency governor; empty where it could not be read."
    )
    clocks: str = Field(
        default="", description="Clock frequencies with their unit; empty where they could not be read."
    )


class RuntimeFields(_Part):
    """The runtime of the network."""

    name: str = Field(description="onnxruntime-cpu or tensorrt.")
    version: str = Field(default="", description="Its version; empty for an estimate.")
    threads: int = Field(
        default=0, ge=0, description="Threads inside one operator; 0 where the runtime has no such setting."
    )


class Entry(_Part):
    """The measured points of one operator: columns of equal length, ordered by (c_in, c_out)."""

    c_in: tuple[Annotated[int, Field(gt=0)], ...]
    c_out: tuple[Annotated[int, Field(gt=0)], ...]
    n: tuple[Annotated[int, Field(gt=0)], ...] = Field(description="Timed runs behind each point.")
    median_ms: tuple[Positive, ...]
    p90_ms: tuple[Positive, ...]
    std_ms: tuple[Share, ...]

    @model_validator(mode="after")
    def _fits(self) -> Entry:
        columns = (self.c_in, self.c_out, self.n, self.median_ms, self.p90_ms, self.std_ms)
        if len({len(column) for column in columns}) != 1 or not self.c_in:
            raise ValueError("its columns have different lengths or are empty")
        points = list(zip(self.c_in, self.c_out, strict=True))
        if points != sorted(set(points)):
            raise ValueError("its points are not in ascending order, or one occurs twice")
        if min(self.median_ms) < FASTEST_MS:
            raise ValueError(f"{min(self.median_ms):g} ms is too short for an operator; times are in milliseconds")
        return self


class CorrectionFields(_Part):
    """milliseconds = max(least, offset + f(sum of operators) + g(weights)), with piecewise linear f and g.

    f starts with `slope` and changes its slope at each bend; g has a slope from each number of weights on.
    """

    factors: tuple[Share, ...] = Field(
        default=(),
        description="Factors for terms of each kind (`surface.KINDS`) of the operators' times.",
    )
    offset_ms: Finite
    slope: Positive
    least_ms: Share = 0.0
    bends: tuple[tuple[Positive, Positive], ...] = Field(
        default=(), description="(sum of operators in ms, slope from there on), ascending."
    )
    weights: tuple[tuple[Share, Share], ...] = Field(
        default=(), description="(elements of all weights, ms for each one from there on), ascending."
    )

    @model_validator(mode="after")
    def _fits(self) -> CorrectionFields:
        if self.factors and len(self.factors) != len(set(KINDS)):
            raise ValueError(f"it has {len(self.factors)} factors instead of {len(set(KINDS))}")
        for pieces in (self.bends, self.weights):
            places = [place for place, _ in pieces]
            if places != sorted(set(places)):
                raise ValueError("its bends are not in ascending order")
        return self


class HeldOutFields(_Part):
    """Errors on held-out networks, as shares of the measured time."""

    networks: int = Field(ge=1)
    mape: Share
    p95: Share
    worst: Share
    bias: Finite
    spearman: Finite


class NetworkFields(_Part):
    """A network that was measured end to end."""

    layers: tuple[str, ...] = Field(
        description="The entry of each weight-bearing operator, in execution order."
    )
    dense_ms: Positive = Field(description="Median end-to-end time of the network as it is.")
    dense_p90_ms: Positive
    drift: Finite = Field(default=0.0, description="Dense network at the end over the start, minus one.")
    correction: CorrectionFields
    fitted_networks: int = Field(ge=1, description="Sub-networks that entries and correction were fitted to.")
    held_out: HeldOutFields | None = None
    seconds: Share = Field(default=0.0, description="How long measuring took.")
    granularity: tuple[int, ...] = Field(
        default=(), description="Channel steps of the groups that were measured."
    )
    blocks: int = Field(default=0, ge=0, description="Blocks that some of the measured networks lacked.")


class ErrorFields(_Part):
    """Errors of an estimate against published measurements."""

    measurements: int = Field(ge=0, description="Published latencies of this device, fp16 and fp32.")
    fitted_mape: Share | None = None
    left_out_mape: Share | None = Field(
        default=None, description="Each measurement predicted from all the others."
    )
    left_out_worst: Share | None = None


class RooflineFields(_Part):
    """A device's speed, from which the time of any operator is estimated; times in milliseconds."""

    tflops: Positive = Field(description="Dense peak, a multiply-add being two operations.")
    bandwidth_gbs: Positive
    efficiency: dict[str, Positive] = Field(
        description="Share of the peak that each kind of operator reaches."
    )
    bandwidth_efficiency: Positive
    launch_ms: Positive = Field(description="Time that each operator pays besides its work.")
    network_ms: Share = Field(description="Time that each network pays besides its operators.")
    block: int = Field(ge=1, description="Channels are padded to a multiple of this.")
    errors: ErrorFields


class JoinedFields(_Part):
    """Tables of the same networks in two precisions, of which each operator has the faster one."""

    floats: TableFields = Field(
        validation_alias=AliasChoices("floats", "fp32"),  # tables of earlier versions
        description="In fp32, or with TensorRT in fp16.",
    )
    int8: TableFields
    to_int8_ms: tuple[Share, Share] = Field(description="Of converting a value, and of each of its elements.")
    to_float_ms: tuple[Share, Share] = Field(description="The same, back to a float.")


class TableFields(_Part):
    """A whole table."""

    schema_version: Literal[1] = 1
    device: DeviceFields
    runtime: RuntimeFields
    precision: Precision
    batch: int = Field(default=1, ge=1, description="Inputs of one run; all times are of the whole batch.")
    streams: int = Field(
        default=1, ge=1, description="Copies of a network that ran at the same time; times are of one run."
    )
    date: str
    how: Literal["measured", "estimated"]
    protocol: str = Field(description="How the numbers were measured or estimated.")
    sources: tuple[str, ...] = ()
    block: int = Field(default=1, ge=1, description="Channels per kernel block.")
    entries: dict[str, Entry] = Field(default_factory=dict)
    networks: dict[str, NetworkFields] = Field(default_factory=dict)
    roofline: dict[str, RooflineFields] = Field(default_factory=dict, description="By precision.")
    joined: JoinedFields | None = Field(
        default=None,
        description="Operators in mixed precision. The entries and the dense networks' times are those of its tables.",
    )
    raised: Positive = Field(
        default=1.0, description="Factor by which whole-network measurements have raised predictions."
    )

    @model_validator(mode="after")
    def _whole(self) -> TableFields:
        if (self.joined is None) == (self.precision == "mixed"):
            raise ValueError("mixed precision, and no other one, is joined from tables in floats and in int8")
        if self.joined is not None:
            return self._require_joined(self.joined)
        for name, network in self.networks.items():
            missing = sorted(set(network.layers) - set(self.entries))
            if missing:
                raise ValueError(f"network {name} refers to {missing[0]!r}, which has no entry")
        for key, entry in self.entries.items():
            self._require_plausible(key, entry)
        for name, network in self.networks.items():
            dense = sum(self.entries[key].median_ms[-1] for key in network.layers)
            if not 1 / MAX_SUM_RATIO < dense / network.dense_ms < MAX_SUM_RATIO:
                raise ValueError(
                    f"network {name} takes {network.dense_ms:g} ms and its operators {dense:g} ms: one of them is in "
                    "another unit; times are in milliseconds"
                )
        if not self.entries and not self.roofline:
            raise ValueError("it has neither measured entries nor a roofline")
        if self.how == "measured" and self.roofline:
            raise ValueError("a measured table cannot contain an estimate")
        return self

    def _require_joined(self, joined: JoinedFields) -> TableFields:
        """Refuse tables that do not belong together."""
        for precision, part in (("floats", joined.floats), ("int8", joined.int8)):
            known = ("fp32", "fp16") if precision == "floats" else (precision,)
            if part.precision not in known or part.how != "measured":
                raise ValueError(f"its table in {precision} is {part.how} in {part.precision}")
            if set(part.networks) != set(self.networks) or self.entries or self.roofline:
                raise ValueError(f"its table in {precision} is of other networks")
        return self

    def _require_plausible(self, key: str, entry: Entry) -> None:
        """Refuse times that imply an impossible speed: they are in another unit."""
        c_in, c_out = np.asarray(entry.c_in)[:, None], np.asarray(entry.c_out)[:, None]
        counted = self.batch * Operators.of_keys([key]).cost(c_in, c_out).macs
        threads = max(1, self.runtime.threads)
        fastest = (
            FASTEST_MACS_A_MS[self.runtime.name] * threads
            if self.runtime.name in FASTEST_MACS_A_MS
            else FASTEST_OF_ALL
        )
        for inputs, outputs, time, macs in zip(entry.c_in, entry.c_out, entry.median_ms, counted[:, 0], strict=True):
            if macs / time > fastest or (macs > LARGE and macs / time < SLOWEST_MACS_A_MS):
                much = "few" if macs / time < SLOWEST_MACS_A_MS else "many"
                raise ValueError(
                    f"{key} with {inputs} to {outputs} channels is listed with {time:g} ms, which is too {much} "
                    f"multiply-adds a second for any device ({macs / time * 1e3:.2g}); times are in milliseconds"
                )


JoinedFields.model_rebuild()


def read_table(text: str, source: str) -> TableFields:
    """Validate the text of a table's file.

    Raises:
        CompressorError: It is not JSON, has another schema version, or has an invalid field, which is named.
    """
    content = parse_json(
        text,
        f"The latency table {source} is damaged: it",
        "Delete the file; a table of this machine is then measured again.",
    )
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CompressorError(
            f"The latency table {source} has schema version {version}, expected {SCHEMA_VERSION}.",
            "Measure it again with this version of the toolkit.",
        )
    try:
        return TableFields.model_validate(content)
    except ValidationError as error:
        raise CompressorError(
            f"The latency table {source} is invalid in {first_problem(error)}.",
            "Measure it again, or fix that field.",
        ) from None


def first_problem(error: ValidationError) -> str:
    """Return the first invalid field and its problem."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "as a whole"
    return f"{where}: {problem['msg']}"


@contextmanager
def possible() -> Iterator[None]:
    """Convert validation errors of a new table to one clear message."""
    try:
        yield
    except ValidationError as error:
        raise CompressorError(
            f"No latency table can be built from these measurements: {first_problem(error)}.",
            "Measure again, with nothing else running on the device.",
        ) from None


def rounded(milliseconds: float) -> float:
    """Round to six significant digits: finer than any clock, and short in a file."""
    return 0.0 if milliseconds == 0 else round(milliseconds, 5 - math.floor(math.log10(abs(milliseconds))))
