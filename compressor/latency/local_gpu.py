"""The latency table of this machine's GPU, measured on first use, as `local` measures the CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.core.files import cache_folder
from compressor.core.progress import say
from compressor.latency.assemble import Sample, measure_candidate, table_from
from compressor.latency.backends import device_of
from compressor.latency.cache import cached_table, measuring_alone, table_path
from compressor.latency.fused import fitted_shares
from compressor.latency.journal import Journal, heading_of
from compressor.latency.local import GOAL, meets_goal, resume_journal, still_valid, warn_of_noise
from compressor.latency.ort_profile import NetworkTimes
from compressor.latency.provenance import SECONDS_A_NETWORK, Provenance
from compressor.latency.remote_bundle import Precision
from compressor.latency.sampling import TooNoisy, collect
from compressor.latency.schema import BLOCKS, DeviceFields, RuntimeFields
from compressor.latency.signature import Widths, network_signature
from compressor.latency.table import LatencyTable
from export.device.here import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.pruning.space import PruningSpace

TIME_LIMIT_S = 600.0
"""Longer than for a CPU: an engine takes seconds to a minute to build, and then runs for half a second."""


def gpu_table(
    space: PruningSpace,
    example: Tensor,
    backend: Backend,
    precision: Precision,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    goal: float = GOAL,
    seed: int = 0,
) -> LatencyTable:
    """Return the table for the networks of `space` on this machine's GPU, from the cache or measured now.

    Args:
        space, example: The networks, and an input batch of size one.
        backend, precision: Backend and precision that the networks run in.
        time_limit_s, goal, seed: As in `local_table`; the default limit is longer, because engines take long to build.

    Raises:
        CompressorError: A network cannot be exported, built or run, or the GPU's speed is not stable.
    """
    network, folder = network_signature(space), cache_folder()
    plain = re.sub(r"[^A-Za-z0-9]+", "-", backend.gpu.name).strip("-")
    path = table_path(
        folder,
        runtime=f"{backend.runtime}-{precision}-{plain}",
        version=backend.version,
        threads=0,
        network=network,
    )

    def good(known: LatencyTable) -> bool:
        return known.covers(space) and meets_goal(known, network, goal, time_limit_s, TIME_LIMIT_S)

    known = cached_table(path)
    if known is not None and good(known):
        if still_valid(known, space, example, device_of(backend, precision)):
            return known
        path.unlink(missing_ok=True)
    with measuring_alone(folder):
        known = cached_table(path, quiet=True)  # another process may have measured it while this one waited
        if known is not None and good(known):
            return known
        table = measured_table(
            space, example, backend, precision,
            time_limit_s=time_limit_s, goal=goal, seed=seed, journal_path=path.with_suffix(".partial.jsonl"),
        )  # fmt: skip
        table.write(path)
    return table


def measured_table(
    space: PruningSpace,
    example: Tensor,
    backend: Backend,
    precision: Precision,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    goal: float = GOAL,
    seed: int = 0,
    journal_path: Path | None = None,
) -> LatencyTable:
    """Measure and fit a table. Only the journal of an interrupted attempt is reused, no cached table.

    A network that cannot be built or run ends the measurement; earlier measurements are kept for the next attempt.
    Measurements of a GPU whose speed is not stable are discarded.
    """
    device, ranking, gpu = device_of(backend, precision), space.rank(), backend.gpu
    heading = heading_of(
        space, seed, device=gpu.name, compute_capability=gpu.compute_capability, driver=gpu.driver,
        backend=backend.kind, version=backend.version, precision=precision,
    )  # fmt: skip
    journal, block = Journal(journal_path, heading), BLOCKS.get(precision, 1)

    def measure(widths: Widths) -> Sample:
        return measure_candidate(space, ranking, example, widths, device)

    def ready(samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples if _operators_timed(samples) else _fitted(space, samples, block)

    if journal.records:
        resume_journal(journal, space, example, device)
    else:
        say(
            f"Measuring this network on {gpu.name} with {backend.runtime}; the table is kept for the next run."
        )
    try:
        samples = collect(
            space, measure, journal, time_limit_s=time_limit_s, goal=goal, seed=seed, block=block, ready=ready
        )
    except TooNoisy as error:
        journal.restart()
        raise TooNoisy(
            error.message, "Keep the GPU cool and free of other work, hold its clocks, and try again."
        ) from None
    warn_of_noise(samples)
    fitted, unseen = samples.to_fit(), list(samples.held.values())
    how = (
        "layers under the profiler"
        if _operators_timed(fitted)
        else "operators by a fit of arithmetic, traffic and launches"
    )
    provenance = Provenance(
        device=DeviceFields(
            name="local",
            sku=gpu.name,
            compute_capability=gpu.compute_capability,
            clocks=f"GPU at most {gpu.clock_mhz} MHz",
        ),
        runtime=RuntimeFields(name=backend.runtime, version=backend.version),
        precision=precision,
        block=block,
        protocol=(
            f"{len(fitted)} measurements of sub-networks through {backend.kind}, each built, warmed up and run for "
            f"{SECONDS_A_NETWORK} s; {how}; {len(unseen)} networks were held out; the dense network first, every "
            "dozen, and last; a network that came out much slower than predicted was measured again, and its least "
            "disturbed time counts"
        ),
        sources=(f"driver for CUDA {gpu.driver}",),
    )
    table = table_from(space, ready(fitted), unseen, samples.drift, samples.seconds, 0, provenance)
    journal.close()
    return table


def _operators_timed(samples: Sequence[Sample]) -> bool:
    """Whether the device timed the operators of all these networks one by one."""
    return all(len(sample.times.operators_ms) for sample in samples)


def _fitted(space: PruningSpace, samples: Sequence[Sample], block: int) -> list[Sample]:
    """Return the samples with operator times fitted to their end-to-end times."""
    c_in, c_out = np.stack([each.c_in for each in samples]), np.stack([each.c_out for each in samples])
    whole = np.asarray([each.times.median_ms for each in samples])
    shares = fitted_shares(space.layers, c_in, c_out, whole, block)
    return [
        Sample(each.c_in, each.c_out, each.network, NetworkTimes(each.times.whole_ms, share[None]))
        for each, share in zip(samples, shares, strict=True)
    ]
