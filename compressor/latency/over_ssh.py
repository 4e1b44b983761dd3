"""A device that is reached over ssh: its table, and the time of single networks on it.

    table = profile_over_ssh("ssh://me@orin.local", space, example, model="resnet50", precision="fp16")
    timing = measured_over_ssh(url, dense_bytes, slim_bytes, table)

The work goes on where it was when the same thing is asked for again: bytes that were copied are not copied again,
engines and times that are there are kept. Once all went well nothing is left on the device.
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
from compressor.latency.cache import measuring_alone
from compressor.latency.layout import signature
from compressor.latency.own_tables import keep
from compressor.latency.paired import Timing
from compressor.latency.ratio import Sitting, Sittings, burst_of
from compressor.latency.remote_bundle import DENSE, Precision, target_of, write_table_bundle
from compressor.latency.remote_table import RUNTIME, table_of_results
from compressor.latency.table import LatencyTable, find_user_table
from export.device.archive import CHECKSUMS, pack
from export.device.remote import identify, place_of, run_remote
from export.device.timing_bundle import MANIFEST, folder_files, write_timing_bundle
from export.device.timing_results import read_timings
from export.device.timings import Board, Timings
from export.engine.stats import summarise
from export.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.pruning.space import PruningSpace

PROTOCOL: dict[str, Any] = {"duration_s": 5, "warmup_s": 2, "processes": 3}
"""How each network is measured: seconds of runs after seconds of warm-up, in so many turns."""

SLIM = "slim"
_ELSEWHERE = (
    "Where it lies in an unusual place on the device, say so here: export COMPRESSOR_TRTEXEC=/path/to/trtexec"
)
_BUNDLE = "profile"


def ssh_table(
    url: str,
    space: PruningSpace,
    example: Tensor,
    *,
    model: str,
    precision: Precision,
    opset: int = 17,
    renew: bool = False,
) -> LatencyTable:
    """The device's table for a network: kept from before where the device still is what it was, else measured now.

    Args:
        url: The device.
        space, example, model: The network, a batch of one, and what messages call it.
        precision, opset: Of its ONNX files.
        renew: Whether a device that is no longer what its table was measured on is measured anew, not refused.

    Raises:
        CompressorError: the device is not reached, has no trtexec, or is not what its table was measured on.
    """
    table = find_user_table(url, precision, space)
    if table is not None and table.covers(space):
        now = _identified(url)
        if not renew:
            _require_same(table, now)
        differs = _differences(table, now)
        if not differs:
            return table
        say(f"{url} is not what its table was measured on: {differs}. It is measured anew.")
    return profile_over_ssh(url, space, example, model=model, precision=precision, opset=opset)


def profile_over_ssh(
    url: str, space: PruningSpace, example: Tensor, *, model: str, precision: Precision, opset: int = 17
) -> LatencyTable:
    """Push the sub-networks, measure them there, pull the times, and keep the table under the address.

    Raises:
        CompressorError, ExportError: the device is not reached, its disk is full, it has no trtexec, or its answer does
            not hold together; what was done is kept for the next try.
    """
    before = _identified(url)
    say(f"Measuring {model} in {precision} on {_called(before)}, TensorRT {before['tensorrt']}.")
    steps = [[group.name, group.width, group.granularity, group.min_width] for group in space.groups]
    key = json.dumps([url, signature(space), precision, opset, steps])
    work = cache_folder() / "profiles" / hashlib.sha256(key.encode()).hexdigest()[:20]
    with measuring_alone(cache_folder()):
        packed = work / f"{_BUNDLE}.tar.gz"
        if not packed.is_file():
            shutil.rmtree(work, ignore_errors=True)
            carried = write_table_bundle(
                space, example, work / _BUNDLE, device=url, model=model, precision=precision, opset=opset
            )
            for name in (MANIFEST, CHECKSUMS):
                write_atomic(work / name, (carried.folder / name).read_bytes())
            write_atomic(
                packed, pack(folder_files(carried.folder), _BUNDLE, executable=frozenset(["run.sh"]))
            )
            shutil.rmtree(carried.folder)
        results = work / "results.tar.gz"
        if not results.is_file():
            networks = len(json.loads((work / MANIFEST).read_text())["networks"])
            steps_there = networks + PROTOCOL["processes"] * (networks + 1)
            _run(url, packed, results, (work / CHECKSUMS).read_bytes(), steps_there)
        try:
            table = table_of_results(work, device=url)
        except (CompressorError, ExportError):
            results.unlink()  # or the next try would find the same
            raise
        path = keep(table)
        shutil.rmtree(work, ignore_errors=True)
    say(f"The table is kept in {path}")
    return table


def measured_over_ssh(url: str, dense: bytes, slim: bytes, table: LatencyTable | None) -> Timing:
    """Time two ONNX files on the device in turns, dense first and last; each turn gives one ratio.

    Args:
        url: The device.
        dense, slim: The files, in the precision that is asked for.
        table: The device must still be in its state; None asks for none.

    Raises:
        CompressorError: as `profile_over_ssh`, or the device has another version, power mode or board than its table.
    """
    if table is not None:
        _require_same(table, _identified(url))
    with tempfile.TemporaryDirectory(prefix="compressor-ssh-") as name:
        work = Path(name)
        folder = work / _BUNDLE
        write_timing_bundle(
            folder,
            [(DENSE, dense), (SLIM, slim)],
            [DENSE, SLIM, DENSE],
            target=target_of(url),
            facts=dict,
            profile=False,
        )
        packed = work / f"{_BUNDLE}.tar.gz"
        packed.write_bytes(pack(folder_files(folder), _BUNDLE, executable=frozenset(["run.sh"])))
        given = {name: (folder / name).read_bytes() for name in (MANIFEST, CHECKSUMS)}
        _run(url, packed, work / "results.tar.gz", given[CHECKSUMS], 2 + 3 * PROTOCOL["processes"])
        with _told(url, given[CHECKSUMS]):
            timings = read_timings(work / "results.tar.gz", folder, given)
    if table is not None:
        _require_same(table, _fields(timings.board))
    return _in_turns(timings)


def _in_turns(timings: Timings) -> Timing:
    """The device's turns as sittings: in each the slim network's process between two of the dense one."""
    bursts: dict[str, dict[int, list[float]]] = {DENSE: {}, SLIM: {}}
    for name, turns in bursts.items():
        timed = timings.networks[name]
        if timed.reason:
            raise CompressorError(
                f"The {name} network could not be measured on the device: {timed.reason.rstrip('.')}."
            )
        for each in timed.turns:
            turns.setdefault(each.turn, []).extend(each.times_ms)
    sittings: list[Sitting] = [
        [(burst_of(bursts[DENSE][turn]), burst_of(bursts[SLIM][turn]))] for turn in sorted(bursts[DENSE])
    ]
    dense, slim = (
        summarise(timings.networks[name].times_ms, runtime=RUNTIME, version=timings.board.tensorrt)
        for name in (DENSE, SLIM)
    )
    return Timing(dense, slim, Sittings(sittings).ratio())


def _run(url: str, packed: Path, results: Path, checksums: bytes, steps: int) -> None:
    """Run a bundle on the device under a bar; lines that are no step are shown in it as they come."""
    with _told(url, checksums), bar(f"On {url.removeprefix('ssh://')}", steps) as progress:

        def heard(line: str) -> None:
            if re.match(r"(turn|engine) \d+ of \d+", line):
                progress.advance(1, line)
            elif "not built" in line or "not measured" in line:
                say(line)
            elif line.strip():
                progress.advance(0, line)

        run_remote(url, packed, results, say=heard, keep=False, trtexec=_trtexec(), **PROTOCOL)


@contextmanager
def _told(url: str, checksums: bytes) -> Iterator[None]:
    """Where something fails on the way: what is left on the device, and that the same command goes on."""
    try:
        yield
    except ExportError as error:
        raise CompressorError(
            error.message,
            f"{error.hint} The same command goes on where it was; what was copied and measured so far lies on the "
            f"device in ~/{place_of(checksums)}".strip(),
        ) from None


def _identified(url: str) -> dict[str, str]:
    try:
        return identify(url, trtexec=_trtexec())
    except ExportError as error:
        hint = _ELSEWHERE if "trtexec was not found" in error.message else error.hint
        raise CompressorError(error.message, hint) from None


def _trtexec() -> str:
    """Where trtexec is on the device, if the user says so."""
    return os.environ.get("COMPRESSOR_TRTEXEC", "")


def _fields(board: Board) -> dict[str, str]:
    return {
        "tensorrt": board.tensorrt,
        "power_mode": board.power_mode,
        "board": board.identity,
        "model": board.model,
    }


def _differences(table: LatencyTable, now: Mapping[str, str]) -> str:
    """In what the device differs from the state that its table was measured in; empty where in nothing."""
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
        CompressorError: what differs, and the command that makes the right table.
    """
    if differs := _differences(table, now):
        raise CompressorError(
            f"{table.device} is not what its table was measured on: {differs}.",
            f"Bring it back to that state, or measure it anew: compress profile --model MODEL --device {table.device}",
        )


def _called(facts: Mapping[str, str]) -> str:
    return facts.get("model") or "the device"
