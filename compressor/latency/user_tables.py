"""The user's own tables: measured on devices that are not here, kept beside the cache, found by `--device NAME`."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.latency.signature import network_signature
from compressor.latency.table import LatencyTable
from compressor.recipe import shipped
from export.connection import parse_destination
from export.errors import ExportError

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,60}", re.IGNORECASE)
RESERVED = ("local",)


def tables_folder() -> Path:
    """`$COMPRESSOR_CACHE/tables`, else the user's data folder."""
    if os.environ.get("COMPRESSOR_CACHE"):
        return Path(os.environ["COMPRESSOR_CACHE"]) / "tables"
    from platformdirs import user_data_dir

    return Path(user_data_dir("compressor")) / "tables"


def check_name(device: str) -> None:
    """Refuse what cannot be the name of a device that is measured elsewhere.

    Raises:
        CompressorError: it is no plain name, or stands for something else.
    """
    if device.startswith("ssh:"):
        try:
            parse_destination(device)
        except ExportError as error:
            raise CompressorError(error.message, error.hint) from None
    elif not _NAME.fullmatch(device) or device in RESERVED:
        raise CompressorError(
            f"{device!r} cannot be the name of a device.",
            "Use letters, digits, dots and dashes, and not 'local'.",
        )


def table_file(table: LatencyTable) -> Path:
    """Where a table belongs: one file for each device, precision and network."""
    (network,) = table.fields.networks
    return tables_folder() / f"{_stem(table.device)}.{table.precision}.{network}.json"


def user_tables(device: str | None = None) -> list[tuple[Path, LatencyTable]]:
    """The user's tables, those of one device or all, the newest file last; damaged files are said and left out."""
    found = []
    for path in sorted(_files(), key=lambda path: path.stat().st_mtime):
        try:
            table = LatencyTable.read(path)
        except CompressorError as error:
            say(f"{error.message} It is left out; delete it.")
            continue
        if device is None or table.device == device:
            found.append((path, table))
    return found


def find_user_table(
    device: str, precision: str | None = None, space: PruningSpace | None = None
) -> LatencyTable | None:
    """The user's table of a device; None where there is none.

    Args:
        device: Its name.
        precision: That it must be for.
        space: The network that it is for: one that has it comes first, then one that has its operators, then the
            newest, which has neither.
    """
    fitting = [
        table for _, table in user_tables(device) if precision is None or precision in table.precisions
    ]
    if space is not None:
        network = network_signature(space)
        measured = [table for table in fitting if network in table.fields.networks]
        fitting = measured or [table for table in fitting if not table.lacks(space)] or fitting
    return fitting[-1] if fitting else None


def keep(table: LatencyTable) -> Path:
    """Write a measured table into the user's folder.

    Raises:
        CompressorError: its measurements are there under another name, or its name belongs to another device.
    """
    check_name(table.device)
    results = {source for source in table.fields.sources if source.startswith("results ")}
    for path, other in user_tables():
        if results & set(other.fields.sources) and other.device != table.device:
            raise CompressorError(
                f"These measurements are kept already, as the device {other.device}.",
                f"Use --device {other.device}, or delete {path} first.",
            )
        if other.device == table.device and not table.device.startswith(
            "ssh:"
        ):  # these are asked before each use
            _require_same_device(table, other, path)
    _require_not_another_module(table)
    path = table_file(table)
    table.write(path)
    return path


def _require_same_device(table: LatencyTable, other: LatencyTable, path: Path) -> None:
    """Tables of one name are of one board, in one power mode, with one version of TensorRT."""
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
        f"A table of {table.device} is kept from another state of it: {'; '.join(differs)}.",
        f"Give this device, or this state of it, a name of its own with --device NAME, or delete {path}.",
    )


def _require_not_another_module(table: LatencyTable) -> None:
    """A shipped name may be taken only by a measurement of that very module."""
    path = shipped("latency_tables") / f"{table.device}.json"
    if table.device.startswith("ssh:") or not path.is_file():
        return
    expected = LatencyTable.read(path).fields.device.compute_capability
    got = table.fields.device.compute_capability
    if got != expected:
        raise CompressorError(
            f"{table.device} has compute capability {expected}; this was measured on "
            f"{table.fields.device.sku or 'a device'} with {got or 'an unknown one'}.",
            "Give it a name of its own: --device NAME",
        )


def _board(table: LatencyTable) -> str:
    return next((source for source in table.fields.sources if source.startswith("board ")), "")


def _stem(device: str) -> str:
    if not device.startswith("ssh:"):
        return device
    digest = hashlib.sha256(device.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', device)[:40]}-{digest}"


def _files() -> Iterator[Path]:
    yield from tables_folder().glob("*.json")
