"""Fixtures of the tests of whole runs."""

from __future__ import annotations

import pytest

DRAWN = ("test_pipeline.py",)
"""Files whose runs draw the figures of their reports, as the report's own tests do."""

FIGURES = ("layer_bars", "reward_curve", "candidate_scatter", "training_curve")


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write reports without figures, which take a sixth of a small run's time."""
    if request.path.name not in DRAWN:
        for name in FIGURES:
            monkeypatch.setattr(f"compressor.report.plots.{name}", lambda *_: None)
