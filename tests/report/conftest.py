"""The made-up run as fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from invented_run import invented_episodes, invented_manifest, write_run

from tests.conftest import FIGURES


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take most of a page's time, where they are not the point."""
    for name in FIGURES:
        monkeypatch.setattr(f"compressor.report.{name}", lambda *_: None)


@pytest.fixture
def manifest() -> dict[str, Any]:
    return invented_manifest()


@pytest.fixture
def run_folder(tmp_path: Path, manifest: dict[str, Any]) -> Path:
    """The made-up run on disk."""
    return write_run(tmp_path / "run", manifest, invented_episodes())
