"""Reproducible archives, and safe reading of untrusted ones."""

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
"""Names of files and folders that shell scripts can handle safely."""

LARGEST = 2 << 30
"""Maximum unpacked size in bytes; the header of a small file can state any size."""

MOST_MEMBERS = 20_000
LARGEST_HEADER = 1 << 16
"""Maximum bytes of an extended header (a long name, times), which tarfile reads into memory."""

_BLOCK = 512
_READ_AT_ONCE = 1 << 20
_EXTENDED = frozenset(
    (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
)
_DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError, IndexError, KeyError)
"""Errors from reading a damaged archive; the last four come from numbers and names in its headers."""


def pack(files: Mapping[str, bytes], folder: str, *, executable: frozenset[str] = frozenset()) -> bytes:
    """Pack `files` below `folder` into a `.tar.gz`; equal files give equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as packed, tarfile.open(
        fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT
    ) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode = len(files[name]), 0o755 if name in executable else 0o644
            archive.addfile(entry, io.BytesIO(files[name]))
    return buffer.getvalue()


def unpack(path: str | Path, *, largest: int = LARGEST) -> dict[str, bytes]:
    """Read the files of a `.tar.gz` or a folder into memory, by their names below its top folder.

    Args:
        path: The archive or the folder.
        largest: Maximum size of the files in bytes.

    Raises:
        ExportError: it is missing, damaged or too large, or a member is not a regular file inside the archive's
            folder.
    """
    source = Path(path)
    too_large = _too_large(source, largest)
    if source.is_dir():
        items = [item for item in sorted(source.rglob("*")) if item.is_file() and not item.is_symlink()]
        if sum(item.stat().st_size for item in items) > largest:
            raise too_large
        return {item.relative_to(source).as_posix(): read_bytes(item, "file") for item in items}
    content = read_bytes(source, "archive", largest)
    files: dict[str, bytes] = {}
    try:
        if not _is_modest(content, largest):
            raise too_large
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                if member.isdir():
                    continue
                name = _own_name(member, source)
                opened = archive.extractfile(member)
                files[name] = opened.read() if opened is not None else b""
    except _DAMAGED as error:
        raise ExportError(f"{source} is not a complete .tar.gz: {error}.", "Copy it again.") from error
    if not files:
        raise ExportError(f"{source} is empty.")
    return files


def _too_large(source: str | Path, largest: int) -> ExportError:
    return ExportError(f"{source} unpacks to more than {largest >> 20} MB or {MOST_MEMBERS:,} files.")


def json_object(files: Mapping[str, bytes], name: str, source: str | Path) -> dict[str, Any]:
    """Parse a JSON file among `files` that holds an object.

    Raises:
        ExportError: the file is missing, not valid JSON, or not an object.
    """
    try:
        content = json.loads(files[name].decode("utf-8"))
    except KeyError:
        raise ExportError(f"{source} has no {name}.", "Copy all of it again.") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{source}: {name} is not valid JSON: {error}.", "Copy all of it again.") from error
    if not isinstance(content, dict):
        raise ExportError(f"{source}: {name} holds a {type(content).__name__}, expected an object.")
    return content


def printable(value: Any, longest: int = 120) -> str:
    """Text of a device as short ASCII, for display."""
    return "".join(char for char in plain(str(value)) if " " <= char <= "~")[:longest].strip()


def top_folder(path: str | Path) -> str:
    """The folder that a bundle unpacks to.

    Raises:
        ExportError: the bundle is missing or damaged, or the name has other characters than letters, digits, dots and
            dashes.
    """
    content = read_bytes(Path(path), "archive", LARGEST)
    try:
        if not _is_modest(content, LARGEST):
            raise _too_large(path, LARGEST)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            first = archive.next()
    except _DAMAGED as error:
        raise ExportError(f"{path} is not a complete .tar.gz: {error}.", "Copy it again.") from error
    name = first.name.split("/")[0] if first is not None else ""
    if not PLAIN.fullmatch(name):
        raise ExportError(f"{path} unpacks to a folder with the name {name!r}; it was not read.")
    return name


def _is_modest(content: bytes, largest: int) -> bool:
    """Whether a .tar.gz unpacks to at most `largest` bytes, in a bounded number of members with small headers.

    It is unpacked in pieces that are discarded, because tarfile reads an extended header of any size into memory.

    Raises:
        tarfile.TarError, OSError, EOFError, zlib.error: the archive is damaged, or an extended header is too large.
    """
    total = members = 0
    extended = 0
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as plain:
        while len(block := plain.read(_BLOCK)) == _BLOCK and block.count(b"\0") != _BLOCK:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            large = header.size < 0 or (header.type in _EXTENDED and header.size > LARGEST_HEADER)
            extended = extended + 1 if header.type in _EXTENDED else 0
            if large or extended > 4:  # tarfile reads consecutive extended headers recursively
                raise tarfile.ReadError("a header is too large, or there are too many in a row")
            members += 1
            left = -(-header.size // _BLOCK) * _BLOCK if header.isreg() or header.type in _EXTENDED else 0
            total += _BLOCK + left
            if total > largest + members * 2 * _BLOCK or members > MOST_MEMBERS:
                return False
            while left:
                piece = plain.read(min(left, _READ_AT_ONCE))
                if not piece:
                    raise EOFError("it ends in the middle of a file")
                left -= len(piece)
    return True


def _own_name(member: tarfile.TarInfo, source: Path) -> str:
    parts = PurePosixPath(member.name).parts
    hostile = member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name
    if hostile or not member.isfile() or member.issparse():
        what = "leaves the archive's folder" if hostile else "is not a regular file"
        raise ExportError(f"{source} has a member that {what}: {member.name!r}. It was not read.")
    below = parts[1:] if len(parts) > 1 else parts
    return "/".join(below)


def require_checksums(files: Mapping[str, bytes], source: str | Path, *, whole: bool = True) -> None:
    """Check the files against their list of checksums.

    Args:
        files: The files by name, among them the list.
        source: Their archive or folder, for messages.
        whole: Whether every listed file must be there.

    Raises:
        ExportError: the list is missing or unreadable, or a file is missing, differs, or is not listed.
    """
    if CHECKSUMS not in files:
        raise ExportError(
            f"{source} has no {CHECKSUMS}.", "Give the archive or folder that the script wrote."
        )
    listed: dict[str, str] = {}
    for line in files[CHECKSUMS].decode("utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise ExportError(f"{source}: {CHECKSUMS} has a line that sha256sum does not write: {line[:80]!r}.")
        listed[name] = digest
    missing = [name for name in listed if name not in files]
    if whole and missing:
        raise ExportError(f"{source} has no {missing[0]}.", "Copy all of it again.")
    for name, content in files.items():
        if name == CHECKSUMS:
            continue
        if name not in listed:
            raise ExportError(f"{source} has a file without a checksum: {name}.")
        if sha256_bytes(content) != listed[name]:
            raise ExportError(
                f"{source}: the checksum of {name} does not match.", "Copy all of it again."
            )
