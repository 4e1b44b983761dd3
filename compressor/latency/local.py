"""The latency table of this machine's CPU, measured through ONNX Runtime on first use.

Sub-networks (selected by `sampling`) are built, exported in the form in which they are delivered, run end to end and
profiled. Each profile gives one point of every operator's grid. Each end-to-end time gives one sample for the
whole-network correction. Held-out networks give the error that the table states.
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
"""Mean error on held-out networks at which measuring stops."""

UNSURE = 0.10
"""Mean error on held-out networks from which the user is warned."""

ATTEMPTS = 3
NOISY = 0.15
"""Relative change of the dense network's time between start and end from which the user is warned."""

BUSY = 1.4
"""Largest factor by which other load on the machine is assumed to change the dense network's time."""


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
    """Return this machine's table for the networks of `space`, from the cache or measured now.

    Args:
        space: The networks: `space.model` with random legal widths is measured.
        example_input: A batch of one, with the input shape of the delivered network.
        threads: Threads of ONNX Runtime.
        cache_dir: Folder of the tables; by default `$COMPRESSOR_CACHE` or the user's cache folder.
        time_limit_s: No further sub-network is started after this many seconds; a dozen are always measured.
        goal: Mean error on held-out sub-networks, as a share, at which measuring stops early. A cached table with a
            larger error is measured again where `time_limit_s` exceeds the time that was spent on it.
        seed: Seed for the choice of sub-networks.
        device: Runs the networks instead of ONNX Runtime on this CPU; nothing is cached then.

    Raises:
        CompressorError: The network cannot be exported or run, or the cache folder cannot be written.
    """
    if tuple(example_input.shape[:1]) != (1,):
        raise CompressorError(
            f"A latency table of this machine needs a batch of one input, got {tuple(example_input.shape)}."
        )
    if device is not None:
        return _measured(space, example_input, device, time_limit_s, seed, threads, goal=goal)
    import onnxruntime

    folder = cache_folder(cache_dir)
    network = network_signature(space)
    path = table_path(folder, runtime=CPU, version=onnxruntime.__version__, threads=threads, network=network)
    known = cached_table(path)
    if known is not None and known.covers(space) and meets_goal(known, network, goal, time_limit_s):
        if still_valid(known, space, example_input, OrtProcess(threads)):
            return known
        path.unlink(missing_ok=True)
    with measuring_alone(folder):
        known = cached_table(path, quiet=True)  # another process may have measured it while this one waited
        if known is not None and known.covers(space) and meets_goal(known, network, goal, time_limit_s):
            return known
        table = _measured(
            space, example_input, OrtProcess(threads), time_limit_s, seed, threads,
            goal=goal, journal_path=path.with_suffix(".partial.jsonl"),
        )  # fmt: skip
        table.write(path)
    held = table.fields.networks[network].held_out
    if held is not None and held.mape > UNSURE:
        say(
            f"The table's mean error on unseen sub-networks is {held.mape:.0%}: this machine was under load, or is "
            f"hard to predict. To measure it again, delete {path}"
        )
    return table


def meets_goal(
    known: LatencyTable, network: str, goal: float, time_limit_s: float, usual_s: float = TIME_LIMIT_S
) -> bool:
    """Whether a table meets the error goal, or was already given as much time as is available now."""
    held = known.fields.networks[network].held_out
    return (
        time_limit_s <= usual_s
        or known.fields.networks[network].seconds >= 0.8 * time_limit_s
        or (held is not None and held.mape <= goal)
    )


def still_valid(known: LatencyTable, space: PruningSpace, example: Tensor, device: Device) -> bool:
    """Whether a cached table is still valid on this machine.

    It is valid where the dense network still takes the time in the table. Load from other users slows a machine for a
    while, but hardly changes ratios to the dense network. Up to a change by the factor `BUSY`, a network of half the
    widths is therefore measured in turns with the dense one, and the ratio decides. Beyond it the table is invalid:
    `50%` in the table of a throttled machine could exceed the whole dense network on an idle one.
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
    changed = f"The dense network takes {level:.3g} ms; it took {then:.3g} ms when this machine's table was measured"
    half = space.round(dense // 2)
    if max(level / then, then / level) <= BUSY and not np.array_equal(half, dense):
        small = export_candidate(space, ranking, example, half)
        shares = [_undisturbed_ms(device, small) / _undisturbed_ms(device, whole) for _ in range(2 * ATTEMPTS)]
        predicted = known.predict(space, space.plan(half, ranking)) / then
        if abs(float(np.median(shares)) / predicted - 1) <= NOISY:
            say(f"{changed}: this machine is under load, or was then. Ratios have not changed; the table is kept.")
            return True
    say(f"{changed}: the table is measured again.")
    return False


def _undisturbed_ms(device: Device, network: TaggedNetwork) -> float:
    """Return the time of an undisturbed run; under load the median would mainly reflect the load."""
    return float(np.quantile(device.measure(network, SECONDS_A_NETWORK).whole_ms, 0.1))


def require_same_machine(table: LatencyTable, threads: int) -> None:
    """Refuse a table of another machine, runtime, runtime version or thread count.

    Raises:
        CompressorError: Something differs; the message names it.
    """
    import onnxruntime

    backend, fields = gpu_backend(), table.fields
    if backend is None:
        here = (cpu_model(), f"{CPU} {onnxruntime.__version__}", f"{threads} thread(s)")
    else:
        here = (backend.gpu.name, f"{backend.runtime} {backend.version}", "0 thread(s)")
    stored = (
        fields.device.sku,
        f"{fields.runtime.name} {fields.runtime.version}",
        f"{fields.runtime.threads} thread(s)",
    )
    differs = "; ".join(
        f"{then}, and this is {now}" for then, now in zip(stored, here, strict=True) if then != now
    )
    if differs:
        raise CompressorError(
            f"The run's latency table was measured elsewhere: {differs}.",
            "Resume it on the original machine, or start a new run from its recipe: compress --recipe RUN/recipe.yaml",
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
    """Measure and fit a table. Only the journal of an interrupted attempt is reused, no cached table."""
    journal = Journal(journal_path, heading_of(space, seed))
    ranking = space.rank()

    def measure(widths: Widths) -> Sample:
        return measure_candidate(space, ranking, example, widths, device)

    if journal.records:
        resume_journal(journal, space, example, device)
    else:
        say("Measuring this network's operators on this machine; the table is kept for the next run.")
    try:
        samples = collect(
            space, measure, journal, time_limit_s=limit_s, goal=goal, seed=seed, block=channel_block()
        )
    except TooNoisy:
        journal.restart()  # noisy measurements must not enter the next attempt
        raise
    warn_of_noise(samples)
    unseen = list(samples.held.values())
    table = table_from(space, samples.to_fit(), unseen, samples.drift, samples.seconds, threads)
    journal.close()
    return table


def resume_journal(journal: Journal, space: PruningSpace, example: Tensor, device: Device) -> None:
    """Resume with the measurements of an interrupted attempt, unless this machine's speed has changed."""
    first = next((record for record in journal.records if record.role == "dense"), None)
    dense = np.asarray(space.dense_widths, dtype=np.int64)
    if first is not None:
        now = measure_candidate(space, space.rank(), example, dense, device).times.median_ms
        if abs(now / first.sample.times.median_ms - 1) <= NOISY:
            say(
                f"Resuming a latency table with {len(journal.records)} earlier measurements."
            )
            return
    say("This machine's speed has changed since the measurement was interrupted: it starts again.")
    journal.restart()


def warn_of_noise(samples: Samples) -> None:
    """Warn where the dense network's times vary, but not so much that the table is refused."""
    if samples.spread > NOISY:
        say(
            f"This machine was not quiet: the quartiles of the dense network's times lie {samples.spread:.0%} apart. "
            "Predictions are less accurate; the delivered network is measured in any case."
        )
    elif abs(samples.drift) > NOISY:
        say(
            f"This machine was not quiet: the dense network took {samples.drift:+.0%} at the end. "
            "Predictions are less accurate."
        )
