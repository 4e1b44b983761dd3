"""Atomic file writes, bounded reads and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from export.errors import ExportError


@contextmanager
def replacing(path: Path, failed: Callable[[Path, OSError], Exception] | None = None) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the context ends without an error.

    Args:
        path: The file to write.
        failed: Returns the error to raise if it cannot be written; None for an `ExportError`.

    Raises:
        ExportError: the folder cannot be written or the disk is full; `path` is unchanged.
    """
    explained = failed or disk_error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise explained(path, error) from error
    os.close(handle)
    temporary = Path(name)  # its name matches `_TEMPORARY`
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise explained(path, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files that `replacing` left in a folder tree when its process was killed.

    Call it only while no other process writes to the folder.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            if _TEMPORARY.fullmatch(name):
                Path(place, name).unlink()


def is_temporary_of(path: Path, name: str) -> bool:
    """Whether a file is a temporary that a killed `replacing` left for the file `name` beside it."""
    return bool(_TEMPORARY.fullmatch(path.name)) and path.name.startswith(f".{name}.")


_TEMPORARY = re.compile(r"\..+(\.[^.]+)\.[a-z0-9_]{8}\1")
"""Names that `replacing` uses, such as `.model.onnx.k3_x9abc.onnx`: the repeated suffix identifies them."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically: `path` is either the old file or the complete new one.

    Raises:
        ExportError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON with sorted keys, so that equal contents give equal files."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for binary reading; FIFOs and devices, which may block or never end, are refused.

    Raises:
        OSError: the file is missing or not readable, or is a folder, a FIFO, a socket or a device.
    """
    # O_NONBLOCK: opening a FIFO would otherwise wait for its writer
    handle = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            what = (
                "a FIFO" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) else "not a regular file"
            )
            raise OSError(errno.EINVAL, f"It is {what}; a regular file was expected", str(path))
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def read_bytes(path: Path, what: str, largest: int | None = None) -> bytes:
    """Read the bytes of a file.

    Args:
        path: The file.
        what: The kind of file for messages, such as "ONNX file".
        largest: Maximum size in bytes; None for no limit.

    Raises:
        ExportError: the file is missing, too large, not a regular file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if largest is not None and size > largest:
                raise ExportError(f"The {what} {path} has {size:,} bytes; at most {largest:,} are read.")
            return file.read()
    except FileNotFoundError:
        raise ExportError(f"There is no {what} {path}.") from None
    except OSError as error:
        raise ExportError(f"The {what} {path} cannot be read: {error.strerror or error}.") from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ExportError: the file is missing, unreadable, not valid JSON, or not an object.
    """
    try:
        content = json.loads(read_bytes(path, what).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # wrong encoding, invalid JSON, too long a number, too deep nesting
        raise ExportError(f"The {what} {path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ExportError(f"The {what} {path} holds a {type(content).__name__}, expected an object.")
    return content


def sha256_bytes(content: bytes) -> str:
    """The SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def disk_error(path: Path, error: OSError) -> ExportError:
    """The error for a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExportError(f"No space is left on the device for {path}.", "Free some space, then try again.")
    return ExportError(f"{path} cannot be written: {error.strerror or error}.")
