"""The latency table of this machine's CPU, measured through ONNX Runtime when it is first asked for.

The sub-networks of `design` are built, exported as they would be delivered, run end to end and profiled. Each
profile gives one point of every operator's grid, each end-to-end time one sample for the whole-network
correction; networks held back from both give the error that the table states.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import CompressorError
from compressor.latency.cache import cache_folder, cpu_model, governor, measuring_alone, table_path
from compressor.latency.correction import fit_correction, held_out_error
from compressor.latency.design import anchor_widths, grid_widths, random_widths
from compressor.latency.ort_profile import (
    Device,
    NetworkTimes,
    OrtCpu,
    TaggedNetwork,
    channel_block,
    middle,
    tag,
)
from compressor.latency.schema import (
    CorrectionFields,
    DeviceFields,
    Entry,
    HeldOutFields,
    NetworkFields,
    RuntimeFields,
    TableFields,
    rounded,
)
from compressor.latency.signature import Widths, channels, network_signature, signature_of
from compressor.latency.surface import Surfaces, fit_surface
from compressor.latency.table import LatencyTable
from compressor.progress import bar, say
from export.errors import ExportError
from export.to_onnx import export_onnx

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.pruning.importance import Ranking
    from compressor.pruning.space import PruningSpace

RUNTIME = "onnxruntime-cpu"
HELD_OUT = 10
SECONDS_A_NETWORK = 0.5
NOISY = 0.15
"""A change of the dense network's time between start and end that is worth a warning."""

Point = tuple[str, int, int]
"""An operator's entry and its channels: (key, c_in, c_out)."""


def local_table(
    space: PruningSpace,
    example_input: Tensor,
    *,
    threads: int = 1,
    cache_dir: str | Path | None = None,
    time_limit_s: float = 75.0,
    seed: int = 0,
    device: Device | None = None,
) -> LatencyTable:
    """This machine's table for the networks of `space`, from the cache or measured now.

    Args: space: The network is measured as `space.model` is, with random widths among the space's legal ones.
        example_input: A batch of one, of the shape that the network is delivered for. threads: Threads of
        ONNX Runtime. cache_dir: Where tables are kept; by default `$COMPRESSOR_CACHE` or the user's cache
        folder. time_limit_s: No further sub-network is begun after this many seconds; a dozen are measured in
        any case. seed: Which sub-networks are measured. device: What runs the networks instead of ONNX
        Runtime on this CPU; nothing is cached then.

    Raises:
        CompressorError: the network cannot be exported or run, or the cache folder cannot be written.
    """
    if tuple(example_input.shape[:1]) != (1,):
        raise CompressorError(
            f"A latency table of this machine is for one input at a time, got a batch of {tuple(example_input.shape)}."
        )
    if device is not None:
        return _measured(space, example_input, device, time_limit_s, seed, threads)
    import onnxruntime

    folder = cache_folder(cache_dir)
    network = network_signature(space)
    path = table_path(
        folder, runtime=RUNTIME, version=onnxruntime.__version__, threads=threads, network=network
    )
    if (known := _cached(path)) is not None and known.covers(space):
        return known
    with measuring_alone(folder):
        known = _cached(path, quiet=True)  # another process may have measured it while this one waited
        if known is not None and known.covers(space):
            return known
        table = _measured(space, example_input, OrtCpu(threads), time_limit_s, seed, threads)
        if known is not None and network in known.fields.networks:
            table = _with_dense_of(table, known, network)
        table.write(path)
    return table


def _cached(path: Path, *, quiet: bool = False) -> LatencyTable | None:
    """The table in the cache; None where there is none or it is damaged, which is said."""
    if not path.exists():
        return None
    try:
        return LatencyTable.read(path)
    except CompressorError as error:
        if not quiet:
            say(f"{error.message} It is measured anew.")
        return None


def _with_dense_of(table: LatencyTable, known: LatencyTable, network: str) -> LatencyTable:
    """Keep the dense network's first time, so that `50%` means the same in every run on this machine."""
    old, new = known.fields.networks[network], table.fields.networks[network]
    kept = new.model_copy(update={"dense_ms": old.dense_ms, "dense_p90_ms": old.dense_p90_ms})
    return LatencyTable(table.fields.model_copy(update={"networks": {network: kept}}))


@dataclass(frozen=True)
class Sample:
    """One measured sub-network.

    Attributes:
        c_in, c_out: Channels of each of the space's layers, (layers,).
        network: What was run.
        times: How long it took.
    """

    c_in: Widths
    c_out: Widths
    network: TaggedNetwork
    times: NetworkTimes


def _measured(
    space: PruningSpace, example: Tensor, device: Device, limit_s: float, seed: int, threads: int
) -> LatencyTable:
    started = time.monotonic()
    dense = np.asarray(space.dense_widths, dtype=np.int64)
    held = random_widths(space, HELD_OUT, seed=seed + 1)
    fitted = np.concatenate([anchor_widths(space), grid_widths(space, seed=seed)])
    queue = _interleaved(fitted, held)
    ranking = space.rank()
    samples: list[Sample] = []
    unseen: list[Sample] = []
    say("Measuring this network's operators on this machine; the table is kept for the next run.")
    with bar("Measuring latency", len(queue) + 2) as progress:
        first = measure_candidate(space, ranking, example, dense, device)
        samples.append(first)
        progress.advance(1, f"dense {first.times.median_ms:.3g} ms")
        for count, (is_held, widths) in enumerate(queue):
            if time.monotonic() - started > limit_s and count >= 12:
                break
            sample = measure_candidate(space, ranking, example, widths, device)
            (unseen if is_held else samples).append(sample)
            progress.advance(1, f"{sample.times.median_ms:.3g} ms")
        last = measure_candidate(space, ranking, example, dense, device)
        samples.append(last)
        progress.advance(1)
    drift = last.times.median_ms / first.times.median_ms - 1.0
    if abs(drift) > NOISY:
        say(
            f"This machine was not quiet: the dense network took {drift:+.0%} at the end. Predictions suffer."
        )
    return _table(space, samples, unseen, drift, time.monotonic() - started, threads)


def _interleaved(fitted: Widths, held: Widths) -> list[tuple[bool, Widths]]:
    """(held out?, widths): both kinds spread evenly, so that a time limit cuts both alike."""
    queue = [((index + 0.5) / len(fitted), False, row) for index, row in enumerate(fitted)]
    queue += [((index + 0.5) / len(held), True, row) for index, row in enumerate(held)]
    return [(is_held, row) for _, is_held, row in sorted(queue, key=lambda item: item[0])]


def measure_candidate(
    space: PruningSpace, ranking: Ranking, example: Tensor, widths: Widths, device: Device
) -> Sample:
    """Build, export and measure one sub-network."""
    small = space.apply(space.plan(widths, ranking))
    with tempfile.TemporaryDirectory(prefix="compressor-latency-") as folder:
        path = Path(folder) / "network.onnx"
        try:
            export_onnx(small, example, path)
            network = tag(path)
            times = device.measure(network, SECONDS_A_NETWORK)
        except ExportError as error:
            raise CompressorError(f"The network cannot be measured: {error.message}", error.hint) from error
    c_in, c_out = channels(space, widths[None])
    if network.operators != c_in.shape[1]:
        raise CompressorError(
            f"The exported network has {network.operators} weight-bearing operators, the pruning space "
            f"{c_in.shape[1]}: they cannot be matched.",
            "Give the budget in --flops or --params instead of --latency.",
        )
    return Sample(c_in[0], c_out[0], network, times)


def _table(
    space: PruningSpace,
    samples: Sequence[Sample],
    unseen: Sequence[Sample],
    drift: float,
    seconds: float,
    threads: int,
) -> LatencyTable:
    import onnxruntime

    block = channel_block()
    layers = [
        signature_of(layer, epilogue).key
        for layer, epilogue in zip(space.layers, samples[0].network.epilogues, strict=True)
    ]
    entries = _entries(layers, samples)
    surfaces = Surfaces(
        [fit_surface(entries[key].c_in, entries[key].c_out, entries[key].median_ms, block) for key in layers],
        block,
    )

    def total(of: Sequence[Sample]) -> list[float]:
        sums = surfaces(np.stack([each.c_in for each in of]), np.stack([each.c_out for each in of])).sum(
            axis=1
        )
        return [float(value) for value in sums]

    def measured(of: Sequence[Sample]) -> list[float]:
        return [each.times.median_ms for each in of]

    correction = fit_correction(total(samples), measured(samples))
    held = None
    if unseen:
        error = held_out_error([float(correction(value)) for value in total(unseen)], measured(unseen))
        held = HeldOutFields.model_validate({name: rounded(value) for name, value in vars(error).items()})
    dense = np.concatenate([samples[0].times.whole_ms, samples[-1].times.whole_ms])
    network = NetworkFields(
        layers=tuple(layers),
        dense_ms=rounded(float(np.median(dense))),
        dense_p90_ms=rounded(float(np.quantile(dense, 0.9))),
        drift=round(drift, 4),
        correction=CorrectionFields(
            offset_ms=rounded(correction.offset),
            slope=rounded(correction.slope),
            least_ms=rounded(correction.least),
        ),
        fitted_networks=len(samples),
        held_out=held,
        seconds=round(seconds, 1),
        granularity=tuple(group.granularity for group in space.groups),
    )
    return LatencyTable(
        TableFields(
            device=DeviceFields(name="local", sku=cpu_model(), power_mode=governor()),
            runtime=RuntimeFields(name=RUNTIME, version=onnxruntime.__version__, threads=threads),
            precision="fp32",
            date=datetime.now(timezone.utc).date().isoformat(),
            how="measured",
            protocol=(
                f"{len(samples)} sub-networks in a random order, each warmed up and run for {SECONDS_A_NETWORK} s: "
                "end to end, then under ONNX Runtime's profiler (mean of the middle half of the runs), then end to "
                f"end again; {len(unseen)} more were held out; the dense network first and last; runs that other "
                "processes interrupted do not count"
            ),
            block=block,
            entries=entries,
            networks={network_signature(space): network},
        )
    )


def _entries(layers: Sequence[str], samples: Sequence[Sample]) -> dict[str, Entry]:
    """One point for each operator and pair of channels; layers with the same signature share theirs."""
    found: dict[Point, list[tuple[int, float, float, float]]] = defaultdict(list)
    for sample in samples:
        for index, key in enumerate(layers):
            times = sample.times.operators_ms[:, index]
            point = (key, int(sample.c_in[index]), int(sample.c_out[index]))
            found[point].append(
                (len(times), middle(times), float(np.quantile(times, 0.9)), float(times.std()))
            )
    rows: dict[str, list[tuple[int, int, int, tuple[float, ...]]]] = defaultdict(list)
    for (key, c_in, c_out), values in sorted(found.items()):
        runs, *times_ms = zip(*values, strict=True)
        medians = tuple(rounded(float(np.median(column))) for column in times_ms)
        rows[key].append((c_in, c_out, int(sum(runs)), medians))
    return {
        key: Entry(
            c_in=tuple(row[0] for row in points),
            c_out=tuple(row[1] for row in points),
            n=tuple(row[2] for row in points),
            median_ms=tuple(row[3][0] for row in points),
            p90_ms=tuple(row[3][1] for row in points),
            std_ms=tuple(row[3][2] for row in points),
        )
        for key, points in rows.items()
    }
