"""The latency table of this machine's CPU, measured through ONNX Runtime when it is first asked for.

The sub-networks of `design` are built, exported as they would be delivered, run end to end and profiled. Each
profile gives one point of every operator's grid, each end-to-end time one sample for the whole-network
correction; networks held back from both give the error that the table states.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import CompressorError
from compressor.latency.assemble import RUNTIME, Sample, measure_candidate, table_from
from compressor.latency.cache import cache_folder, measuring_alone, table_path
from compressor.latency.design import anchor_widths, grid_widths, random_widths
from compressor.latency.ort_profile import Device, OrtCpu
from compressor.latency.signature import Widths, network_signature
from compressor.latency.table import LatencyTable
from compressor.progress import bar, say

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.pruning.space import PruningSpace

HELD_OUT = 10
UNSURE = 0.10
"""A mean error on held-out networks that the user should hear of."""

ATTEMPTS = 3
NOISY = 0.15
"""A change of the dense network's time between start and end that is worth a warning."""


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

    Args:
        space: The network is measured as `space.model` is, with random widths among the space's legal ones.
        example_input: A batch of one, of the shape that the network is delivered for.
        threads: Threads of ONNX Runtime.
        cache_dir: Where tables are kept; by default `$COMPRESSOR_CACHE` or the user's cache folder.
        time_limit_s: No further sub-network is begun after this many seconds; a dozen are measured in any case.
        seed: Which sub-networks are measured.
        device: What runs the networks instead of ONNX Runtime on this CPU; nothing is cached then.

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
        if _true_still(known, space, example_input, OrtCpu(threads)):
            return known
        path.unlink(missing_ok=True)
    with measuring_alone(folder):
        known = _cached(path, quiet=True)  # another process may have measured it while this one waited
        if known is not None and known.covers(space):
            return known
        table = _measured(space, example_input, OrtCpu(threads), time_limit_s, seed, threads)
        if known is not None and network in known.fields.networks:
            table = _with_dense_of(table, known, network)
        table.write(path)
    held = table.fields.networks[network].held_out
    if held is not None and held.mape > UNSURE:
        say(
            f"The table is {held.mape:.0%} off on sub-networks that it has not seen: this machine was busy, or is hard "
            f"to predict. To have it measured again, delete {path}"
        )
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


def _true_still(known: LatencyTable, space: PruningSpace, example: Tensor, device: Device) -> bool:
    """Whether the dense network still takes the time that the table was made at.

    A table of a busy or throttled machine would have `50%` mean more than the whole of the dense network on a quiet
    one. A busy moment now is given two more chances.
    """
    dense = np.asarray(space.dense_widths, dtype=np.int64)
    then = known.dense_ms(space)
    for _ in range(ATTEMPTS):
        now = measure_candidate(space, space.rank(), example, dense, device).times.median_ms
        if abs(now / then - 1) <= NOISY:
            return True
    say(
        f"The dense network takes {now:.3g} ms, and {then:.3g} ms when this machine's table was made: it is made anew."
    )
    return False


def _with_dense_of(table: LatencyTable, known: LatencyTable, network: str) -> LatencyTable:
    """Keep the dense network's first time, so that `50%` means the same in every run on this machine."""
    old, new = known.fields.networks[network], table.fields.networks[network]
    kept = new.model_copy(update={"dense_ms": old.dense_ms, "dense_p90_ms": old.dense_p90_ms})
    return LatencyTable(table.fields.model_copy(update={"networks": {network: kept}}))


def _measured(
    space: PruningSpace, example: Tensor, device: Device, limit_s: float, seed: int, threads: int
) -> LatencyTable:
    """Measure and fit, with nothing read from the cache or written to it."""
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
    return table_from(space, samples, unseen, drift, time.monotonic() - started, threads)


def _interleaved(fitted: Widths, held: Widths) -> list[tuple[bool, Widths]]:
    """(held out?, widths): both kinds spread evenly, so that a time limit cuts both alike."""
    queue = [((index + 0.5) / len(fitted), False, row) for index, row in enumerate(fitted)]
    queue += [((index + 0.5) / len(held), True, row) for index, row in enumerate(held)]
    return [(is_held, row) for _, is_held, row in sorted(queue, key=lambda item: item[0])]
