"""Searches to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.search.bench import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def new_bench(tmp_path: Path) -> Any:
    """Benches in folders of their own."""
    return lambda name: Bench(tmp_path / name)
