"""Measurements on disk: tables of other devices, the cache of this machine's tables, and journals of unfinished ones.

A table of another device is stored under its name, so that `--device NAME` finds it. A table of this machine is cached
by processor, runtime and network; a lock lets one process measure at a time. The journal of an unfinished table gets
each measurement at once, so that an interrupted run can resume. It has one JSON document per line: a heading that
identifies what is measured, then one line per measurement. A last line that a kill cut off is dropped on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import disk_error, write_atomic
from compressor.core.progress import say
from compressor.latency.assemble import Sample
from compressor.latency.machine import cpu_model
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.operators import network_signature
from compressor.latency.table import (
    LatencyTable,
    check_name,
    is_address,
    tables_folder,
    user_tables,
)
from export.device.bundle import TARGETS, family_of

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace


Role = Literal["dense", "fit", "held"]


def keep(table: LatencyTable) -> Path:
    """Write a measured table into the user's folder.

    Raises:
        CompressorError: The same measurements are stored under another name, or the name belongs to another device.
    """
    check_name(table.device)
    results = {source for source in table.fields.sources if source.startswith("results ")}
    for path, other in user_tables():
        if results & set(other.fields.sources) and other.device != table.device:
            raise CompressorError(
                f"These measurements are already stored as the device {other.device}.",
                f"Use --device {other.device}, or delete {path} first.",
            )
        if other.device == table.device and not is_address(table.device):  # which is checked before each use
            _require_same_device(table, other, path)
    _require_not_another_module(table)
    (network,) = table.fields.networks
    path = kept_path(table.device, table.precision, network, table.fields.batch, table.fields.streams)
    table.write(path)
    return path


def kept_path(device: str, precision: str, network: str, batch: int, streams: int) -> Path:
    """Return the file of a device's table in the user's folder: one for each precision, load and network."""
    return tables_folder() / f"{_stem(device)}.{precision}{load_label(batch, streams)}.{network}.json"


def _require_same_device(table: LatencyTable, other: LatencyTable, path: Path) -> None:
    """Require that all tables of one name have the same board, power mode and TensorRT version."""
    new, old = table.fields, other.fields
    pairs = [
        ("board", _board(table), _board(other)),
        ("runtime", table.runtime, other.runtime),
        ("power mode", new.device.power_mode, old.device.power_mode),
    ]
    differs = [f"the {what} is {now!r}, and was {then!r}" for what, now, then in pairs if now != then]
    if not differs:
        return
    same_network = set(new.networks) == set(old.networks) and table.precision == other.precision
    same_network = same_network and (new.batch, new.streams) == (old.batch, old.streams)
    if same_network and _board(table) == _board(other):
        say(f"The earlier table of {table.device} is replaced: {'; '.join(differs)}.")
        return
    raise CompressorError(
        f"A table of {table.device} from another state is stored already: {'; '.join(differs)}.",
        f"Give this device, or this state of it, its own name with --device NAME, or delete {path}.",
    )


def _require_not_another_module(table: LatencyTable) -> None:
    """Refuse the name of a shipped table for a measurement of another module."""
    found = table.fields.device
    require_module(
        table.device, found.sku, found.compute_capability or "an unknown one", "Give it its own name: --device NAME"
    )


def require_module(device: str, model: str, compute_capability: str, hint: str) -> None:
    """Refuse a board that is another module than a shipped name stands for.

    Args:
        device: The name; those of other devices are not checked.
        model: The board's model; one that names no module is not checked.
        compute_capability: That of its GPU; not checked if it is empty.
        hint: What to do instead.

    Raises:
        CompressorError: The compute capability or the model differs.
    """
    target = TARGETS.get(device)
    if target is None:
        return
    if compute_capability not in ("", target.compute_capability):
        raise CompressorError(
            f"{device} has compute capability {target.compute_capability}; this was measured on "
            f"{model or 'a device'} with {compute_capability}.",
            hint,
        )
    if family_of(model) not in ("", family_of(target.title)):
        raise CompressorError(f"{device} is a {target.title}, and the board is a {model}.", hint)


def _board(table: LatencyTable) -> str:
    return next((source for source in table.fields.sources if source.startswith("board ")), "")


def _stem(device: str) -> str:
    if not is_address(device):
        return device
    digest = hashlib.sha256(device.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', device)[:40]}-{digest}"


def load_label(batch: int, streams: int) -> str:
    """Return the part of a table's file name for its batch and streams; empty for one of each."""
    return (f".batch{batch}" if batch > 1 else "") + (f".streams{streams}" if streams > 1 else "")


def table_path(
    folder: Path, *, runtime: str, version: str, threads: int, network: str, batch: int = 1, streams: int = 1
) -> Path:
    """Return the file of a network's table; it depends on processor, runtime version, threads, batch and streams."""
    key = "|".join([cpu_model(), runtime, version, str(threads), network])
    name = f"{runtime}-{hashlib.sha256(key.encode()).hexdigest()[:20]}{load_label(batch, streams)}.json"
    return folder / "latency" / name


def cached_table(path: Path, *, quiet: bool = False) -> LatencyTable | None:
    """Read a table from the cache; None if there is none or it is damaged (with a message unless `quiet`)."""
    if not path.exists():
        return None
    try:
        return LatencyTable.read(path)
    except CompressorError as error:
        if not quiet:
            say(f"{error.message} It is measured again.")
        return None


@contextmanager
def measuring_alone(folder: Path) -> Iterator[None]:
    """Hold the machine's measurement lock: two processes that measure at the same time would disturb each other.

    Waits without limit for a process that is already measuring. The lock is released when its process ends.

    Raises:
        CompressorError: The folder cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        (folder / "latency").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "latency" / "measuring.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("Another process is measuring on this machine; waiting for it to end.")
            lock.acquire()
    except OSError as error:
        raise CompressorError(
            f"The cache folder {folder} cannot be written: {error.strerror or error}.",
            "Name another one: export COMPRESSOR_CACHE=DIR",
        ) from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        role: Dense network, network to fit to, or held-out network.
        widths: Width of each group, and where blocks may be removed 1 or 0 for each.
        sample: The measured sample.
        at_s: Measurement time so far, in seconds.
    """

    role: Role
    widths: tuple[int, ...]
    sample: Sample
    at_s: float


def heading_of(space: PruningSpace, seed: int, **device: str) -> dict[str, Any]:
    """Return the heading: signature of the space, seed of the sub-networks, and a description of the device."""
    return {
        "journal": 2,
        "network": network_signature(space),
        "least": [int(width) for width in space.min_widths],
        "steps": [int(group.granularity) for group in space.groups],
        **({"blocks": len(space.blocks)} if space.depth else {}),
        "seed": seed,
        **device,
    }


class Journal:
    """The measurements of one unfinished table.

    Args:
        path: The file; None writes nothing.
        heading: Identifies what is measured. A file with another heading is discarded.
    """

    def __init__(self, path: Path | None, heading: Mapping[str, Any]) -> None:
        self.path = path
        self._heading = json.loads(json.dumps(dict(heading)))
        self.records = self._read()

    def add(self, record: Record) -> None:
        """Append one measurement.

        Raises:
            CompressorError: The disk is full or the folder cannot be written.
        """
        self.records.append(record)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_to_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error

    def restart(self) -> None:
        """Discard all measurements."""
        self.records = []
        if self.path is not None:
            write_atomic(self.path, json.dumps(self._heading) + "\n")

    def close(self) -> None:
        """Delete the file once the table is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self) -> list[Record]:
        if self.path is None:
            return []
        try:
            lines = self.path.read_bytes().decode("utf-8").splitlines(keepends=True)
            heading, *rest = [json.loads(line) for line in lines if line.endswith("\n")]
            records = [_from_json(fields) for fields in rest]
            whole = all(line.endswith("\n") for line in lines)
        except (OSError, ValueError, KeyError, TypeError):
            heading, records, whole = None, [], True
        if heading != self._heading:
            self.restart()
            return []
        if not whole:  # a kill cut off the last line: the next record must start on a new line
            write_atomic(self.path, "".join([json.dumps(heading) + "\n", *map(_to_line, records)]))
        return records


def _to_line(record: Record) -> str:
    sample = record.sample
    fields = {
        "role": record.role,
        "widths": list(record.widths),
        "c_in": sample.c_in.tolist(),
        "c_out": sample.c_out.tolist(),
        "epilogues": list(sample.network.epilogues),
        "whole_ms": np.round(sample.times.whole_ms, 6).tolist(),
        "operators_ms": np.round(sample.times.operators_ms, 6).tolist(),
        "slowdown": round(sample.times.slowdown, 4),
        "at_s": round(record.at_s, 3),
    }
    return json.dumps(fields) + "\n"


def _from_json(fields: Mapping[str, Any]) -> Record:
    whole, operators = (np.asarray(fields[name], dtype=np.float64) for name in ("whole_ms", "operators_ms"))
    if not len(operators):  # the device does not time operators one by one
        operators = np.zeros((0, len(fields["epilogues"])))
    if fields["role"] not in ("dense", "fit", "held") or not len(whole) or operators.ndim != 2:
        raise ValueError("no measurement")
    c_in, c_out = (np.asarray(fields[name], dtype=np.int64) for name in ("c_in", "c_out"))
    network = TaggedNetwork(b"", (), tuple(str(each) for each in fields["epilogues"]))
    sample = Sample(c_in, c_out, network, NetworkTimes(whole, operators, float(fields["slowdown"])))
    return Record(
        fields["role"], tuple(int(width) for width in fields["widths"]), sample, float(fields["at_s"])
    )
