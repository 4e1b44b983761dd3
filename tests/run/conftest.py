"""Fixtures of the tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import MEASURED
from tests.other_device import OtherDevice

TIMED = ("test_exports.py", "test_mixed_run.py", "test_pipeline.py", "test_trial.py")
"""Files whose runs really time their networks, as the tests of latencies do."""


@pytest.fixture(scope="module", autouse=True)
def _made_up_times(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make up the times of networks: starting the processes that time them takes a third of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in TIMED:
            patch.setattr(MEASURED, OtherDevice(1.0).measured)
        yield
