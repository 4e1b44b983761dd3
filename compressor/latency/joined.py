"""The table of networks in mixed precision: those of floats and INT8, the conversions, and networks that were measured.

The tables of both precisions are measured, or read from the cache, as for runs in one precision. What is measured in
addition belongs to mixed precision alone: the time of conversions, and sub-networks with each part in its faster
precision (`precisions.fastest`), in turns with the dense network in floats: FP32 on a CPU, FP16 with TensorRT. To these
the correction of whole networks is fitted, as shares of the dense network's time: the load of the moment does not enter
them. Some are held out for the error that the table states.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.files import cache_folder
from compressor.core.progress import bar, say
from compressor.latency.assemble import (
    SECONDS_A_NETWORK,
    correction_fields,
    export_candidate,
    held_out_fields,
    load_words,
    with_batch,
)
from compressor.latency.fit import Floats, fit_correction
from compressor.latency.operators import Operators, Widths, channels, network_signature
from compressor.latency.precisions import measured_conversions
from compressor.latency.sampling import anchor_widths, ends_of_depth, mixed_roles, random_widths, with_blocks
from compressor.latency.schema import JoinedFields, Precision, TableFields, possible
from compressor.latency.stored import Role, cached_table, measuring_alone
from compressor.latency.table import LatencyTable, cheaper

if TYPE_CHECKING:
    from compressor.latency.measured import MeasuredDevice
    from compressor.latency.networks import NetworkTimes
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


def joined_table(device: MeasuredDevice, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
    """Return the table of a device in mixed precision: from the cache if it was made of its present tables.

    Args:
        device: Has tables in floats and in int8, a timer of precisions, and a runner of networks in mixed precision.
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
        table = _measured(device, space, with_batch(example, request.batch), request, timer, *parts)
        table.write(path)
        return table


@possible()
def _measured(
    device: MeasuredDevice,
    space: PruningSpace,
    example: Any,
    request: Request,
    timer: PrecisionTimer,
    floats: TableFields,
    int8: TableFields,
) -> LatencyTable:
    """Time conversions and networks in mixed precision, and fit the correction of whole networks."""
    began, ranking, name = time.monotonic(), space.rank(), network_signature(space)
    kinds: tuple[Precision, ...] = (timer.floats, "mixed")
    kind = timer.floats.upper()
    in_floats, mixed = (device.runner(replace(request, precision=each)) for each in kinds)
    dense = export_candidate(space, ranking, example, space.dense_row)
    narrow = export_candidate(space, ranking, example, np.asarray(space.min_widths))
    found = measured_conversions([dense.model, narrow.model], timer)
    joined = JoinedFields(floats=floats, int8=int8, to_int8_ms=found.to_int8, to_float_ms=found.to_float)
    unit = LatencyTable(floats).fitted_dense_ms(space)
    rows: dict[Role, list[Widths]] = {"fit": [], "held": []}
    times: dict[Role, list[float]] = {"fit": [], "held": []}
    wanted = _networks(space, request.seed)
    with bar("Measuring mixed precision", len(wanted)) as progress:
        for place, (role, widths) in enumerate(wanted):
            if place >= LEAST and time.monotonic() - began > device.limit_s(request):
                break
            network = export_candidate(space, ranking, example, widths)
            share = _share(partial(in_floats.measure, dense), partial(mixed.measure, network))
            rows[role].append(widths)
            times[role].append(unit * share)
            progress.advance(1, f"{share:.3f} of the dense network in {kind}")
    known, priced = floats.networks[name], cheaper(joined, space)
    operators = Operators.of_keys(known.layers)

    def sums(role: Role) -> tuple[Floats, Floats]:
        """Return the operators' milliseconds and weight elements of each network."""
        c_in, c_out = channels(space, np.stack(rows[role]))
        return priced(c_in, c_out).sum(axis=1), operators.cost(c_in, c_out).weights.sum(axis=1)

    totals, weights = sums("fit")
    correction = fit_correction(totals.tolist(), weights.tolist(), times["fit"])
    fields = {
        "correction": correction_fields(correction),
        "fitted_networks": len(rows["fit"]),
        "held_out": held_out_fields(correction(*sums("held")).tolist(), times["held"]),
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
            protocol=f"tables in {kind} and INT8, and {len(rows['fit'])} measurements of sub-networks with each part "
            f"in the faster one, each for {SECONDS_A_NETWORK} s after the dense network in {kind}; "
            f"{len(rows['held'])} networks were held out{load_words(request.batch, request.streams)}",
            block=floats.block,
            networks={name: known.model_copy(update=fields)},
            joined=joined,
        )
    )


def _share(dense: Callable[[float], NetworkTimes], mixed: Callable[[float], NetworkTimes]) -> float:
    """Return the time of a network as a share of the dense one's; measured again if the processor was slowed."""
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
