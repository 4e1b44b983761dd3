"""Fixtures of the tests of whole runs."""

from __future__ import annotations

import pytest

DRAWN = ("test_pipeline.py",)
"""Files whose runs draw the figures of their reports, as the report's own tests do."""


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest) -> None:
    if request.path.name not in DRAWN:
        request.getfixturevalue("no_figures")
