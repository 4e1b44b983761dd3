"""How a percentile of single runs is kept, and a batch in streams: on made-up devices, and on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor import run_recipe
from compressor.latency.networks import tag
from compressor.latency.paired import ERROR, PairSession, PairSessions, Timing, burst_of
from compressor.latency.request import Turns
from compressor.run.exports import Request, export_format
from compressor.run.measure import measure_again
from export.convert.batches import ONE
from export.convert.onnx_header import read_header
from tests.other_device import OtherDevice, Proportional
from tests.runs import recipe

FINE = {"granularity": 4, "min_share": 0.1, "compensate": "off"}
DENSE_TAIL, SLIM_TAIL = 1.2, 1.5


@pytest.fixture(scope="module")
def by_table(finished: Path) -> float:
    """What the made-up device's table says that the dense network takes, in milliseconds."""
    return Proportional().measure(tag(finished / "checkpoints/dense.onnx"), 1.0).median_ms


@pytest.fixture(params=[0.0])
def tailed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device as its table says, of which four runs in a hundred take longer; the parameter varies how much."""

    def measured(dense: Path, slim: Path, asked: Any, turns: Turns) -> Timing:
        rng, sessions = np.random.default_rng(7), []
        usual = [Proportional().measure(tag(path), 1.0).median_ms for path in (dense, slim)]
        for _ in range(12):
            tails = np.array([DENSE_TAIL, SLIM_TAIL]) * np.exp(request.param * rng.standard_normal(2))
            first, second = (
                burst_of([ms] * 96 + [ms * tail] * 4) for ms, tail in zip(usual, tails.tolist(), strict=True)
            )
            session: PairSession = [(first, second)] * 4
            sessions.append(session)
        found = PairSessions(sessions)
        ratio = found.ratio(ERROR, 1.0, turns.percentile, turns.limit_ms is not None)
        return found.timing(ratio, turns.percentile, runtime="made up", version="1", threads=1)

    OtherDevice(1.0).install(monkeypatch)
    monkeypatch.setattr("compressor.latency.local.measured", measured)


@pytest.mark.usefixtures("tailed")
def test_a_share_is_of_the_same_percentile(by_table: float, tmp_path: Path) -> None:
    wanted = recipe(budgets={"latency": "60%"}, percentile=99, pruning=FINE)
    result = run_recipe(wanted, out=tmp_path / "run")
    first, *_, last = result.manifest["rounds"]
    assert first["verdict"] == "missed"  # the table knows medians only
    assert first["ratio"] == pytest.approx(first["predicted_ratio"] * SLIM_TAIL / DENSE_TAIL, rel=0.05)
    assert last["ratio"] == pytest.approx(last["predicted_ratio"], rel=0.1)  # now it knows the tails
    assert (result.exit_code, last["verdict"]) == (0, "kept")
    latency = result.manifest["latency"]
    assert (latency["batch"], latency["percentile"], latency["streams"]) == (1, 99, 1)
    assert latency["dense_ms"] == pytest.approx(DENSE_TAIL * by_table, rel=1e-3)
    assert latency["measured_ms"] == pytest.approx(latency["p99_ms"]) == pytest.approx(SLIM_TAIL * latency["median_ms"])
    assert (latency["dense_tail"], latency["tail"]) == (pytest.approx(DENSE_TAIL), pytest.approx(SLIM_TAIL))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "latency (p99 of single runs)" in page
    assert "Latency, measured (p99)" in page
    assert "1.50 times the median" in page


@pytest.mark.usefixtures("tailed")
def test_milliseconds_are_the_slim_networks_percentile(by_table: float, tmp_path: Path) -> None:
    wanted = recipe(budgets={"latency": f"{0.9 * by_table}ms"}, percentile=99, pruning=FINE)
    manifest = run_recipe(wanted, out=tmp_path / "run").manifest
    (budget,) = manifest["budgets"]
    assert (manifest["exit_code"], budget["verdict"]) == (0, "kept")
    assert budget["target"] == pytest.approx(0.9 * by_table)
    assert 0.8 * by_table < budget["measured"] <= budget["target"]
    assert budget["measured"] == pytest.approx(manifest["latency"]["p99_ms"])
    said = "\n".join(measure_again(tmp_path / "run"))
    assert "The latency (p99 of single runs) is compared." in said
    assert "1.50 times its median" in said
    assert said.count(": kept") == 1


@pytest.mark.parametrize("tailed", [0.08], indirect=True)
@pytest.mark.usefixtures("tailed")
def test_the_search_leaves_room_for_the_noise(tmp_path: Path) -> None:
    wanted = recipe(budgets={"latency": "70%"}, percentile=99, pruning=FINE)
    manifest = run_recipe(wanted, out=tmp_path / "run").manifest
    last = manifest["rounds"][-1]
    assert 0.01 < manifest["noise"] < 0.3
    assert (manifest["exit_code"], last["verdict"]) == (0, "kept")
    assert last["interval"][1] <= 1.01 * last["target_ratio"]
    assert last["ratio"] < (1 - 0.5 * manifest["noise"]) * last["target_ratio"]


def test_all_that_a_run_writes_takes_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OtherDevice(1.0).install(monkeypatch)
    load = {"batch": 4, "streams": 2, "percentile": 90}
    wanted = recipe(budgets={"latency": "10s"}, epochs=1, **load)
    manifest = run_recipe(wanted, out=tmp_path / "run").manifest
    folder, latency = tmp_path / "run", manifest["latency"]
    for name in ("model.onnx", "checkpoints/dense.onnx"):
        header = read_header(folder / name)
        assert header.shapes[header.inputs[0]][0] == 4
    assert {name: latency[name] for name in load} == load
    assert latency["inputs_per_s"] > 0
    assert manifest["accuracy"]["exported_images"] == manifest["accuracy"]["images"]
    page = (folder / "report.html").read_text()
    assert "latency of a batch of 4 (p90 of single runs, 2 networks at once)" in page
    assert "Throughput, inputs a second" in page
    assert "each run is of a batch of 4; 2 copies" in (folder / "latency_table.json").read_text()
    assert "checked when the run wrote it" in next(export_format(folder, Request()))
    assert "model.batch1.onnx" in next(export_format(folder, Request(batch=ONE)))
    assert read_header(folder / "model.batch1.onnx").shapes["input"][0] == 1
