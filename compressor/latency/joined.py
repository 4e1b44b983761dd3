"""The table of networks in mixed precision: those of floats and INT8, the conversions, and networks that were measured.

The tables of both precisions are measured, or read where they are kept, as for runs in one precision. What is measured
in addition belongs to mixed precision alone: the time of conversions, and sub-networks with each part in its faster
precision (`precisions.fastest`), in turns with the dense network in floats: FP32 on a CPU, FP16 with TensorRT. To these
the correction of whole networks is fitted, as shares of the dense network's time: the load of the moment does not enter
them. Some are held out for the error that the table states.

Devices differ in what times a network (`MixingDevice.shares`): a runner of this machine, or bundles over ssh. Each
measurement is written down at once, so that an interrupted table continues.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from compressor.core.files import cache_folder
from compressor.core.progress import bar, say
from compressor.latency.assemble import (
    SECONDS_A_NETWORK,
    Sample,
    correction_fields,
    export_candidate,
    held_out_fields,
    load_words,
    with_batch,
)
from compressor.latency.fit import Floats, fit_correction
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.operators import Operators, Widths, channels, network_signature
from compressor.latency.precisions import measured_conversions
from compressor.latency.remote_bundle import repeating
from compressor.latency.sampling import anchor_widths, ends_of_depth, mixed_roles, random_widths, with_blocks
from compressor.latency.schema import JoinedFields, Precision, TableFields, possible
from compressor.latency.stored import Journal, Record, Role, cached_table, heading_of, measuring_alone
from compressor.latency.table import LatencyTable, cheaper
from export.convert.to_onnx import DEFAULT_OPSET

if TYPE_CHECKING:
    from compressor.latency.precisions import PrecisionTimer
    from compressor.latency.request import Request
    from compressor.pruning.space import PruningSpace

FITTED = 14
"""Random networks that the correction is fitted to, besides those of `anchor_widths` and the dense one."""

HELD_OUT = 6
LEAST = 10
"""Fewest networks that are measured whatever the time limit."""

ATTEMPTS = 2
"""Measurements of a network where the processor is slowed; the least slowed one counts."""


@dataclass(frozen=True)
class Shares:
    """What times networks in mixed precision on a device.

    Attributes:
        of: Returns the time of an FP32 network with each part in its faster precision, as a share of the time of the
            dense network in floats.
        how: How long each network runs, and when the dense one does, for the table's protocol.
    """

    of: Callable[[TaggedNetwork], float]
    how: str


class MixingDevice(Protocol):
    """A device on which networks run in floats, in INT8 and in mixed precision; see `TableProvider`.

    Attributes:
        cache_dir: Folder of the cache; None for the usual one.
    """

    is_here: ClassVar[bool]
    cache_dir: str | Path | None

    def table(self, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
        """Return the table in one precision."""

    def table_file(self, space: PruningSpace, request: Request) -> Path:
        """Return the file of a network's table."""

    def limit_s(self, request: Request) -> float:
        """Return the seconds after which no further network is started."""

    def precision_timer(self, request: Request) -> PrecisionTimer:
        """Return what times a network's parts in floats and in INT8."""

    def shares(self, dense: TaggedNetwork, request: Request, floats: LatencyTable) -> Shares:
        """Return what times networks in mixed precision.

        Args:
            dense: The dense network in FP32.
            request: What the table is needed for.
            floats: The table in floats: the device is in its state, and the dense network in its precision.
        """


def joined_table(device: MixingDevice, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
    """Return the table of a device in mixed precision: the stored one if it was made of its present tables.

    Args:
        device: The device.
        space, example, request: As in `TableProvider.table`.
    """
    timer = device.precision_timer(request)
    kinds: tuple[Precision, ...] = (timer.floats, "int8")
    floats, int8 = (device.table(space, example, replace(request, precision=each)) for each in kinds)
    path, parts = device.table_file(space, request), (floats.fields, int8.fields)

    def stored(quiet: bool) -> LatencyTable | None:
        known = cached_table(path, quiet=quiet)
        joined = None if known is None else known.fields.joined
        return known if joined is not None and (joined.floats, joined.int8) == parts else None

    if (known := stored(quiet=False)) is not None:
        return known
    with measuring_alone(cache_folder(device.cache_dir)):
        if (known := stored(quiet=True)) is not None:  # another process may have measured it while this one waited
            return known
        say("Measuring this network in mixed precision.")
        parts_now = hashlib.sha256("".join(each.model_dump_json() for each in parts).encode()).hexdigest()
        heading = heading_of(space, request.seed, tables=parts_now)
        journal = Journal(path.with_suffix(".partial.jsonl"), heading)
        table = _measured(device, space, with_batch(example, request.batch), request, timer, parts, journal)
        table.write(path)
        journal.close()
        return table


@possible()
def _measured(
    device: MixingDevice,
    space: PruningSpace,
    example: Any,
    request: Request,
    timer: PrecisionTimer,
    parts: tuple[TableFields, TableFields],
    journal: Journal,
) -> LatencyTable:
    """Time conversions and networks in mixed precision, and fit the correction of whole networks.

    Args:
        device, space, request, timer: As in `joined_table`.
        example: The network's arguments for one batch.
        parts: The tables in floats and in INT8.
        journal: Earlier measurements, and those to come.
    """
    floats, int8 = parts
    began, ranking, name = time.monotonic(), space.rank(), network_signature(space)
    if journal.records:
        began -= journal.records[-1].at_s
        say(f"Continuing with {len(journal.records)} earlier measurements.")
    opset = DEFAULT_OPSET if device.is_here else request.opset

    def export(widths: Widths) -> TaggedNetwork:
        network = export_candidate(space, ranking, example, widths, opset=opset)
        return network if device.is_here else replace(network, model=repeating(network.model))

    kind = timer.floats.upper()
    dense, narrow = (export(np.asarray(each)) for each in (space.dense_row, space.min_widths))
    found = measured_conversions([dense.model, narrow.model], timer)
    joined = JoinedFields(floats=floats, int8=int8, to_int8_ms=found.to_int8, to_float_ms=found.to_float)
    table = LatencyTable(floats)
    unit, shares = table.fitted_dense_ms(space), device.shares(dense, request, table)
    wanted = _networks(space, request.seed)
    with bar("Measuring mixed precision", len(wanted)) as progress:
        progress.advance(len(journal.records))
        for role, widths in wanted[len(journal.records) :]:
            at_s = time.monotonic() - began
            if len(journal.records) >= LEAST and at_s > device.limit_s(request):
                break
            network = export(widths)
            share = shares.of(network)
            c_in, c_out = (each[0] for each in channels(space, widths[None]))
            times = NetworkTimes(np.asarray([unit * share]), np.zeros((0, network.operators)))
            row = tuple(int(width) for width in widths)
            journal.add(Record(role, row, Sample(c_in, c_out, network, times), time.monotonic() - began))
            progress.advance(1, f"{share:.3f} of the dense network in {kind}")
    fitted, held = ([each.sample for each in journal.records if each.role == role] for role in ("fit", "held"))
    known, priced = floats.networks[name], cheaper(joined, space)
    operators = Operators.of_keys(known.layers)

    def sums(samples: Sequence[Sample]) -> tuple[Floats, Floats]:
        """Return the operators' milliseconds and weight elements of each network."""
        c_in, c_out = np.stack([each.c_in for each in samples]), np.stack([each.c_out for each in samples])
        return priced(c_in, c_out).sum(axis=1), operators.cost(c_in, c_out).weights.sum(axis=1)

    def times_ms(samples: Sequence[Sample]) -> list[float]:
        return [each.times.median_ms for each in samples]

    totals, weights = sums(fitted)
    correction = fit_correction(totals.tolist(), weights.tolist(), times_ms(fitted))
    fields = {
        "correction": correction_fields(correction),
        "fitted_networks": len(fitted),
        "held_out": held_out_fields(correction(*sums(held)).tolist(), times_ms(held)),
        "seconds": round(time.monotonic() - began, 1),
    }
    return LatencyTable(
        TableFields(
            device=floats.device,
            runtime=floats.runtime,
            precision="mixed",
            batch=floats.batch,
            streams=floats.streams,
            date=datetime.now(timezone.utc).date().isoformat(),
            how="measured",
            protocol=f"tables in {kind} and INT8, and {len(fitted)} measurements of sub-networks with each part in the "
            f"faster one, {shares.how} in {kind}; {len(held)} networks were held out"
            + load_words(request.batch, request.streams),
            sources=tuple(dict.fromkeys((*floats.sources, *int8.sources))),
            block=floats.block,
            networks={name: known.model_copy(update=fields)},
            joined=joined,
        )
    )


def share_of(dense: Callable[[float], NetworkTimes], mixed: Callable[[float], NetworkTimes]) -> float:
    """Return the time of a network as a share of the dense one's; measured again if the processor was slowed.

    Args:
        dense, mixed: Measure the networks for a number of seconds.
    """
    found: list[tuple[float, float]] = []
    for _ in range(ATTEMPTS):
        whole, part = (measure(SECONDS_A_NETWORK) for measure in (dense, mixed))
        found.append((max(whole.slowdown, part.slowdown), part.median_ms / whole.median_ms))
        if whole.undisturbed and part.undisturbed:
            break
    return min(found)[1]


def _networks(space: PruningSpace, seed: int) -> list[tuple[Role, Widths]]:
    """Return the sub-networks to measure: the dense one, and the others in random order, both roles evenly mixed."""
    held = with_blocks(space, random_widths(space, HELD_OUT, seed=seed + 2), seed=seed + 2)
    drawn = with_blocks(space, random_widths(space, FITTED, seed=seed + 3), seed=seed + 3)
    others = np.concatenate([*ends_of_depth(space, anchor_widths(space)), drawn])
    others = np.random.default_rng(seed).permutation(others, axis=0)
    return [("fit", np.asarray(space.dense_row)), *mixed_roles(others, held)]
