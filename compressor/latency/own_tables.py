"""Stores tables that were measured on remote devices, so that `--device NAME` finds them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.latency.table import LatencyTable, check_name, shipped_table, tables_folder, user_tables

if TYPE_CHECKING:
    pass



def table_file(table: LatencyTable) -> Path:
    """Return the file of a table: one for each device, precision and network."""
    (network,) = table.fields.networks
    return tables_folder() / f"{_stem(table.device)}.{table.precision}.{network}.json"


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
        if other.device == table.device and not table.device.startswith(
            "ssh:"
        ):  # the state of these devices is checked before each use
            _require_same_device(table, other, path)
    _require_not_another_module(table)
    path = table_file(table)
    table.write(path)
    return path


def _require_same_device(table: LatencyTable, other: LatencyTable, path: Path) -> None:
    """Require that all tables of one name have the same board, power mode and TensorRT version."""
    new, old = table.fields, other.fields
    pairs = [
        ("board", _board(table), _board(other)),
        ("runtime", f"{new.runtime.name} {new.runtime.version}", f"{old.runtime.name} {old.runtime.version}"),
        ("power mode", new.device.power_mode, old.device.power_mode),
    ]
    differs = [f"the {what} is {now!r}, and was {then!r}" for what, now, then in pairs if now != then]
    if not differs:
        return
    same_network = set(new.networks) == set(old.networks) and table.precision == other.precision
    if same_network and _board(table) == _board(other):
        say(f"The earlier table of {table.device} is replaced: {'; '.join(differs)}.")
        return
    raise CompressorError(
        f"A table of {table.device} from another state is stored already: {'; '.join(differs)}.",
        f"Give this device, or this state of it, its own name with --device NAME, or delete {path}.",
    )


def _require_not_another_module(table: LatencyTable) -> None:
    """Refuse the name of a shipped table for a measurement of another module."""
    shipped = None if table.device.startswith("ssh:") else shipped_table(table.device)
    if shipped is None:
        return
    expected = shipped.fields.device.compute_capability
    got = table.fields.device.compute_capability
    if got != expected:
        raise CompressorError(
            f"{table.device} has compute capability {expected}; this was measured on "
            f"{table.fields.device.sku or 'a device'} with {got or 'an unknown one'}.",
            "Give it its own name: --device NAME",
        )


def _board(table: LatencyTable) -> str:
    return next((source for source in table.fields.sources if source.startswith("board ")), "")


def _stem(device: str) -> str:
    if not device.startswith("ssh:"):
        return device
    digest = hashlib.sha256(device.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', device)[:40]}-{digest}"


