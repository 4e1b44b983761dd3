"""Unpacking archives in tests on every Python that is supported, and lists of checksums."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Mapping
from typing import Any

# Early releases of Python 3.10 and 3.11 have no extraction filters.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def checksums(files: Mapping[str, bytes]) -> bytes:
    """The checksums of `files` in the format of `sha256sum -c`."""
    return "".join(
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)
    ).encode()
