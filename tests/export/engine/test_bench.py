"""Percentiles, drift and checks of run times against numbers worked out by hand, and timing through ONNX Runtime."""

from __future__ import annotations

import math
import random
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from export.engine.bench import (
    MIN_RUNS,
    LatencyStats,
    OnnxRunner,
    drift_of,
    merged,
    percentile,
    run_for,
    running,
    summarise,
    together,
)
from export.errors import ExportError
from tests.export.nets import matmul_chain


def test_percentile_is_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.9) == pytest.approx(4.6)
    assert percentile([7.0], 0.99) == 7.0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_percentile_agrees_with_numpy(share: float) -> None:
    values = [random.Random(3).expovariate(1.0) for _ in range(101)]
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-12)


def test_summary_of_known_times() -> None:
    stats = summarise([1.0, 2.0, 3.0, 4.0], runtime="onnxruntime", version="1.0", threads=2)
    assert (stats.median_ms, stats.mean_ms, stats.min_ms, stats.runs) == (2.5, 2.5, 1.0, 4)
    assert stats.std_ms == pytest.approx(math.sqrt(1.25))
    assert (stats.runtime, stats.version, stats.threads) == ("onnxruntime", "1.0", 2)
    assert LatencyStats(**stats.to_dict()) == stats


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert drift_of([1.0] * 5) == 0.0
    assert drift_of([2.0, 2.0, 9.0, 9.0, 3.0, 3.0]) == pytest.approx(0.5)
    assert summarise([1.0] * 9, runtime="r", version="v").steady
    assert not summarise([1.0] * 3 + [1.1] * 3 + [1.2] * 3, runtime="r", version="v").steady


@pytest.mark.parametrize("times", [[], [1.0, 0.0], [1.0, float("nan")], [-1.0]])
def test_impossible_times_are_refused(times: list[float]) -> None:
    with pytest.raises(ExportError, match=r"at least one timed run|positive milliseconds"):
        summarise(times, runtime="r", version="v")


def test_measures_what_was_asked_for() -> None:
    runner = OnnxRunner(matmul_chain(64, 2), threads=1)
    stats = runner.summarise(runner.time(30))
    assert stats.runs == 30
    assert 0 < stats.min_ms <= stats.median_ms <= stats.p90_ms <= stats.p99_ms < 100
    assert stats.runtime == "onnxruntime"
    assert stats.threads == 1
    assert stats.version[0].isdigit()


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(ExportError, match=r"2000 threads were requested, .* process is \d+"):
        OnnxRunner(matmul_chain(64, 2), threads=2000)


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


def test_throughput_is_that_of_all_copies() -> None:
    stats = summarise([2.0, 6.0], runtime="r", version="v", batch=8, streams=2)
    assert stats.inputs_per_s == pytest.approx(8 * 2 / 4e-3)
    assert LatencyStats(**stats.to_dict()) == stats


def test_every_run_of_networks_at_once_meets_the_others() -> None:
    """A network whose work is short goes on until the others have done theirs."""
    counted = [0, 0, 0]

    class Counted:
        def __init__(self, place: int) -> None:
            self.place = place

        def run(self) -> None:
            counted[self.place] += 1
            time.sleep(0)

    def work(each: Counted) -> int:
        until = time.monotonic() + 30
        while each.place == 0 and min(counted[1:]) < 5 and time.monotonic() < until:
            time.sleep(0)
        return each.place

    assert together([Counted(place) for place in range(3)], work) == [0, 1, 2]  # type: ignore[arg-type]
    assert min(counted[1:]) >= 5
    assert merged([[1.0, 2.0], [3.0]]) == [1.0, 3.0, 2.0]


def test_an_error_of_one_network_ends_all_of_them() -> None:
    def work(runner: OnnxRunner) -> None:
        if runner is runners[1]:
            raise ExportError("it failed.")

    runners = [OnnxRunner(matmul_chain(16, 1)) for _ in range(2)]
    with pytest.raises(ExportError, match="it failed"):
        together(runners, work)


def test_networks_run_beside_a_block() -> None:
    runner = OnnxRunner(matmul_chain(64, 2))
    with running([OnnxRunner(matmul_chain(64, 2))]):
        assert len(runner.time(20)) == 20
    with running([]):
        assert len(runner.time(3)) == 3


def test_an_open_batch_is_chosen() -> None:
    model = matmul_chain(16, 1, batch="batch")
    assert (OnnxRunner(model).batch, OnnxRunner(model, batch=4).batch) == (1, 4)
