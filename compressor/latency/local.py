"""The latency table of this machine's CPU, measured through ONNX Runtime when it is first asked for.

Sub-networks (`sampling` says which) are built, exported as they would be delivered, run end to end and profiled. Each
profile gives one point of every operator's grid, each end-to-end time one sample for the whole-network
correction; networks held back from both give the error that the table states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder
from compressor.core.progress import say
from compressor.latency.assemble import Sample, export_candidate, measure_candidate, table_from
from compressor.latency.cache import cached_table, cpu_model, measuring_alone, table_path
from compressor.latency.journal import Journal, heading_of
from compressor.latency.noise import channel_block
from compressor.latency.ort_process import OrtProcess
from compressor.latency.ort_profile import Device, TaggedNetwork
from compressor.latency.provenance import SECONDS_A_NETWORK
from compressor.latency.sampling import Samples, TooNoisy, collect
from compressor.latency.signature import Widths, network_signature
from compressor.latency.table import LatencyTable
from export.device.here import CPU, gpu_backend

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.pruning.space import PruningSpace

TIME_LIMIT_S = 75.0
GOAL = 0.03
"""The mean error on held-out networks at which a table is good enough."""

UNSURE = 0.10
"""A mean error on held-out networks that the user should hear of."""

ATTEMPTS = 3
NOISY = 0.15
"""A change of the dense network's time between start and end that is worth a warning."""

BUSY = 1.4
"""Up to this factor a change of the dense network's time may be that of a machine with neighbours."""


def local_table(
    space: PruningSpace,
    example_input: Tensor,
    *,
    threads: int = 1,
    cache_dir: str | Path | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    goal: float = GOAL,
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
        goal: Mean error on held-out sub-networks, as a share, at which measuring ends before the time is up. A table
            in the cache that is further off is made anew where `time_limit_s` is longer than the one it was made in.
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
        return _measured(space, example_input, device, time_limit_s, seed, threads, goal=goal)
    import onnxruntime

    folder = cache_folder(cache_dir)
    network = network_signature(space)
    path = table_path(folder, runtime=CPU, version=onnxruntime.__version__, threads=threads, network=network)
    known = cached_table(path)
    if known is not None and known.covers(space) and fit_for(known, network, goal, time_limit_s):
        if still_valid(known, space, example_input, OrtProcess(threads)):
            return known
        path.unlink(missing_ok=True)
    with measuring_alone(folder):
        known = cached_table(path, quiet=True)  # another process may have measured it while this one waited
        if known is not None and known.covers(space) and fit_for(known, network, goal, time_limit_s):
            return known
        table = _measured(
            space, example_input, OrtProcess(threads), time_limit_s, seed, threads,
            goal=goal, journal_path=path.with_suffix(".partial.jsonl"),
        )  # fmt: skip
        table.write(path)
    held = table.fields.networks[network].held_out
    if held is not None and held.mape > UNSURE:
        say(
            f"The table is {held.mape:.0%} off on sub-networks that it has not seen: this machine was busy, or is hard "
            f"to predict. To have it measured again, delete {path}"
        )
    return table


def fit_for(
    known: LatencyTable, network: str, goal: float, time_limit_s: float, usual_s: float = TIME_LIMIT_S
) -> bool:
    """Whether a table is as good as is asked for, or was given as much time as there is now."""
    held = known.fields.networks[network].held_out
    return (
        time_limit_s <= usual_s
        or known.fields.networks[network].seconds >= 0.8 * time_limit_s
        or (held is not None and held.mape <= goal)
    )


def still_valid(known: LatencyTable, space: PruningSpace, example: Tensor, device: Device) -> bool:
    """Whether a table of the cache still holds for this machine.

    It does where the dense network takes the time that the table was made at. A machine with neighbours is faster or
    slower for a while, and shares of the dense network stay as they are: up to a change of `BUSY`, a network of half
    the widths is measured in turns with the dense one, and its share decides. Beyond that, `50%` of a table of a
    throttled machine would be more than the whole dense network on a quiet one.
    """
    ranking, dense = space.rank(), np.asarray(space.dense_widths, dtype=np.int64)
    then = known.dense_ms(space)
    whole = export_candidate(space, ranking, example, dense)
    now: list[float] = []
    for _ in range(ATTEMPTS):
        now.append(device.measure(whole, SECONDS_A_NETWORK).median_ms)
        if abs(now[-1] / then - 1) <= NOISY:
            return True
    level = float(np.median(now))
    changed = f"The dense network takes {level:.3g} ms, and {then:.3g} ms when this machine's table was made"
    half = space.round(dense // 2)
    if max(level / then, then / level) <= BUSY and not np.array_equal(half, dense):
        small = export_candidate(space, ranking, example, half)
        shares = [_undisturbed_ms(device, small) / _undisturbed_ms(device, whole) for _ in range(2 * ATTEMPTS)]
        told = known.predict(space, space.plan(half, ranking)) / then
        if abs(float(np.median(shares)) / told - 1) <= NOISY:
            say(f"{changed}: this machine is busy now, or was. Shares of it have not changed, and the table is kept.")
            return True
    say(f"{changed}: it is made anew.")
    return False


def _undisturbed_ms(device: Device, network: TaggedNetwork) -> float:
    """What a run takes while nobody else uses the processor: beside neighbours the median says more of them."""
    return float(np.quantile(device.measure(network, SECONDS_A_NETWORK).whole_ms, 0.1))


def require_made_here(table: LatencyTable, threads: int) -> None:
    """Refuse a table of another machine, or of another runtime, version or number of threads than this one's.

    Raises:
        CompressorError: what differs.
    """
    import onnxruntime

    backend, fields = gpu_backend(), table.fields
    if backend is None:
        here = (cpu_model(), f"{CPU} {onnxruntime.__version__}", f"{threads} thread(s)")
    else:
        here = (backend.gpu.name, f"{backend.runtime} {backend.version}", "0 thread(s)")
    made = (
        fields.device.sku,
        f"{fields.runtime.name} {fields.runtime.version}",
        f"{fields.runtime.threads} thread(s)",
    )
    differs = "; ".join(
        f"{then}, and this is {now}" for then, now in zip(made, here, strict=True) if then != now
    )
    if differs:
        raise CompressorError(
            f"The run's latency table was measured elsewhere: {differs}.",
            "Go on where it was begun, or start a new run from its recipe: compress --recipe RUN/recipe.yaml",
        )


def _measured(
    space: PruningSpace,
    example: Tensor,
    device: Device,
    limit_s: float,
    seed: int,
    threads: int,
    *,
    goal: float = GOAL,
    journal_path: Path | None = None,
) -> LatencyTable:
    """Measure and fit; nothing is read from the cache but what an earlier attempt has measured."""
    journal = Journal(journal_path, heading_of(space, seed))
    ranking = space.rank()

    def measure(widths: Widths) -> Sample:
        return measure_candidate(space, ranking, example, widths, device)

    if journal.records:
        go_on(journal, space, example, device)
    else:
        say("Measuring this network's operators on this machine; the table is kept for the next run.")
    try:
        samples = collect(
            space, measure, journal, time_limit_s=limit_s, goal=goal, seed=seed, block=channel_block()
        )
    except TooNoisy:
        journal.begin_anew()  # what it gave is of no use to the next attempt
        raise
    say_how_quiet(samples)
    unseen = list(samples.held.values())
    table = table_from(space, samples.to_fit(), unseen, samples.drift, samples.seconds, threads)
    journal.close()
    return table


def go_on(journal: Journal, space: PruningSpace, example: Tensor, device: Device) -> None:
    """Go on with what was measured before a stop, unless this machine is another one now."""
    first = next((record for record in journal.records if record.role == "dense"), None)
    dense = np.asarray(space.dense_widths, dtype=np.int64)
    if first is not None:
        now = measure_candidate(space, space.rank(), example, dense, device).times.median_ms
        if abs(now / first.sample.times.median_ms - 1) <= NOISY:
            say(
                f"Going on with a table of which {len(journal.records)} measurements were made before a stop."
            )
            return
    say("This machine is faster or slower than when its table was begun: it is begun anew.")
    journal.begin_anew()


def say_how_quiet(samples: Samples) -> None:
    """Warn where the dense network's times lie apart, though not so far that no table is made."""
    if samples.spread > NOISY:
        say(
            f"This machine was not quiet: the quartiles of the dense network's times lie {samples.spread:.0%} apart. "
            "Predictions suffer; what is delivered is measured all the same."
        )
    elif abs(samples.drift) > NOISY:
        say(
            f"This machine was not quiet: the dense network took {samples.drift:+.0%} at the end. Predictions suffer."
        )
