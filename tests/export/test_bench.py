"""Timing through ONNX Runtime: counts, orders of size, turns, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from export import bench
from export.bench import OnnxRunner, compare_onnx, measure_onnx
from export.errors import ExportError
from tests.export.nets import matmul_chain

QUICK = {"warmup_s": 0.02}


def test_measures_what_was_asked_for() -> None:
    stats = measure_onnx(matmul_chain(64, 2), threads=1, repeats=30, attempts=1, **QUICK)
    assert stats.runs == 30
    assert 0 < stats.min_ms <= stats.median_ms <= stats.p90_ms <= stats.p99_ms < 100
    assert stats.runtime == "onnxruntime"
    assert stats.threads == 1
    assert stats.version[0].isdigit()


def test_a_file_and_its_bytes_are_the_same_network(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(matmul_chain(16, 1, batch="batch"))
    for model in (path, str(path), path.read_bytes()):
        assert measure_onnx(model, repeats=7, attempts=1, **QUICK).runs == 7


def test_time_limit_ends_the_counting() -> None:
    start = time.perf_counter()
    stats = measure_onnx(matmul_chain(256, 8), repeats=10**7, max_seconds=0.2, attempts=1, **QUICK)
    assert bench.MIN_RUNS <= stats.runs < 10**7
    assert time.perf_counter() - start < 10


def test_turns_see_the_ratio_of_the_work() -> None:
    small, large = matmul_chain(256, 2), matmul_chain(256, 16)
    result = compare_onnx([small, large, small], repeats=120, rounds=12, **QUICK)
    assert [stats.runs for stats in result.stats] == [120, 120, 120]
    assert result.ratios[0] == 1.0
    assert 4 < result.ratios[1] < 13  # eight times the work
    assert 0.5 < result.ratios[2] < 2
    assert result.stats[1].median_ms > result.stats[0].median_ms


def test_a_drifting_machine_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = iter([[1.0] * 4 + [2.0] * 3, [1.0] * 7])
    monkeypatch.setattr(OnnxRunner, "warm_up", lambda self, seconds: 1.0)
    monkeypatch.setattr(OnnxRunner, "time", lambda self, runs: next(blocks))
    stats = measure_onnx(matmul_chain(8, 1), repeats=7, attempts=3)
    assert stats.steady
    assert next(blocks, None) is None  # the second attempt was good enough, a third one was not made


def test_drift_that_stays_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRunner, "time", lambda self, runs: [1.0] * 4 + [2.0] * 3)
    monkeypatch.setattr(OnnxRunner, "warm_up", lambda self, seconds: 1.0)
    stats = measure_onnx(matmul_chain(8, 1), repeats=7, attempts=2)
    assert stats.drift == pytest.approx(1.0)
    assert not stats.steady


@pytest.mark.parametrize(
    ("setting", "value"),
    [("repeats", 0), ("attempts", 0), ("warmup_s", -1.0), ("max_seconds", 0.0), ("threads", 0)],
)
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ExportError, match="at least"):
        measure_onnx(matmul_chain(8, 1), **{setting: value})  # type: ignore[arg-type]


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no ONNX file .*nowhere\.onnx"):
        measure_onnx(tmp_path / "nowhere.onnx")
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"not a protobuf at all")
    with pytest.raises(ExportError, match=r"cannot load .*foreign\.onnx"):
        measure_onnx(foreign)
    with pytest.raises(ExportError, match="at least one network"):
        compare_onnx([])
