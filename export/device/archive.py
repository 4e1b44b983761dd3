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

MOST_MEMBERS = 20_000
LARGEST_HEADER = 1 << 16
"""Bytes of an extended header, which hold a member's long name or its times; a reader keeps them in memory."""

_BLOCK = 512
_READ_AT_ONCE = 1 << 20
_EXTENDED = frozenset(
    (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
)
_DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError, IndexError, KeyError)
"""What reading a damaged archive raises; the last four come from numbers and names in its headers."""


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
    too_large = ExportError(f"{source} unpacks to more than {largest >> 20} MB or {MOST_MEMBERS:,} files.")
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
    content = read_bytes(Path(path), "archive", LARGEST)
    try:
        if not _is_modest(content, LARGEST):
            raise ExportError(f"{path} unpacks to more than {LARGEST >> 20} MB or {MOST_MEMBERS:,} files.")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            first = archive.next()
    except _DAMAGED as error:
        raise ExportError(f"{path} is no whole .tar.gz: {error}.", "Copy it again.") from error
    name = first.name.split("/")[0] if first is not None else ""
    if not PLAIN.fullmatch(name):
        raise ExportError(f"{path} unpacks to a folder called {name!r}; it was not read.")
    return name


def _is_modest(content: bytes, largest: int) -> bool:
    """Whether a .tar.gz unpacks to at most `largest` bytes, in a bounded number of members with small headers.

    It is unpacked piece by piece and forgotten, because tarfile reads an extended header of any size into memory.

    Raises:
        tarfile.TarError, OSError, EOFError, zlib.error: it is damaged, or has an extended header without bounds.
    """
    total = members = 0
    extended = 0
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as plain:
        while len(block := plain.read(_BLOCK)) == _BLOCK and block.count(b"\0") != _BLOCK:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            large = header.size < 0 or (header.type in _EXTENDED and header.size > LARGEST_HEADER)
            extended = extended + 1 if header.type in _EXTENDED else 0
            if large or extended > 4:  # more of them in a row would be read by as deep a recursion
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
