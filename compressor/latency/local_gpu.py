"""The latency table of this machine's GPU, measured when it is first asked for, as `local` measures its CPU."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import numpy as np

from compressor.latency.assemble import Sample, measure_candidate, table_from
from compressor.latency.backends import device_of
from compressor.latency.cache import cache_folder, cached_table, measuring_alone, table_path
from compressor.latency.carried import require_steady
from compressor.latency.carry import DENSE, Precision, candidate_rows
from compressor.latency.fused import fitted_shares
from compressor.latency.made import Made
from compressor.latency.ort_profile import NetworkTimes
from compressor.latency.schema import BLOCKS, DeviceFields, RuntimeFields
from compressor.latency.signature import network_signature
from compressor.latency.table import LatencyTable
from compressor.progress import bar, say
from export.here import Backend

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.pruning.space import PruningSpace


def gpu_table(
    space: PruningSpace, example: Tensor, backend: Backend, precision: Precision, *, seed: int = 0
) -> LatencyTable:
    """This machine's table for the networks of `space` on its GPU, from the cache or measured now.

    Raises:
        CompressorError: a network cannot be exported, built or run, or the GPU does not hold still.
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
    known = cached_table(path)
    if known is not None and known.covers(space):
        return known
    with measuring_alone(folder):
        known = cached_table(path, quiet=True)  # another process may have measured it while this one waited
        if known is not None and known.covers(space):
            return known
        table = measured_table(space, example, backend, precision, seed=seed)
        table.write(path)
    return table


def measured_table(
    space: PruningSpace, example: Tensor, backend: Backend, precision: Precision, *, seed: int = 0
) -> LatencyTable:
    """Measure and fit, with nothing read from the cache or written to it."""
    started = time.monotonic()
    device, ranking, rows = device_of(backend, precision), space.rank(), candidate_rows(space, seed)
    samples: list[Sample] = []
    roles: list[str] = []
    say(
        f"Measuring this network on {backend.gpu.name} with {backend.runtime}; the table is kept for the next run."
    )
    with bar("Measuring latency", len(rows) + 1) as progress:
        for role, widths in [*rows.values(), rows[DENSE]]:
            samples.append(measure_candidate(space, ranking, example, widths, device))
            roles.append(role)
            progress.advance(1, f"{samples[-1].times.median_ms:.3g} ms")
    block = BLOCKS.get(precision, 1)
    mapped = all(len(sample.times.operators_ms) for sample in samples)
    if not mapped:
        samples = _fitted(space, samples, block)
    drift = samples[-1].times.median_ms / samples[0].times.median_ms - 1.0
    require_steady(drift, "Keep the GPU cool and free of other work, hold its clocks, and measure again.")
    fitted = [sample for sample, role in zip(samples, roles, strict=True) if role != "held out"]
    unseen = [sample for sample, role in zip(samples, roles, strict=True) if role == "held out"]
    how = "layers under the profiler" if mapped else "operators by a fit of arithmetic, traffic and launches"
    made = Made(
        device=DeviceFields(
            name="local",
            sku=backend.gpu.name,
            compute_capability=backend.gpu.compute_capability,
            clocks=f"GPU at most {backend.gpu.clock_mhz} MHz",
        ),
        runtime=RuntimeFields(name=backend.runtime, version=backend.version),
        precision=precision,
        block=block,
        protocol=(
            f"{len(fitted)} sub-networks in a random order through {backend.kind}, each warmed up and run; {how}; "
            f"{len(unseen)} more were held out; the dense network first and last"
        ),
        sources=(f"driver for CUDA {backend.gpu.driver}",),
    )
    return table_from(space, fitted, unseen, drift, time.monotonic() - started, 0, made)


def _fitted(space: PruningSpace, samples: list[Sample], block: int) -> list[Sample]:
    """The samples with operator times that explain their whole times."""
    c_in, c_out = np.stack([each.c_in for each in samples]), np.stack([each.c_out for each in samples])
    whole = np.asarray([each.times.median_ms for each in samples])
    shares = fitted_shares(space.layers, c_in, c_out, whole, block)
    return [
        Sample(each.c_in, each.c_out, each.network, NetworkTimes(each.times.whole_ms, share[None]))
        for each, share in zip(samples, shares, strict=True)
    ]
