"""What a run makes of a network that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor import compress
from compressor.latency.networks import tag
from tests.other_device import OtherDevice, Proportional
from tests.runs import recipe


@pytest.mark.parametrize(("share", "told"), [(0.9, False), (1.1, True)])
def test_a_network_that_saves_multiply_adds_and_no_time_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, told: bool
) -> None:
    dense_ms = Proportional().measure(tag(finished / "checkpoints/dense.onnx"), 1.0).median_ms
    OtherDevice(1.0).install_measuring(monkeypatch, slim_ms=[share * dense_ms])
    result = compress(recipe(budgets={"flops": "50%"}, agent="uniform"), out=tmp_path / "run")
    assert result.exit_code == 0
    assert any("110% of the dense one's measured time" in note for note in result.manifest["notes"]) == told
    assert ("there was no latency budget" in (tmp_path / "run/report.html").read_text()) == told
