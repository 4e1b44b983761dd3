"""Timing through ONNX Runtime: counts, and what is refused."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from export.engine.bench import MIN_RUNS, OnnxRunner, run_for
from export.errors import ExportError
from tests.export.nets import matmul_chain


def test_measures_what_was_asked_for() -> None:
    runner = OnnxRunner(matmul_chain(64, 2), threads=1)
    stats = runner.summarise(runner.time(30))
    assert stats.runs == 30
    assert 0 < stats.min_ms <= stats.median_ms <= stats.p90_ms <= stats.p99_ms < 100
    assert stats.runtime == "onnxruntime"
    assert stats.threads == 1
    assert stats.version[0].isdigit()


def test_a_file_and_its_bytes_are_the_same_network(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(matmul_chain(16, 1, batch="batch"))
    for model in (path, str(path), path.read_bytes()):
        assert len(OnnxRunner(model).time(3)) == 3


def test_runs_for_a_time_and_at_least_the_fewest() -> None:
    runner = OnnxRunner(matmul_chain(256, 8))
    assert len(run_for(runner, 0.0)) == MIN_RUNS
    assert sum(run_for(runner, 0.2)) < 10_000


def test_eight_times_the_work_takes_longer() -> None:
    small, large = (OnnxRunner(matmul_chain(256, layers)) for layers in (2, 16))
    pairs = [(statistics.median(small.time(5)), statistics.median(large.time(5))) for _ in range(12)]
    assert 3 < statistics.median(slow / fast for fast, slow in pairs) < 16


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no ONNX file .*nowhere\.onnx"):
        OnnxRunner(tmp_path / "nowhere.onnx")
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"not a protobuf at all")
    with pytest.raises(ExportError, match=r"cannot load .*foreign\.onnx"):
        OnnxRunner(foreign)
