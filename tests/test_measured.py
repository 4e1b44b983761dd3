"""How often two files are timed, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor import compress
from compressor.latency.ort_profile import tag
from compressor.onnx_files import measured
from export.stats import LatencyStats, summarise
from tests.other_device import OtherDevice, Proportional
from tests.runs import recipe


class Scripted:
    """Takes the place of `OrtApart`: each process finds the slim network at the next time of a list."""

    def __init__(self, slim_ms: list[float]) -> None:
        self.slim_ms, self.processes, self.closed = slim_ms, 0, 0

    def __call__(self, threads: int) -> Scripted:
        self.processes += 1
        return self

    def compare(self, first: Path, second: Path, seed: int) -> tuple[LatencyStats, LatencyStats]:
        assert seed == self.processes - 1
        time = self.slim_ms[seed % len(self.slim_ms)]
        dense, slim = (
            summarise([each] * 10, runtime="made up", version="1", threads=1) for each in (4.0, time)
        )
        return dense, slim

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("slim_ms", "repeats", "processes", "median_ms"),
    [
        ([2.0, 2.01, 1.99], 5, 5, 2.0),
        ([2.0, 2.01, 1.9], 1, 1, 2.0),
        ([2.0, 2.2, 1.9], 5, 15, 2.0),
        ([2.0, 2.1, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], 5, 6, 2.0),
        ([1.0, 3.0, 1.0, 3.0, 1.0], 5, 15, 1.0),
    ],
)
def test_goes_on_until_the_time_is_known(
    monkeypatch: pytest.MonkeyPatch, slim_ms: list[float], repeats: int, processes: int, median_ms: float
) -> None:
    scripted = Scripted(slim_ms)
    monkeypatch.setattr("compressor.latency.apart.OrtApart", scripted)
    dense, slim = measured(Path("dense.onnx"), Path("slim.onnx"), 1, repeats)
    assert (scripted.processes, scripted.closed) == (processes, processes)
    assert (dense.median_ms, slim.median_ms) == (4.0, median_ms)
    assert dense.runs == slim.runs == 10 * processes


@pytest.mark.parametrize(("share", "told"), [(0.9, False), (1.1, True)])
def test_a_network_that_saves_multiply_adds_and_no_time_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, told: bool
) -> None:
    dense_ms = Proportional().measure(tag(finished / "checkpoints/dense.onnx"), 1.0).median_ms
    OtherDevice(1.0).install_measuring(monkeypatch, slim_ms=[share * dense_ms])
    result = compress(recipe(budgets={"flops": "50%"}, agent="uniform"), out=tmp_path / "run")
    assert result.exit_code == 0
    assert any("110% of the dense one's time" in note for note in result.manifest["notes"]) == told
    assert ("no latency was asked for" in (tmp_path / "run/report.html").read_text()) == told
