"""Latency tables and timings of a device that is reached over ssh.

    table = profile_over_ssh("ssh://me@orin.local", space, example, model="resnet50", precision="fp16")
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, write_atomic
from compressor.core.progress import bar, say
from compressor.latency.layout import signature
from compressor.latency.paired import PairSession, PairSessions, Timing, burst_of
from compressor.latency.provider import (
    KnownDevice,
    Request,
    TableProvider,
    Turns,
    in_precision_beside,
    register_device,
)
from compressor.latency.remote_bundle import DENSE, target_of, write_table_bundle
from compressor.latency.remote_table import RUNTIME, table_of_results
from compressor.latency.schema import Precision
from compressor.latency.stored import keep, measuring_alone
from compressor.latency.table import LatencyTable, check_known, find_user_table
from export.device.archive import CHECKSUMS
from export.device.bundle import FORMAT, MANIFEST, pack_bundle, write_bundle
from export.device.remote import identify, place_of, run_remote
from export.device.results import DeviceResults, read_results
from export.errors import ExportError

if TYPE_CHECKING:

    from compressor.pruning.space import PruningSpace

PROTOCOL: dict[str, Any] = {"duration_s": 5, "warmup_s": 2, "processes": 3}
"""Measurement of each network: seconds of runs, seconds of warm-up, number of turns."""

SLIM = "slim"
_TRTEXEC_HINT = (
    "If it is installed elsewhere on the device, set its path here: export COMPRESSOR_TRTEXEC=/path/to/trtexec"
)
_BUNDLE = "profile"


def ssh_table(
    url: str,
    space: PruningSpace,
    example: Any,
    *,
    model: str,
    precision: Precision,
    opset: int = 17,
    batch: int = 1,
    streams: int = 1,
    renew: bool = False,
) -> LatencyTable:
    """Return the device's table for a network: the stored one if the device is unchanged, else a new measurement.

    Args:
        url: Address of the device.
        space, example, model: The network, an input batch of size one, and its name in messages.
        precision, opset: Precision and opset of the ONNX files.
        batch, streams: Inputs of one run, and copies of a network that run there at the same time.
        renew: Whether a device that has changed since its table was measured is measured again, not refused.

    Raises:
        CompressorError: The device cannot be reached, has no trtexec, or has changed since its table was measured.
    """
    table = find_user_table(url, precision, space, batch=batch, streams=streams)
    if table is not None and table.covers(space):
        now = _identified(url)
        if not renew:
            _require_same(table, now)
        differs = _differences(table, now)
        if not differs:
            return table
        say(f"{url} has changed since its table was measured: {differs}. It is measured again.")
    return profile_over_ssh(
        url, space, example, model=model, precision=precision, opset=opset, batch=batch, streams=streams
    )


def profile_over_ssh(
    url: str,
    space: PruningSpace,
    example: Any,
    *,
    model: str,
    precision: Precision,
    opset: int = 17,
    batch: int = 1,
    streams: int = 1,
) -> LatencyTable:
    """Copy the sub-networks to the device, measure them there, fetch the times, and store the table under its address.

    Raises:
        CompressorError, ExportError: The device cannot be reached, its disk is full, it has no trtexec, or its results
            are inconsistent; completed work is kept for the next attempt.
    """
    before = _identified(url)
    say(f"Measuring {model} in {precision} on {_device_title(before)}, TensorRT {before['tensorrt']}.")
    steps = [[group.name, group.width, group.granularity, group.min_width] for group in space.groups]
    load = [batch, streams] if (batch, streams) != (1, 1) else []
    key = json.dumps([FORMAT, url, signature(space), precision, opset, steps, *load])
    work = cache_folder() / "profiles" / hashlib.sha256(key.encode()).hexdigest()[:20]
    with measuring_alone(cache_folder()):
        packed = work / f"{_BUNDLE}.tar.gz"
        if not packed.is_file():
            shutil.rmtree(work, ignore_errors=True)
            written = write_table_bundle(
                space,
                example,
                work / _BUNDLE,
                device=url,
                model=model,
                precision=precision,
                opset=opset,
                batch=batch,
                streams=streams,
            )
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
    with tempfile.TemporaryDirectory(prefix="compressor-ssh-") as name:
        work = Path(name)
        folder = work / _BUNDLE
        networks, order = [(DENSE, dense), (SLIM, slim)], [DENSE, SLIM, DENSE]
        write_bundle(
            folder, networks, target=target_of(url), order=order, profile=False, streams=request.streams
        )
        packed, results, sums = work / f"{_BUNDLE}.tar.gz", work / "results.tar.gz", (folder / CHECKSUMS).read_bytes()
        pack_bundle(folder, packed)
        _run(url, packed, results, sums, 2 + 3 * PROTOCOL["processes"])
        with _with_resume_hint(url, sums):
            timings = read_results(results, folder, "timing")
    if table is not None:
        _require_same(table, vars(timings.board))
    return _in_turns(timings, request, turns)


def energy_over_ssh(url: str, content: bytes) -> float:
    """Run one ONNX file on a Jetson while tegrastats reads its power; return the millijoules of one run.

    Raises:
        CompressorError: As `profile_over_ssh`, or the device has no tegrastats or no reading of its whole module.
    """
    with tempfile.TemporaryDirectory(prefix="compressor-ssh-") as name:
        work = Path(name)
        folder = work / _BUNDLE
        write_bundle(folder, [(SLIM, content)], target=target_of(url), profile=False, energy=True)
        packed, results, sums = work / f"{_BUNDLE}.tar.gz", work / "results.tar.gz", (folder / CHECKSUMS).read_bytes()
        pack_bundle(folder, packed)
        _run(url, packed, results, sums, 1 + PROTOCOL["processes"])
        with _with_resume_hint(url, sums):
            found = read_results(results, folder, "timing").networks[SLIM]
    if found.reason or found.run_mj is None:
        reason = found.reason.rstrip(".") or "there is no reading of its power"
        raise CompressorError(f"The network's energy could not be measured on {url}: {reason}.")
    return found.run_mj


def _in_turns(timings: DeviceResults, request: Request, asked: Turns) -> Timing:
    """Convert the device's turns to sessions: in each, the slim process runs between two dense ones."""
    bursts: dict[str, dict[int, list[float]]] = {DENSE: {}, SLIM: {}}
    for name, turns in bursts.items():
        timed = timings.networks[name]
        if timed.reason:
            raise CompressorError(
                f"The {name} network could not be measured on the device: {timed.reason.rstrip('.')}."
            )
        for each in timed.turns:
            turns.setdefault(each.turn, []).extend(each.times_ms)
    sessions: list[PairSession] = [
        [(burst_of(bursts[DENSE][turn]), burst_of(bursts[SLIM][turn]))] for turn in sorted(bursts[DENSE])
    ]
    found = PairSessions(sessions)
    return found.timing(
        found.ratio(percentile=asked.percentile, absolute=asked.limit_ms is not None),
        asked.percentile,
        runtime=RUNTIME,
        version=timings.board.tensorrt,
        batch=request.batch,
        streams=request.streams,
    )


def _run(url: str, packed: Path, results: Path, checksums: bytes, steps: int) -> None:
    """Run a bundle on the device with a progress bar; failures reported by the device are shown as they occur."""
    with _with_resume_hint(url, checksums), bar(f"On {url.removeprefix('ssh://')}", steps) as progress:

        def heard(line: str) -> None:
            if re.match(r"(turn|engine) \d+ of \d+", line):
                progress.advance(1, line)
            elif "-failed: " in line:
                say(line)
            elif line.strip():
                progress.advance(0, line)

        run_remote(url, packed, results, say=heard, keep=False, trtexec=_trtexec(), **PROTOCOL)


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
            f"Restore that state, or measure again: compress profile --model MODEL --device {table.device}",
        )


def _device_title(facts: Mapping[str, str]) -> str:
    return facts.get("model") or "the device"


@register_device
class SshDevice(TableProvider):
    """A device with TensorRT that ssh reaches, such as `ssh://me@orin.local`."""

    name = "ssh"
    runtime = RUNTIME
    concurrent = True

    @classmethod
    def known(cls) -> list[KnownDevice]:
        return []  # measured ones are stored tables

    def check(self, precision: str) -> None:
        check_known(self.device)

    def table(self, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
        return ssh_table(
            self.device,
            space,
            example,
            model=request.model,
            precision=request.precision,
            opset=request.opset,
            batch=request.batch,
            streams=request.streams,
            renew=request.renew,
        )

    def time(
        self, dense: Path, slim: Path, request: Request, turns: Turns, table: LatencyTable | None = None
    ) -> Timing:
        networks = in_precision_beside(dense, slim, request)
        return measured_over_ssh(self.device, *networks, table, request, turns)

    def measured_steps(self, space: PruningSpace, example: Any, request: Request) -> dict[str, int]:
        raise CompressorError(
            f"Channel steps are measured on this machine only, not on {self.device}.",
            "Use --granularity auto, or a number such as 8.",
        )
