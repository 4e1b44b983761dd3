"""Devices that run networks from here: their tables are measured on first use, kept, and measured again when outdated.

Sub-networks (selected by `sampling`) are built, exported in the form in which they are delivered, run end to end and
profiled. Each profile gives one point of every operator's grid. Each end-to-end time gives one sample for the
whole-network correction. Held-out networks give the error that the table states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder
from compressor.core.progress import say
from compressor.latency.assemble import (
    SECONDS_A_NETWORK,
    Provenance,
    Sample,
    export_candidate,
    load_words,
    measure_candidate,
    table_from,
    with_batch,
)
from compressor.latency.backends.gpu import fitted_shares
from compressor.latency.joined import Shares, joined_table, share_of
from compressor.latency.networks import Device, NetworkTimes, TaggedNetwork
from compressor.latency.operators import Widths, network_signature
from compressor.latency.paired import PairSession, Timing, burst_of, in_turns
from compressor.latency.provider import TableProvider
from compressor.latency.request import Request, Turns
from compressor.latency.sampling import Collector, Samples, TooNoisy
from compressor.latency.schema import DeviceFields, RuntimeFields
from compressor.latency.stored import Journal, cached_table, heading_of, measuring_alone, table_path
from compressor.latency.table import LatencyTable
from export.convert.trees import tensors_in

if TYPE_CHECKING:

    from compressor.pruning.space import PruningSpace

UNSURE = 0.10
"""Mean error on held-out networks from which the user is warned."""

ATTEMPTS = 3
NOISY = 0.15
"""Relative change of the dense network's time between start and end from which the user is warned."""

BUSY = 1.4
"""Largest factor by which other load on the machine is assumed to change the dense network's time."""

BURST_S = 0.5
"""Seconds of one burst where networks are timed in turns."""

_UNITS_S = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


class MeasuredDevice(TableProvider):
    """A device that runs networks from here.

    A subclass gives `name`, `runtime`, `version` and `measure`. The rest has defaults: tables and their cache, timing
    in turns, and channel steps. Where it has other `precisions` than FP32, its `runner` converts the networks.

    Args:
        device: Value of --device.
        cache_dir: Folder of the tables; by default `$COMPRESSOR_CACHE` or the user's cache folder.

    Attributes:
        version: Version of the runtime.
        through: Name of what runs networks, where it is another than the runtime.
        too_noisy: What to do where the device is too noisy; empty for the default.
    """

    precisions: tuple[str, ...] = ("fp32",)
    version: str = ""
    time_limit_s: ClassVar[float] = 600.0
    too_noisy: ClassVar[str] = ""
    through: str = ""

    def __init__(self, device: str, cache_dir: str | Path | None = None) -> None:
        super().__init__(device)
        self.cache_dir = cache_dir

    # ---------------------------------------------------------------- what a kind of device says of itself
    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Run an ONNX network for about `seconds`.

        Returns:
            End-to-end milliseconds of each run, and (runs, operators) milliseconds of the operators; of shape
            (0, network.operators) where the runtime does not time them one by one.

        Raises:
            ExportError: The network cannot be built or run.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `measure`.")

    def runner(self, request: Request) -> Device:
        """Return what runs the networks of a table: an object with the method `measure`."""
        return self

    def describe(self) -> DeviceFields:
        """Return the description of the device that its tables have."""
        return DeviceFields(name=self.device)

    def identity(self, request: Request) -> dict[str, str]:
        """Return what an unfinished measurement depends on, besides the network."""
        return {"device": self.device, "version": self.version, "precision": request.precision}

    def cache_key(self, request: Request) -> str:
        """Return the start of the cached table's file name: runtime, device and precision."""
        return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{self.runtime}-{request.precision}-{self.device}")

    def threads(self, request: Request) -> int:
        """Return the threads of the runtime; 0 where it has no such setting."""
        return 0

    def protocol(self, fitted: Sequence[Sample], unseen: int) -> str:
        """Return how a table was measured."""
        how = (
            "layers under the profiler"
            if _operators_timed(fitted)
            else "operators by a fit of arithmetic, traffic and launches"
        )
        return (
            f"{len(fitted)} measurements of sub-networks through {self.through or self.runtime}, each built, warmed up "
            f"and run for {SECONDS_A_NETWORK} s; {how}; {unseen} networks were held out; the dense network first, "
            "every dozen, and last; a network that came out much slower than predicted was measured again, and its "
            "least disturbed time counts"
        )

    def sources(self) -> tuple[str, ...]:
        """Return identifiers of what a table depends on, such as a driver."""
        return ()

    # ---------------------------------------------------------------- tables
    def table(self, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
        if request.precision == "mixed":
            return joined_table(self, space, example, request)
        if len(first := tensors_in(example)[0]) != 1:
            raise CompressorError(
                f"A latency table of this machine needs a batch of one input, got {tuple(first.shape)}."
            )
        batched, network = with_batch(example, request.batch), network_signature(space)
        path = self.table_file(space, request)
        known = cached_table(path)
        if known is not None and self._sufficient(known, space, request):
            if still_valid(known, space, batched, self.runner(request)):
                return known
            path.unlink(missing_ok=True)
        with measuring_alone(cache_folder(self.cache_dir)):
            known = cached_table(path, quiet=True)  # another process may have measured it while this one waited
            if known is not None and self._sufficient(known, space, request):
                return known
            table = self.measured(space, example, request, journal_path=path.with_suffix(".partial.jsonl"))
            table.write(path)
        held = table.fields.networks[network].held_out
        if held is not None and held.mape > UNSURE:
            say(
                f"The table's mean error on unseen sub-networks is {held.mape:.0%}: this machine was under load, or is "
                f"hard to predict. To measure it again, delete {path}"
            )
        return table

    def table_file(self, space: PruningSpace, request: Request) -> Path:
        """Return the file in the cache of the table of a network."""
        return table_path(
            cache_folder(self.cache_dir),
            runtime=self.cache_key(request),
            version=self.version,
            threads=self.threads(request),
            network=network_signature(space),
            batch=request.batch,
            streams=request.streams,
        )

    def measured(
        self,
        space: PruningSpace,
        example: Any,
        request: Request,
        *,
        device: Device | None = None,
        journal_path: Path | None = None,
    ) -> LatencyTable:
        """Measure and fit a table. Only the journal of an interrupted attempt is reused, no cached table.

        A network that cannot be built or run ends the measurement; earlier measurements are kept for the next attempt.
        Measurements of a device whose speed is not stable are discarded.

        Args:
            space, example, request: As in `table`; the example is of one input.
            device: Runs the networks in place of this device.
            journal_path: Journal of the measurement; None writes none.
        """
        device, ranking, block = device or self.runner(request), space.rank(), self.block(request.precision)
        example = with_batch(example, request.batch)
        journal = Journal(journal_path, heading_of(space, request.seed, **self.identity(request)))

        def measure(widths: Widths) -> Sample:
            return measure_candidate(space, ranking, example, widths, device)

        def ready(samples: Sequence[Sample]) -> Sequence[Sample]:
            return samples if _operators_timed(samples) else _fitted(space, samples, block, request.batch)

        if journal.records:
            _resume(journal, space, example, device)
        else:
            title = self.describe().sku or self.device
            say(f"Measuring this network on {title} with {self.runtime}; the table is kept for the next run.")
        try:
            limit_s, goal, seed = self.limit_s(request), request.goal, request.seed
            samples = Collector(space, measure, journal, limit_s, goal, seed, block, ready).run()
        except TooNoisy as error:
            journal.restart()  # noisy measurements must not enter the next attempt
            raise TooNoisy(error.message, self.too_noisy or error.hint) from None
        _warn_of_noise(samples)
        fitted, unseen = samples.to_fit(), list(samples.held.values())
        provenance = Provenance(
            device=self.describe(),
            runtime=RuntimeFields(name=self.runtime, version=self.version, threads=self.threads(request)),
            precision=request.precision,
            block=block,
            protocol=self.protocol(fitted, len(unseen)) + load_words(request.batch, request.streams),
            sources=self.sources(),
            batch=request.batch,
            streams=request.streams,
        )
        table = table_from(space, ready(fitted), unseen, samples.drift, samples.seconds, provenance)
        journal.close()
        return table

    def limit_s(self, request: Request) -> float:
        """Return the seconds after which no further network of a table is started."""
        return self.time_limit_s if request.time_limit_s is None else request.time_limit_s

    def shares(self, dense: TaggedNetwork, request: Request, floats: LatencyTable) -> Shares:
        """Return what times networks in mixed precision: each right after the dense one, by the runners of both."""
        whole, mixed = (self.runner(replace(request, precision=each)) for each in (floats.fields.precision, "mixed"))
        return Shares(
            lambda network: share_of(partial(whole.measure, dense), partial(mixed.measure, network)),
            f"each for {SECONDS_A_NETWORK} s after the dense network",
        )

    def _sufficient(self, known: LatencyTable, space: PruningSpace, request: Request) -> bool:
        """Whether a table covers the space, and meets the goal or was given as much time as is available now."""
        if not known.covers(space) or (known.fields.batch, known.fields.streams) != (request.batch, request.streams):
            return False
        network, limit_s = known.fields.networks[network_signature(space)], self.limit_s(request)
        return (
            limit_s <= self.time_limit_s
            or network.seconds >= 0.8 * limit_s
            or (network.held_out is not None and network.held_out.mape <= request.goal)
        )

    # ---------------------------------------------------------------- runs
    def time(
        self, dense: Path, slim: Path, request: Request, turns: Turns, table: LatencyTable | None = None
    ) -> Timing:
        """Time bursts in turns; each one rebuilds its network, like a new process on the CPU."""
        files = self.files_in_turns(dense, slim, request)
        # the files are converted already, and have their batch
        device = self.runner(Request(threads=request.threads, batch=request.batch, streams=request.streams))
        networks = [TaggedNetwork(content, (), ()) for content in files]
        sessions = 0

        def run_session() -> PairSession:
            nonlocal sessions
            sessions += 1
            order = (0, 1) if sessions % 2 else (1, 0)
            found = {
                place: burst_of(device.measure(networks[place], BURST_S).whole_ms.tolist()) for place in order
            }
            return [(found[0], found[1])]

        return in_turns(
            run_session, self.runtime, self.version, turns, batch=request.batch, streams=request.streams
        )

    def require_same(self, table: LatencyTable, request: Request) -> None:
        fields = table.fields
        here = (
            self.describe().sku, f"{self.runtime} {self.version}", f"{self.threads(request)} thread(s)",
            f"batch {request.batch}", f"{request.streams} stream(s)", request.precision,
        )  # fmt: skip
        stored = (
            fields.device.sku, table.runtime, f"{fields.runtime.threads} thread(s)", f"batch {fields.batch}",
            f"{fields.streams} stream(s)", table.precision,
        )  # fmt: skip
        differs = "; ".join(
            f"{then}, and this is {now}" for then, now in zip(stored, here, strict=True) if then != now
        )
        if differs:
            raise CompressorError(
                f"The run's latency table was measured elsewhere: {differs}.",
                "Resume it on the original machine, or start a new run from its recipe: "
                "compress --recipe RUN/recipe.yaml",
            )


def still_valid(known: LatencyTable, space: PruningSpace, example: Any, device: Device) -> bool:
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


def _resume(journal: Journal, space: PruningSpace, example: Any, device: Device) -> None:
    """Resume with the measurements of an interrupted attempt, unless this machine's speed has changed."""
    first = next((record for record in journal.records if record.role == "dense"), None)
    dense = np.asarray(space.dense_widths, dtype=np.int64)
    if first is not None:
        now = measure_candidate(space, space.rank(), example, dense, device).times.median_ms
        if abs(now / first.sample.times.median_ms - 1) <= NOISY:
            say(f"Resuming a latency table with {len(journal.records)} earlier measurements.")
            return
    say("This machine's speed has changed since the measurement was interrupted: it starts again.")
    journal.restart()


def _warn_of_noise(samples: Samples) -> None:
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


def _operators_timed(samples: Sequence[Sample]) -> bool:
    """Whether the device timed the operators of all these networks one by one."""
    return all(len(sample.times.operators_ms) for sample in samples)


def _fitted(space: PruningSpace, samples: Sequence[Sample], block: int, batch: int) -> list[Sample]:
    """Return the samples with operator times fitted to their end-to-end times."""
    c_in, c_out = np.stack([each.c_in for each in samples]), np.stack([each.c_out for each in samples])
    whole = np.asarray([each.times.median_ms for each in samples])
    shares = fitted_shares(space.layers, c_in, c_out, whole, block, batch)
    return [
        Sample(each.c_in, each.c_out, each.network, NetworkTimes(each.times.whole_ms, share[None]))
        for each, share in zip(samples, shares, strict=True)
    ]


def duration_s(text: str) -> float:
    """Return the seconds of `90s`, `5min` (or `5m`) or `1h`.

    Raises:
        CompressorError: The text has another form, or the duration is not above zero.

    >>> duration_s("1.5min")
    90.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|min|m|h)\s*", text, re.ASCII)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise CompressorError(f"{text!r} is not a duration.", "Write 90s, 5min or 1h.")
    return seconds
