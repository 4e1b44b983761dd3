"""Latency tables: predict a network's latency on a device, with the origin of the numbers."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from compressor.core.errors import CompressorError
from compressor.core.files import read_text, write_atomic
from compressor.core.progress import say
from compressor.latency.cheaper import CheaperOperators, Prices
from compressor.latency.fit import Correction, Surface, Surfaces, fit_surface
from compressor.latency.operators import (
    Floats,
    LatencyCurve,
    Operators,
    Widths,
    channels,
    network_signature,
    signature_of,
)
from compressor.latency.schema import JoinedFields, NetworkFields, TableFields, read_table
from compressor.recipe import shipped
from export.device.connection import parse_destination
from export.errors import ExportError

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace


LOCAL = "local"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,60}", re.IGNORECASE)


class LatencyTable:
    """The latency table of one device, runtime, precision, batch and number of streams.

    A measured table predicts the networks that it was measured for, and others whose operators it contains. An
    estimated table predicts any network. Neither extrapolates: other widths, operators, devices, precisions, batches
    and streams are refused.

    Args:
        fields: The validated contents of a table's file.
    """

    def __init__(self, fields: TableFields) -> None:
        self.fields = fields

    # ---------------------------------------------------------------- reading and writing
    @classmethod
    def load(
        cls,
        device: str,
        precision: str = "fp32",
        *,
        batch: int = 1,
        streams: int = 1,
        runtime: str | None = None,
        space: PruningSpace | None = None,
    ) -> LatencyTable:
        """Load the table of a device: the user's measurement if there is one, else the shipped table.

        Args:
            device, precision, batch, streams, runtime: Required properties of the table.
            space: The network to predict. A user's table of other networks that lacks its operators does not replace
                the shipped table.

        Raises:
            CompressorError: There is no such device (the message gives the nearest names), or its table is for
                another precision, batch, number of streams or runtime.
        """
        found = find_table(device, precision, space, batch=batch, streams=streams)
        return found.at(precision, batch=batch, streams=streams, runtime=runtime)

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Read a table's file.

        Raises:
            CompressorError: The file is missing, damaged or implausible.
        """
        return cls(read_table(read_text(Path(path), "latency table"), str(path)))

    def to_json(self) -> str:
        """Return the file's text; `read` restores the same table."""
        absent = {"joined"} if self.fields.joined is None else None  # as files of earlier versions
        return self.fields.model_dump_json(indent=1, exclude=absent) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the file atomically."""
        write_atomic(Path(path), self.to_json())

    # ---------------------------------------------------------------- what it is
    @property
    def device(self) -> str:
        """Name of the device, as in --device."""
        return self.fields.device.name

    @property
    def runtime(self) -> str:
        """Name of the runtime, with its version where it is known."""
        return f"{self.fields.runtime.name} {self.fields.runtime.version}".strip()

    @property
    def precision(self) -> str:
        """`fp32`, `fp16`, `int8` or `mixed`."""
        return self.fields.precision

    @property
    def estimated(self) -> bool:
        """Whether the numbers are estimates; they must then be labelled as such wherever they are shown."""
        return self.fields.how == "estimated"

    @cached_property
    def precisions(self) -> tuple[str, ...]:
        """All precisions that `at` accepts."""
        return tuple(self.fields.roofline) or (self.fields.precision,)

    def describe(self) -> str:
        """Return a one-line summary: device, runtime, precision, and whether it is measured, with its error."""
        fields = self.fields
        load = f"batch {fields.batch}" + (f", {fields.streams} streams" if fields.streams > 1 else "")
        line = f"{self.device}, {self.runtime}, {fields.precision}, {load}: {fields.how} on {fields.date}"
        errors = fields.roofline[fields.precision].errors if self.estimated else None
        if errors is not None and errors.left_out_mape is not None:
            line += f", {errors.left_out_mape:.0%} from published latencies that it was not fitted to"
        for network in fields.networks.values():
            if network.held_out is not None:
                held = network.held_out
                line += f", {held.mape:.1%} off on average ({held.worst:.1%} at worst) "
                line += f"on {held.networks} unseen sub-networks{', some without blocks' if network.blocks else ''}"
        return line

    def at(
        self,
        precision: str,
        *,
        batch: int = 1,
        streams: int = 1,
        runtime: str | None = None,
        device: str | None = None,
    ) -> LatencyTable:
        """Return this table for a precision, batch, number of streams, runtime and device; None accepts any.

        Raises:
            CompressorError: The table is for others; the message names the differences.
        """
        fields = self.fields
        requested = {
            "precision": precision,
            "batch": str(batch),
            "number of streams": str(streams),
            "runtime": runtime or fields.runtime.name,
        }
        offered = {
            "precision": ", ".join(self.precisions),
            "batch": str(fields.batch),
            "number of streams": str(fields.streams),
            "runtime": fields.runtime.name,
        }
        if device is not None:
            requested["device"], offered["device"] = device, self.device
        wrong = [name for name in requested if requested[name] not in offered[name].split(", ")]
        if wrong:
            differs = "; ".join(f"{name} is {offered[name]}, not {requested[name]}" for name in wrong)
            fix = f"Measure the device so: compress profile --model MODEL{load_flags(batch, streams)}"
            if wrong == ["precision"]:
                fix = f"Use --precision {self.precisions[0]}, or measure the device: compress profile"
            raise CompressorError(
                f"The latency table of {self.device} does not match the request: its {differs}.", fix
            )
        return LatencyTable(fields.model_copy(update={"precision": precision}))

    # ---------------------------------------------------------------- prediction
    def predict(self, space: PruningSpace, plan: ChannelPlan | None = None) -> float:
        """Return milliseconds for one batch; without a plan those of the dense network, measured if available.

        Raises:
            CompressorError: The table does not cover this network.
        """
        if plan is None:
            return self.dense_ms(space)
        return float(self.curve(space)(space.row(plan)[None])[0])

    def dense_ms(self, space: PruningSpace) -> float:
        """Return the milliseconds of the dense network: measured if available, else predicted."""
        network = self.fields.networks.get(network_signature(space))
        if network is not None:
            return network.dense_ms
        return float(self.curve(space)(np.asarray(space.dense_widths)[None])[0])

    def fitted_dense_ms(self, space: PruningSpace) -> float:
        """Return the dense network's milliseconds by the curve, without refits: the whole of predicted shares.

        The curve errs alike for dense and slim networks, while the dense network's own time is one measurement, which
        may have met a busy machine. In mixed precision it is the dense network in floats.
        """
        if self.fields.joined is not None:
            return LatencyTable(self.fields.joined.floats).fitted_dense_ms(space)
        return float(self.curve(space)(np.asarray(space.dense_widths)[None])[0]) / self.fields.raised

    def curve(self, space: PruningSpace) -> LatencyCurve:
        """Return the latency of all candidates of `space` as a function of their widths.

        Raises:
            CompressorError: The table does not cover this network.
        """
        raised = self.fields.raised
        if self.fields.roofline:
            from compressor.latency.estimate import EstimatedOperators

            fields = self.fields.roofline[self.precision]
            return LatencyCurve(
                space,
                partial(EstimatedOperators.of_space(space).milliseconds, fields, self.precision),
                lambda total, c_in, c_out: raised * (total + fields.network_ms),
            )
        network, priced = self._priced(space)
        stored = network.correction
        correction = Correction(stored.offset_ms, stored.slope, stored.least_ms, stored.bends, stored.weights)
        operators = Operators.of_keys(network.layers)

        def whole(total: Floats, c_in: Floats, c_out: Floats) -> Floats:
            return raised * correction(total, operators.cost(c_in, c_out).weights.sum(axis=1))

        return LatencyCurve(space, priced, whole)

    def in_int8(self, space: PruningSpace, widths: Widths) -> npt.NDArray[np.bool_]:
        """Return which operators of rows of widths are priced in INT8, (N, layers); none without mixed precision."""
        if self.fields.joined is None:
            return np.zeros((len(widths), len(space.layers)), dtype=np.bool_)
        return cheaper(self.fields.joined, space).in_int8(*channels(space, widths))

    def covers(self, space: PruningSpace) -> bool:
        """Whether all candidates of `space` lie inside the measured range."""
        if self.fields.roofline:
            return True
        network, joined = self.fields.networks.get(network_signature(space)), self.fields.joined
        if joined is not None:
            return all(LatencyTable(each).covers(space) for each in (joined.floats, joined.int8))
        if network is None or len(network.layers) != len(space.layers):
            return False
        if space.depth and space.blocks and not self.knows_blocks(space):
            return False
        return not self._uncovered(space, network, [self._surface([key]) for key in network.layers])

    def knows_blocks(self, space: PruningSpace) -> bool:
        """Whether networks without blocks of `space` were measured, or need not be; False if it has no blocks."""
        if self.fields.roofline:
            return bool(space.blocks)
        if self.fields.joined is not None:
            tables = (self.fields.joined.floats, self.fields.joined.int8)
            return all(LatencyTable(each).knows_blocks(space) for each in tables)
        network = self.fields.networks.get(network_signature(space))
        return network is not None and 0 < network.blocks == len(space.blocks)

    def lacks(self, space: PruningSpace) -> str:
        """Explain in one sentence why `space` cannot be predicted; empty if it can."""
        try:
            self.curve(space)
        except CompressorError as error:
            return error.message
        return ""

    def refit(self, samples: Sequence[tuple[float, float]], *, lower: bool = False) -> LatencyTable:
        """Return the table, scaled to networks of its device that were slower than predicted.

        Predictions are scaled so that at every sample they are at least the measured time. By default they are not
        lowered: a network that is faster than predicted still meets its budget.

        Args:
            samples: (predicted, measured) milliseconds; predictions by this table.
            lower: Whether predictions may also be lowered to the measured times.
        """
        ratios = [measured / predicted for predicted, measured in samples]
        factor = max(ratios) if lower and ratios else max([1.0, *ratios])
        return LatencyTable(self.fields.model_copy(update={"raised": self.fields.raised * factor}))

    # ---------------------------------------------------------------- inside
    def _priced(self, space: PruningSpace) -> tuple[NetworkFields, Surfaces | CheaperOperators]:
        """Return the network, and its operators' milliseconds as a function of their channels.

        Raises:
            CompressorError: The table does not cover this network.
        """
        if self.fields.joined is None:
            return self._surfaces(space)
        network = self.fields.networks.get(network_signature(space))
        if network is None:
            raise CompressorError(
                f"The latency table of {self.device} in mixed precision is of another network.",
                "Measure it for this one: compress profile",
            )
        return network, cheaper(self.fields.joined, space)

    def _surfaces(self, space: PruningSpace) -> tuple[NetworkFields, Surfaces]:
        """Return the network and its operators in the one precision of the table."""
        network = self.fields.networks.get(network_signature(space))
        if network is not None:
            entries = [self._surface([key]) for key in network.layers]
        else:
            network, entries = self._assembled(space)
        problem = self._uncovered(space, network, entries)
        if problem:
            raise CompressorError(
                f"The latency table of {self.device} does not cover these widths: {problem}.",
                "Measure it for this space: compress profile",
            )
        return network, Surfaces(entries, self.fields.block, network.correction.factors)

    def _in_networks(self, space: PruningSpace) -> Prices:
        """Return what operators add to a network's time: as under the profiler, scaled to networks without it."""
        network, surfaces = self._surfaces(space)
        curve, dense = self.curve(space), np.asarray(space.dense_widths)[None]
        slope = float(curve(dense)[0] - network.correction.offset_ms) / float(curve.operators(dense).sum())
        return lambda c_in, c_out: slope * surfaces(c_in, c_out)

    def _surface(self, keys: Sequence[str]) -> Surface:
        """Fit the surface to the points of one entry, or of several entries of the same operator."""
        entries = [self.fields.entries[key] for key in keys]
        return fit_surface(
            [count for entry in entries for count in entry.c_in],
            [count for entry in entries for count in entry.c_out],
            [time for entry in entries for time in entry.median_ms],
            self.fields.block,
        )

    def _assembled(self, space: PruningSpace) -> tuple[NetworkFields, list[Surface]]:
        """Assemble an unmeasured network from operators of other networks, ignoring their epilogues.

        Raises:
            CompressorError: An operator was not measured.
        """
        bare: dict[str, list[str]] = {}
        for key in self.fields.entries:
            bare.setdefault(key.split(" +")[0], []).append(key)
        wanted = [signature_of(layer).key for layer in space.layers]
        missing = sorted(set(wanted) - set(bare))
        if missing or not self.fields.networks:
            raise CompressorError(
                f"The latency table of {self.device} lacks {len(missing)} of this network's operators, "
                f"such as: {missing[0] if missing else wanted[0]}.",
                "Measure the network: compress profile --model NAME",
            )
        largest = max(self.fields.networks.values(), key=lambda each: each.dense_ms)
        network = largest.model_copy(
            update={"layers": tuple(bare[key][0] for key in wanted), "granularity": ()}
        )
        surfaces = {key: self._surface(bare[key]) for key in set(wanted)}
        return network, [surfaces[key] for key in wanted]

    def _uncovered(self, space: PruningSpace, network: NetworkFields, surfaces: Sequence[Surface]) -> str:
        """Describe the first part of the space outside the measured range; empty if there is none."""
        least, dense = np.asarray(space.min_widths)[None], np.asarray(space.dense_widths)[None]
        for layer, surface in zip(space.layers, surfaces, strict=True):
            c_in = (int(layer.in_channels(least)[0]), int(layer.in_channels(dense)[0]))
            c_out = (int(layer.out_channels(least)[0]), int(layer.out_channels(dense)[0]))
            if not surface.covers(c_in, c_out):
                return (
                    f"{layer.name} takes {c_in[0]}-{c_in[1]} to {c_out[0]}-{c_out[1]} channels, measured were "
                    f"{surface.inputs[0]}-{surface.inputs[1]} to {surface.outputs[0]}-{surface.outputs[1]}"
                )
        block = self.fields.block
        for group, measured in zip(
            space.groups, network.granularity or [g.granularity for g in space.groups], strict=True
        ):
            if np.gcd(group.granularity, block) % np.gcd(measured, block):
                return f"{group.name} has steps of {group.granularity}, measured were steps of {measured}"
        return ""


def cheaper(joined: JoinedFields, space: PruningSpace) -> CheaperOperators:
    """Return a network's operators in floats or INT8, by the tables of both precisions.

    Raises:
        CompressorError: The tables do not cover the network.
    """
    floats, int8 = (LatencyTable(each)._in_networks(space) for each in (joined.floats, joined.int8))
    elements = joined.floats.batch * Operators(space.layers).in_pixels
    return CheaperOperators(floats, int8, elements, joined.to_int8_ms, joined.to_float_ms)


# ---------------------------------------------------------------- where tables are found
def load_flags(batch: int, streams: int) -> str:
    """Return the flags of `compress profile` for a batch and a number of streams; empty for one of each."""
    return (f" --batch {batch}" if batch > 1 else "") + (f" --streams {streams}" if streams > 1 else "")


def is_address(device: str) -> bool:
    """Whether a device is given by an address that ssh reaches, not by a name."""
    return device.startswith("ssh:")


def check_known(device: str, others: Sequence[str] = ()) -> None:
    """Refuse a device without a table that cannot be measured over ssh either.

    Args:
        device: Name or address of the device.
        others: Names of devices that are measured on first use.

    Raises:
        CompressorError: The device is unknown (the message gives the nearest names), or its address is invalid.
    """
    if is_address(device):
        return check_name(device)
    files = shipped_tables()
    if device == LOCAL or device in files:
        return
    own = {table.device for _, table in user_tables()}
    if device in own:
        return
    near = difflib.get_close_matches(device, [LOCAL, *others, *files, *own], n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise CompressorError(
        f"There is no latency table for the device {device!r}.", f"{hint}See all: compress devices"
    )


def find_table(
    device: str,
    precision: str | None = None,
    space: PruningSpace | None = None,
    *,
    batch: int = 1,
    streams: int = 1,
) -> LatencyTable:
    """Find the table of a device: the user's own if there is one, else the shipped one.

    Args:
        device: Name of the device.
        precision, batch, streams: What the user's table must be for.
        space: The network to predict. A user's table that lacks its operators does not replace the shipped one. It is
            returned if there is no shipped one; its `lacks` then names what is missing.

    Raises:
        CompressorError: There is no table (the message gives the nearest names), or its file is damaged.
    """
    if device == LOCAL:
        raise CompressorError(
            "The device 'local' has no shipped table: it is measured for each network.",
            'Measure it: TableProvider.for_device("local").table(space, input, Request())',
        )
    check_known(device)
    own = find_user_table(device, precision, space, batch=batch, streams=streams)
    shipped_file = shipped_tables().get(device)
    if own is not None and space is not None and network_signature(space) not in own.fields.networks:
        lacks = own.lacks(space)
        if not lacks:
            say(
                f"This network was not measured on {device}: its latency is assembled from operators of other networks."
            )
        elif shipped_file is not None:
            say(
                f"You have measured {device} with other networks only: {lacks} The shipped table is used, so that "
                f"this network's latency is estimated. To measure it: compress profile --model MODEL --device {device} "
                "--bundle DIR"
            )
            own = None
    if own is not None:
        if shipped_file is not None:
            say(
                f"The table of {device} that you measured on {own.fields.date} replaces the shipped one."
            )
        return own
    if shipped_file is not None:
        return LatencyTable.read(shipped_file)
    others = sorted({_measured_in(table) for _, table in user_tables(device)})
    measured = f" It was measured in {' and in '.join(others)}." if others else ""
    wanted = f" in {precision}" if precision else ""
    wanted += f" for batches of {batch}" if batch > 1 else ""
    wanted += f" with {streams} streams" if streams > 1 else ""
    raise CompressorError(
        f"There is no latency table of {device}{wanted}.{measured}",
        f"Measure it: compress profile --model MODEL --device {device}"
        + ("" if is_address(device) else " --bundle DIR")
        + (f" --precision {precision}" if precision else "")
        + load_flags(batch, streams),
    )


def _measured_in(table: LatencyTable) -> str:
    fields = table.fields
    words = f" for batches of {fields.batch}" if fields.batch > 1 else ""
    return f"{table.precision}{words}" + (f" with {fields.streams} streams" if fields.streams > 1 else "")


def shipped_table(device: str) -> LatencyTable | None:
    """Return the table that the toolkit ships for a device, ignoring the user's tables."""
    path = shipped_tables().get(device)
    return LatencyTable.read(path) if path is not None else None


def shipped_tables() -> dict[str, Path]:
    """Return the files of the shipped tables, by device name."""
    return {path.stem: path for path in sorted(shipped("latency_tables").glob("*.json"))}


def tables_folder() -> Path:
    """Return the folder of the user's tables: `$COMPRESSOR_CACHE/tables`, else in the user's data folder."""
    if os.environ.get("COMPRESSOR_CACHE"):
        return Path(os.environ["COMPRESSOR_CACHE"]) / "tables"
    from platformdirs import user_data_dir

    return Path(user_data_dir("compressor")) / "tables"


def check_name(device: str) -> None:
    """Refuse an invalid name for a remote device.

    Raises:
        CompressorError: The name has other characters, or is reserved.
    """
    if is_address(device):
        try:
            parse_destination(device)
        except ExportError as error:
            raise CompressorError(error.message, error.hint) from None
    elif not _NAME.fullmatch(device) or device == LOCAL:
        raise CompressorError(
            f"{device!r} cannot be the name of a device.",
            "Use letters, digits, dots and dashes, and not 'local'.",
        )


def user_tables(device: str | None = None) -> list[tuple[Path, LatencyTable]]:
    """Return the user's tables of one device or of all, the newest last; damaged files are reported and skipped."""
    found = []
    for path in sorted(tables_folder().glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            table = LatencyTable.read(path)
        except CompressorError as error:
            say(f"{error.message} It is skipped; delete it.")
            continue
        if device is None or table.device == device:
            found.append((path, table))
    return found


def find_user_table(
    device: str,
    precision: str | None = None,
    space: PruningSpace | None = None,
    *,
    batch: int = 1,
    streams: int = 1,
) -> LatencyTable | None:
    """Find the user's table of a device; None if there is none.

    Args:
        device: Name of the device.
        precision, batch, streams: Required properties.
        space: The network to predict: tables with this network are preferred, then tables with its operators, then the
            newest.
    """
    fitting = [
        table
        for _, table in user_tables(device)
        if (precision is None or precision in table.precisions)
        and (table.fields.batch, table.fields.streams) == (batch, streams)
    ]
    if space is not None:
        network = network_signature(space)
        measured = [table for table in fitting if network in table.fields.networks]
        fitting = measured or [table for table in fitting if not table.lacks(space)] or fitting
    return fitting[-1] if fitting else None
