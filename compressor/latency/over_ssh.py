"""Latency tables and timings of a device that is reached over ssh.

    table = profile_over_ssh("ssh://me@orin.local", space, example, Request("resnet50", "fp16"))
    timing = measured_over_ssh(url, dense_bytes, slim_bytes, table)

An interrupted call resumes when it is repeated: bytes that were copied are not copied again, and existing engines and
times are reused. After a successful call nothing is left on the device.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, write_atomic
from compressor.core.progress import bar, say
from compressor.latency.converted import in_precision
from compressor.latency.engine_precisions import EngineTimer
from compressor.latency.joined import Shares, joined_table
from compressor.latency.layout import signature
from compressor.latency.operators import network_signature
from compressor.latency.paired import PairSession, PairSessions, Timing, burst_of
from compressor.latency.precisions import fastest
from compressor.latency.provider import KnownDevice, TableProvider, register_device
from compressor.latency.remote_bundle import DENSE, target_of, write_table_bundle
from compressor.latency.remote_table import RUNTIME, table_of_results
from compressor.latency.request import Request, Turns
from compressor.latency.stored import keep, kept_path, measuring_alone
from compressor.latency.table import LatencyTable, check_known, find_user_table
from export.device.archive import CHECKSUMS
from export.device.bundle import FORMAT, MANIFEST, pack_bundle, write_bundle
from export.device.remote import identify, place_of, run_remote
from export.device.results import DeviceResults, read_results
from export.errors import ExportError

if TYPE_CHECKING:
    from compressor.latency.engine_precisions import Layers
    from compressor.latency.networks import TaggedNetwork
    from compressor.latency.paired import Ratio
    from compressor.latency.precisions import PrecisionTimer
    from compressor.pruning.space import PruningSpace

PROTOCOL: dict[str, Any] = {"duration_s": 5, "warmup_s": 2, "processes": 3}
"""Measurement of each network: seconds of runs, seconds of warm-up, number of turns."""

MIXED_S = 3600.0
"""Seconds after which no further network of a table in mixed precision is started, unless a request says otherwise."""

SLIM = "slim"
_TRTEXEC_HINT = (
    "If it is installed elsewhere on the device, set its path here: export COMPRESSOR_TRTEXEC=/path/to/trtexec"
)
_BUNDLE = "profile"


def ssh_table(url: str, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
    """Return the device's table for a network: the stored one if the device is unchanged, else a new measurement.

    Args:
        url: Address of the device.
        space, example: The network, and an input batch of size one.
        request: What the table is needed for.

    Raises:
        CompressorError: The device cannot be reached, has no trtexec, or has changed since its table was measured.
    """
    table = find_user_table(url, request.precision, space, batch=request.batch, streams=request.streams)
    if table is not None and table.covers(space):
        now = _identified(url)
        if not request.renew:
            _require_same(table, now)
        differs = _differences(table, now)
        if not differs:
            return table
        say(f"{url} has changed since its table was measured: {differs}. It is measured again.")
    return profile_over_ssh(url, space, example, request)


def profile_over_ssh(url: str, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
    """Copy the sub-networks to the device, measure them there, fetch the times, and store the table under its address.

    Raises:
        CompressorError, ExportError: The device cannot be reached, its disk is full, it has no trtexec, or its results
            are inconsistent; completed work is kept for the next attempt.
    """
    before = _identified(url)
    say(f"Measuring {request.model} in {request.precision} on {_device_title(before)}, TensorRT {before['tensorrt']}.")
    steps = [[group.name, group.width, group.granularity, group.min_width] for group in space.groups]
    load = [request.batch, request.streams] if (request.batch, request.streams) != (1, 1) else []
    key = json.dumps([FORMAT, url, signature(space), request.precision, request.opset, steps, *load])
    work = cache_folder() / "profiles" / hashlib.sha256(key.encode()).hexdigest()[:20]
    with measuring_alone(cache_folder()):
        packed = work / f"{_BUNDLE}.tar.gz"
        if not packed.is_file():
            shutil.rmtree(work, ignore_errors=True)
            written = write_table_bundle(space, example, work / _BUNDLE, url, request)
            for name in (MANIFEST, CHECKSUMS):
                write_atomic(work / name, (written.path / name).read_bytes())
            pack_bundle(written.path, packed)
            shutil.rmtree(written.path)
        results = work / "results.tar.gz"
        if not results.is_file():
            networks = len(json.loads((work / MANIFEST).read_text())["networks"])
            steps_there = networks + PROTOCOL["processes"] * (networks + 1)
            _run(url, packed, results, (work / CHECKSUMS).read_bytes(), steps_there)
        try:
            table = table_of_results(work, device=url)
        except (CompressorError, ExportError):
            results.unlink()  # otherwise the next attempt would read the same results
            raise
        path = keep(table)
        shutil.rmtree(work, ignore_errors=True)
    say(f"The table is stored in {path}")
    return table


def measured_over_ssh(
    url: str,
    dense: bytes,
    slim: bytes,
    table: LatencyTable | None,
    request: Request | None = None,
    turns: Turns | None = None,
) -> Timing:
    """Time two ONNX files on the device in turns, dense first and last; each turn gives one ratio.

    Args:
        url: Address of the device.
        dense, slim: Content of the files, in the requested precision and batch.
        table: Table whose device state is required; None requires none.
        request: Batch and streams.
        turns: What is compared; the number of turns is fixed.

    Raises:
        CompressorError: As `profile_over_ssh`, or the device has another version, power mode or board than its table.
    """
    request, turns = request or Request(), turns or Turns()
    if table is not None:
        _require_same(table, _identified(url))
    timings = _timed_there(url, {DENSE: dense, SLIM: slim}, request, order=_between([SLIM]))
    if table is not None:
        _require_same(table, vars(timings.board))
    for name in (DENSE, SLIM):
        if reason := timings.networks[name].reason:
            raise CompressorError(f"The {name} network could not be measured on the device: {reason.rstrip('.')}.")
    sessions = _sessions(timings, SLIM)
    return sessions.timing(
        sessions.ratio(percentile=turns.percentile, absolute=turns.limit_ms is not None),
        turns.percentile,
        runtime=RUNTIME,
        version=timings.board.tensorrt,
        batch=request.batch,
        streams=request.streams,
    )


def timer_over_ssh(url: str, request: Request, floats: Literal["fp32", "fp16"] = "fp16") -> EngineTimer:
    """Return what times plans of precisions on a device.

    Raises:
        CompressorError: The device cannot be reached, or has no trtexec.
    """
    facts = _identified(url)

    def profile(networks: Sequence[bytes]) -> list[Layers | str]:
        given = {f"n{place}": content for place, content in enumerate(networks)}
        found = _timed_there(url, given, request, profile=True, processes=1).networks
        return [found[name].reason or found[name].layers for name in given]

    def time(networks: Sequence[bytes]) -> list[float | str]:
        given = {f"n{place}": content for place, content in enumerate(networks)}
        found = _timed_there(url, given, request, processes=1).networks
        return [found[name].reason or float(np.median(found[name].times_ms)) for name in given]

    def compare(base: Path, plans: Sequence[Path]) -> list[Ratio | str]:
        given = {f"plan{place}": plan.read_bytes() for place, plan in enumerate(plans)}
        timings = _timed_there(url, {DENSE: base.read_bytes(), **given}, request, order=_between(list(given)))
        networks = timings.networks
        return [
            networks[DENSE].reason or networks[name].reason or _sessions(timings, name).ratio() for name in given
        ]

    return EngineTimer(floats, f"{_device_title(facts)} ({url}), {RUNTIME} {facts['tensorrt']}", profile, time, compare)


def energy_over_ssh(url: str, content: bytes) -> float:
    """Run one ONNX file on a Jetson while tegrastats reads its power; return the millijoules of one run.

    Raises:
        CompressorError: As `profile_over_ssh`, or the device has no tegrastats or no reading of its whole module.
    """
    found = _timed_there(url, {SLIM: content}, Request(), energy=True).networks[SLIM]
    if found.reason or found.run_mj is None:
        reason = found.reason.rstrip(".") or "there is no reading of its power"
        raise CompressorError(f"The network's energy could not be measured on {url}: {reason}.")
    return found.run_mj


def _between(names: Sequence[str]) -> list[str]:
    """Return an order of measurement in which each network runs between two runs of the dense one."""
    return [DENSE, *(each for name in names for each in (name, DENSE))]


def _timed_there(
    url: str,
    networks: Mapping[str, bytes],
    request: Request,
    *,
    order: Sequence[str] | None = None,
    profile: bool = False,
    energy: bool = False,
    processes: int | None = None,
) -> DeviceResults:
    """Run ONNX files on the device and fetch their times.

    Args:
        url: Address of the device.
        networks: Content of the files by name.
        request: Streams.
        order: Names in the order of measurement; None is that of the networks.
        profile, energy: As in `write_bundle`.
        processes: Number of turns; None for that of `PROTOCOL`.
    """
    protocol = {**PROTOCOL, **({} if processes is None else {"processes": processes})}
    with tempfile.TemporaryDirectory(prefix="compressor-ssh-") as name:
        work = Path(name)
        folder = work / _BUNDLE
        write_bundle(
            folder, networks.items(), target=target_of(url), order=order, profile=profile, streams=request.streams,
            energy=energy,
        )  # fmt: skip
        packed, results, sums = work / f"{_BUNDLE}.tar.gz", work / "results.tar.gz", (folder / CHECKSUMS).read_bytes()
        pack_bundle(folder, packed)
        steps = len(networks) + protocol["processes"] * len(order or networks)
        _run(url, packed, results, sums, steps, protocol)
        with _with_resume_hint(url, sums):
            return read_results(results, folder, "timing")


def _sessions(timings: DeviceResults, name: str) -> PairSessions:
    """Convert the device's turns to sessions: in each, the network's process runs between two dense ones."""
    dense: dict[tuple[int, int], Sequence[float]] = {
        (each.turn, each.slot): each.times_ms for each in timings.networks[DENSE].turns
    }
    sessions: list[PairSession] = []
    for each in timings.networks[name].turns:
        beside = [time for slot in (each.slot - 1, each.slot + 1) for time in dense[each.turn, slot]]
        sessions.append([(burst_of(beside), burst_of(each.times_ms))])
    return PairSessions(sessions)


def _run(
    url: str, packed: Path, results: Path, checksums: bytes, steps: int, protocol: Mapping[str, Any] | None = None
) -> None:
    """Run a bundle on the device with a progress bar; failures reported by the device are shown as they occur."""
    with _with_resume_hint(url, checksums), bar(f"On {url.removeprefix('ssh://')}", steps) as progress:

        def heard(line: str) -> None:
            if re.match(r"(turn|engine) \d+ of \d+", line):
                progress.advance(1, line)
            elif "-failed: " in line:
                say(line)
            elif line.strip():
                progress.advance(0, line)

        run_remote(url, packed, results, say=heard, keep=False, trtexec=_trtexec(), **(protocol or PROTOCOL))


@contextmanager
def _with_resume_hint(url: str, checksums: bytes) -> Iterator[None]:
    """Add to an error's hint that the same command resumes, and where the device keeps the completed work."""
    try:
        yield
    except ExportError as error:
        raise CompressorError(
            error.message,
            f"{error.hint} The same command resumes; completed work is kept on the "
            f"device in ~/{place_of(checksums)}".strip(),
        ) from None


def _identified(url: str) -> dict[str, str]:
    try:
        return identify(url, trtexec=_trtexec())
    except ExportError as error:
        hint = _TRTEXEC_HINT if "trtexec was not found" in error.message else error.hint
        raise CompressorError(error.message, hint) from None


def _trtexec() -> str:
    """Return the path of trtexec on the device if the user has set it, else an empty string."""
    return os.environ.get("COMPRESSOR_TRTEXEC", "")


def _differences(table: LatencyTable, now: Mapping[str, str]) -> str:
    """Describe how the device differs from the state in its table; empty if it does not."""
    then = table.fields
    board = next((source[len("board ") :] for source in then.sources if source.startswith("board ")), "")
    pairs = [
        ("TensorRT", now.get("tensorrt", ""), then.runtime.version),
        ("the power mode", now.get("power_mode", ""), then.device.power_mode),
        ("the board", now.get("board", ""), board),
    ]
    return "; ".join(
        f"{what} is {new or 'not known'}, and was {old or 'not known'}"
        for what, new, old in pairs
        if new != old
    )


def _require_same(table: LatencyTable, now: Mapping[str, str]) -> None:
    """Refuse a device that is not in the state of its table.

    Raises:
        CompressorError: Something differs; the message names it and the command that measures a new table.
    """
    if differs := _differences(table, now):
        raise CompressorError(
            f"{table.device} has changed since its table was measured: {differs}.",
            f"Restore that state, or measure again: compress profile --model MODEL --device {table.device} --precision "
            f"{table.precision}",
        )


def _device_title(facts: Mapping[str, str]) -> str:
    return facts.get("model") or "the device"


@register_device
class SshDevice(TableProvider):
    """A device with TensorRT that ssh reaches, such as `ssh://me@orin.local`."""

    name = "ssh"
    runtime = RUNTIME
    precisions = (*TableProvider.precisions, "mixed")
    concurrent = True
    cache_dir: str | Path | None = None

    @classmethod
    def known(cls) -> list[KnownDevice]:
        return []  # measured ones are stored tables

    def check(self, precision: str) -> None:
        check_known(self.device)

    def table(self, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
        if request.precision == "mixed":
            return joined_table(self, space, example, request)
        return ssh_table(self.device, space, example, request)

    def table_file(self, space: PruningSpace, request: Request) -> Path:
        """Return the file of a network's table among the user's."""
        return kept_path(self.device, request.precision, network_signature(space), request.batch, request.streams)

    def limit_s(self, request: Request) -> float:
        """Return the seconds after which no further network of a table in mixed precision is started."""
        return MIXED_S if request.time_limit_s is None else request.time_limit_s

    def shares(self, dense: TaggedNetwork, request: Request, floats: LatencyTable) -> Shares:
        """Return what times networks in mixed precision there: engines of a network's plans, then of the fastest."""
        timer = self.precision_timer(request)
        whole = in_precision(dense.model, timer.floats)

        def share(network: TaggedNetwork) -> float:
            return measured_over_ssh(self.device, whole, fastest(network.model, timer), floats, request).ratio.value

        seconds, turns = PROTOCOL["duration_s"], PROTOCOL["processes"]
        return Shares(share, f"each for {seconds} s in {turns} turns between two runs of the dense network")

    def time(
        self, dense: Path, slim: Path, request: Request, turns: Turns, table: LatencyTable | None = None
    ) -> Timing:
        networks = self.files_in_turns(dense, slim, request)
        return measured_over_ssh(self.device, *networks, table, request, turns)

    def precision_timer(self, request: Request, floats: Literal["fp32", "fp16"] | None = None) -> PrecisionTimer:
        return timer_over_ssh(self.device, request, floats or "fp16")

    def measured_steps(self, space: PruningSpace, example: Any, request: Request) -> dict[str, int]:
        raise CompressorError(
            f"Channel steps are measured on this machine only, not on {self.device}.",
            "Use --granularity auto, or a number such as 8.",
        )
