"""Unpacking archives in tests on every Python that is supported."""

from __future__ import annotations

import tarfile
from typing import Any

# Early releases of Python 3.10 and 3.11 have no extraction filters.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
