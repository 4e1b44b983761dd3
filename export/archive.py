"""Archives that repeat byte for byte, and archives from elsewhere read without trusting a name in them."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from export.errors import ExportError
from export.files import read_bytes, sha256_bytes
from export.text import plain

CHECKSUMS = "SHA256SUMS"
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
"""What a file or folder may be called that a script will handle."""

LARGEST = 2 << 30
"""Bytes that an archive may unpack to; a small file can announce any number of them."""


def pack(files: Mapping[str, bytes], folder: str, *, executable: frozenset[str] = frozenset()) -> bytes:
    """A `.tar.gz` of `files` below `folder`; equal files give equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as packed, tarfile.open(
        fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT
    ) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode = len(files[name]), 0o755 if name in executable else 0o644
            archive.addfile(entry, io.BytesIO(files[name]))
    return buffer.getvalue()


def checksums(files: Mapping[str, bytes]) -> bytes:
    """The lines that `sha256sum -c` reads."""
    return "".join(f"{sha256_bytes(files[name])}  {name}\n" for name in sorted(files)).encode()


def unpack(path: str | Path, *, largest: int = LARGEST) -> dict[str, bytes]:
    """The files of a `.tar.gz` or of a folder, by their names below its top folder. Nothing is written.

    Args:
        path: The archive or the folder.
        largest: Bytes that it may hold.

    Raises:
        ExportError: it is missing, damaged or too large, or a member is no plain file of the archive's own
            folder.
    """
    source = Path(path)
    too_large = ExportError(f"{source} unpacks to more than {largest >> 20} MB; it was not read.")
    if source.is_dir():
        items = [item for item in sorted(source.rglob("*")) if item.is_file() and not item.is_symlink()]
        if sum(item.stat().st_size for item in items) > largest:
            raise too_large
        return {item.relative_to(source).as_posix(): read_bytes(item, "file") for item in items}
    content = read_bytes(source, "archive")
    files: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                if member.isdir():
                    continue
                name = _own_name(member, source)
                total += member.size
                if total > largest:
                    raise too_large
                opened = archive.extractfile(member)
                files[name] = opened.read() if opened is not None else b""
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ExportError(f"{source} is no whole .tar.gz: {error}.", "Copy it again.") from error
    if not files:
        raise ExportError(f"{source} is empty.")
    return files


def json_object(files: Mapping[str, bytes], name: str, source: str | Path) -> dict[str, Any]:
    """The object that a JSON file among `files` holds.

    Raises:
        ExportError: it is missing, no JSON, or no object.
    """
    try:
        content = json.loads(files[name].decode("utf-8"))
    except KeyError:
        raise ExportError(f"{source} has no {name}.", "Copy it again as a whole.") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{source}: {name} is no JSON: {error}.", "Copy it again as a whole.") from error
    if not isinstance(content, dict):
        raise ExportError(f"{source}: {name} holds a {type(content).__name__}, expected an object.")
    return content


def printable(value: Any, longest: int = 120) -> str:
    """What a device says, in ASCII and short: it is shown to people."""
    return "".join(char for char in plain(str(value)) if " " <= char <= "~")[:longest].strip()


def top_folder(path: str | Path) -> str:
    """The folder that a bundle unpacks to.

    Raises:
        ExportError: it is missing, damaged, or called by more than letters, digits, dots and dashes.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(read_bytes(Path(path), "archive")), mode="r:gz") as archive:
            first = archive.next()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ExportError(f"{path} is no whole .tar.gz: {error}.", "Copy it again.") from error
    name = first.name.split("/")[0] if first is not None else ""
    if not PLAIN.fullmatch(name):
        raise ExportError(f"{path} unpacks to a folder called {name!r}; it was not read.")
    return name


def _own_name(member: tarfile.TarInfo, source: Path) -> str:
    parts = PurePosixPath(member.name).parts
    hostile = member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name
    if hostile or not member.isfile():
        what = "leaves the archive's folder" if hostile else "is no plain file"
        raise ExportError(f"{source} has a member that {what}: {member.name!r}. It was not read.")
    below = parts[1:] if len(parts) > 1 else parts
    return "/".join(below)


def require_checksums(files: Mapping[str, bytes], source: str | Path) -> None:
    """Check the files against the list that came with them.

    Raises:
        ExportError: the list is missing or unreadable, a file is missing, differs, or is not on the list.
    """
    if CHECKSUMS not in files:
        raise ExportError(
            f"{source} has no {CHECKSUMS}.", "Give the archive or folder that the script wrote."
        )
    listed: dict[str, str] = {}
    for line in files[CHECKSUMS].decode("utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise ExportError(f"{source}: {CHECKSUMS} has a line that is none of sha256sum's: {line[:80]!r}.")
        listed[name] = digest
    for name, digest in listed.items():
        if name not in files:
            raise ExportError(f"{source} lacks {name}.", "Copy it again as a whole.")
        if sha256_bytes(files[name]) != digest:
            raise ExportError(
                f"{source}: the checksum of {name} does not match.", "Copy it again as a whole."
            )
    unlisted = sorted(set(files) - set(listed) - {CHECKSUMS})
    if unlisted:
        raise ExportError(f"{source} has a file that is on no list: {unlisted[0]}.")
