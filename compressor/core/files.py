"""Write files completely or not at all, and read them with clear error messages."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import export.files
from compressor.core.errors import CompressorError
from export.errors import ExportError
from export.files import sha256_file

__all__ = [
    "cache_folder",
    "disk_error",
    "now",
    "parse_json",
    "read_json",
    "read_text",
    "replacing",
    "sha256_file",
    "write_atomic",
]


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` so that `path` is either the old file or the complete new one, whenever the process dies.

    Raises:
        CompressorError: The disk is full or the folder cannot be written; `path` is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the context ends without an error.

    For writers that need a file name instead of bytes. After an error the temporary file is removed.
    """
    with export.files.replacing(path, failed=disk_error) as temporary:
        yield temporary


def disk_error(path: Path, error: OSError) -> CompressorError:
    """Return the error for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CompressorError(
            f"No space is left on the device for {path}.",
            "Free some space, then continue with: compress --resume RUN",
        )
    return CompressorError(
        f"{path} cannot be written: {error.strerror or error}.",
        "Make its folder writable, or use another one; that of a new run is given by --out DIR.",
    )


def read_text(path: Path, what: str, largest: int | None = None) -> str:
    """Return the text of a UTF-8 file.

    Args:
        path: File to read.
        what: Kind of file in messages, such as "recipe".
        largest: Maximum size in bytes; None for no limit.

    Raises:
        CompressorError: It is missing, too large, not a regular file, not UTF-8, or cannot be read.
    """
    try:
        return export.files.read_bytes(path, what, largest).decode("utf-8")
    except ExportError as error:
        raise CompressorError(error.message, error.hint) from error
    except UnicodeDecodeError as error:
        raise CompressorError(f"The {what} {path} is not UTF-8 text: {error}.") from error


def parse_json(text: str, source: str, hint: str = "") -> Any:
    """Return the value of a JSON text.

    Args:
        text: JSON text.
        source: Start of a message, such as the file's path.
        hint: How to fix an error.

    Raises:
        CompressorError: It is not JSON, or has extreme nesting or numbers.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: extreme nesting
        raise CompressorError(f"{source} is not readable as JSON: {error}.", hint) from error


def read_json(path: Path, what: str = "file", hint: str = "") -> Any:
    """Parse a JSON file.

    Raises:
        CompressorError: The file is missing, unreadable or not JSON.
    """
    return parse_json(read_text(path, what), str(path), hint)


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def cache_folder(folder: str | Path | None = None) -> Path:
    """Return the given folder, else `$COMPRESSOR_CACHE`, else the user's cache folder."""
    if folder is not None:
        return Path(folder)
    if os.environ.get("COMPRESSOR_CACHE"):
        return Path(os.environ["COMPRESSOR_CACHE"])
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("compressor"))
