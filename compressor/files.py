"""Files that appear whole or not at all, with the messages of the program where they cannot."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import export.files
from compressor.errors import CompressorError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` so that `path` is either the old file or the whole new one, whenever the process dies.

    Raises:
        CompressorError: the disk is full or the folder cannot be written; `path` is what it was before.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the context ends without an error.

    For writers that want a file name instead of bytes. The temporary is removed where they fail.
    """
    with export.files.replacing(path, failed=disk_error) as temporary:
        yield temporary


def disk_error(path: Path, error: OSError) -> CompressorError:
    """The message for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CompressorError(
            f"No space is left on the device for {path}.",
            "Free some space, then go on with: compress --resume RUN",
        )
    return CompressorError(
        f"{path} cannot be written: {error.strerror or error}.", "Choose another --out DIR."
    )


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        CompressorError: the file is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressorError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CompressorError(f"{path} is not readable as JSON: {error}.") from error


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
