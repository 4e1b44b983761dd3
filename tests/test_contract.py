"""How the promise in milliseconds is kept: on slower, faster and noisy devices, and across stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from compressor import compress
from compressor.contract import kept_plan, remember
from compressor.errors import CompressorError
from compressor.latency.ort_profile import tag
from compressor.pipeline import resume
from compressor.pruning.plan import ChannelPlan
from compressor.run_dir import RunDir
from export.stats import LatencyStats, summarise
from tests.other_device import OtherDevice, Proportional
from tests.runs import manifest_of, recipe

FINE = {"granularity": 4, "min_share": 0.1}


@pytest.fixture(scope="module")
def by_table(finished: Path) -> float:
    """What the made-up device's table says that the dense network takes, in milliseconds."""
    return Proportional().measure(tag(finished / "checkpoints/dense.onnx"), 1.0).median_ms


@pytest.mark.parametrize(("factor", "noise"), [(1.5, 0.0), (1.0, 0.2)])
def test_a_slower_or_noisy_device_tightens_the_search_until_it_measures_the_target(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, noise: float
) -> None:
    OtherDevice(factor, noise).install(monkeypatch)
    wanted = recipe(budgets={"latency": f"{0.8 * by_table}ms"}, pruning=FINE)
    result = compress(wanted, out=tmp_path / "run")
    rounds = result.manifest["rounds"]
    assert rounds[-1]["kept"]
    assert result.exit_code == 0
    budget = result.manifest["budgets"][0]
    assert budget["measured"] <= budget["target"]
    if not noise:
        scored = result.manifest["search"]["evaluations"]
        assert scored > result.manifest["evaluations_before"] > 0  # those of all searches
        assert not rounds[0]["kept"]
        assert rounds[0]["measured_ms"] > 1.05 * rounds[0]["predicted_ms"]
        assert rounds[-1]["measured_ms"] == pytest.approx(rounds[-1]["predicted_ms"], rel=0.1)
        assert rounds[-1]["measured_ms"] < rounds[0]["measured_ms"]


def test_a_share_is_of_the_dense_network_at_the_same_time(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that others slow down, or no longer do, since its table was made; milliseconds stay what they are."""
    OtherDevice(1.5).install(monkeypatch)
    manifest = compress(recipe(budgets={"latency": "60%"}, pruning=FINE), out=tmp_path / "run").manifest
    (budget,) = manifest["budgets"]
    assert manifest["exit_code"] == 0
    assert budget["dense"] == manifest["latency"]["dense_ms"] == pytest.approx(1.5 * by_table, rel=0.01)
    assert budget["target"] == pytest.approx(0.6 * budget["dense"])
    assert 0.9 * budget["target"] < budget["measured"] <= budget["target"]
    assert budget["measured"] == manifest["latency"]["measured_ms"]
    assert budget["predicted"] == pytest.approx(budget["measured"], rel=0.1)
    assert manifest["latency"]["predicted_ms"] == pytest.approx(budget["predicted"])
    assert all(
        row["kept"] and row["target_ms"] == pytest.approx(budget["target"]) for row in manifest["rounds"]
    )


def test_a_correction_survives_a_stop_once(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.5).install(monkeypatch)
    wanted = recipe(budgets={"latency": f"{0.8 * by_table}ms"}, pruning=FINE)
    undisturbed = compress(wanted, out=tmp_path / "one").manifest
    said = []

    def stop_after_the_refit(text: str) -> None:
        said.append(text)
        if "refitted" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("compressor.stages.say", stop_after_the_refit)
        with pytest.raises(KeyboardInterrupt):
            compress(wanted, out=tmp_path / "two")
    disturbed = resume(tmp_path / "two").manifest
    assert said
    for name in ("rounds", "corrections", "groups", "accuracy"):
        assert disturbed[name] == undisturbed[name]


def test_a_device_that_cannot_reach_the_target_ends_with_3_and_everything_written(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(50.0).install(monkeypatch)
    result = compress(
        recipe(budgets={"latency": f"{0.8 * by_table}ms"}, agent="uniform", pruning=FINE),
        out=tmp_path / "run",
    )
    assert result.exit_code == 3
    budget = result.manifest["budgets"][0]
    assert budget["kept"] is False
    assert budget["measured"] > budget["target"]
    for name in ("model.onnx", "model.safetensors", "report.html"):
        assert (tmp_path / "run" / name).exists()


def test_a_budget_that_is_met_already_prunes_nothing(tmp_path: Path) -> None:
    result = compress(recipe(budgets={"latency": "10s"}), out=tmp_path / "run")
    assert result.exit_code == 0
    assert all(group["kept"] == group["width"] for group in result.manifest["groups"])
    assert any("nothing was pruned" in note for note in result.manifest["notes"])


def test_latency_that_is_left_unused_sends_the_search_on_twice_at_most(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(0.85).install(monkeypatch)  # faster than its table
    result = compress(recipe(budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE), out=tmp_path / "run")
    first, *after, probed, last = result.manifest["rounds"]
    assert first["kept"]
    assert first["measured_ms"] < 0.92 * first["target_ms"]
    assert len(after) <= 1
    assert all(later["measured_ms"] > 1.05 * first["measured_ms"] for later in (*after, probed))
    assert last["kept"]
    assert result.exit_code == 0
    assert 0.92 * last["target_ms"] < last["measured_ms"] <= last["target_ms"]
    kept = [group["kept"] for group in result.manifest["groups"]]
    closest = max((each for each in (*after, probed) if each["kept"]), key=lambda each: each["measured_ms"])
    assert kept == last["widths"] == list(closest["widths"])


def test_a_plan_that_keeps_the_target_is_not_lost_to_a_later_one_that_misses_it(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = OtherDevice(0.85)
    device.install(monkeypatch)
    first_ms: list[float] = []

    def moody(dense: Path, slim: Path, threads: int, repeats: int) -> tuple[LatencyStats, LatencyStats]:
        """Twice the time for every plan that is larger than the first."""
        whole, small = device.measured(dense, slim, threads, repeats)
        first_ms.append(small.median_ms)
        if small.median_ms > 1.03 * first_ms[0]:
            small = summarise([2 * small.median_ms] * 9, runtime="made up", version="1", threads=threads)
        return whole, small

    monkeypatch.setattr("compressor.timing.measured", moody)
    contract = {"repeats": 1, "max_rounds": 3}
    result = compress(
        recipe(budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE, contract=contract),
        out=tmp_path / "run",
    )
    rounds = result.manifest["rounds"]
    assert rounds[0]["kept"]
    assert not rounds[1]["kept"]
    assert rounds[-1]["kept"]
    assert result.exit_code == 0
    assert [group["kept"] for group in result.manifest["groups"]] == rounds[-1]["widths"]


def measured_plans(folder: Path, shares: list[tuple[int, float]]) -> tuple[RunDir, dict[int, ChannelPlan]]:
    """A run's folder after these measurements: (channels of the plan, share of the target)."""
    run = cast(RunDir, SimpleNamespace(manifest={"rounds": []}, file=folder.joinpath))
    (folder / "search").mkdir()
    plans = {width: ChannelPlan({"conv": tuple(range(width))}) for width, _ in shares}
    for width, share in shares:
        run.manifest["rounds"].append(
            {"widths": [width], "measured_ms": 2 * share, "target_ms": 2.0, "kept": share <= 1}
        )
        if share <= 1:
            remember(run, plans[width])
    return run, plans


@pytest.mark.parametrize(
    ("shares", "taken"),
    [
        ([(8, 0.90)], 8),
        ([(8, 0.90), (12, 0.96), (10, 0.91)], 12),
        ([(8, 0.90), (12, 1.02)], 8),
        ([(8, 0.90), (12, 0.99), (12, 1.01)], 8),  # what it takes once it is trained counts
        ([(8, 0.90), (12, 1.01), (12, 0.99)], 8),
        ([(8, 1.10), (6, 1.01)], 99),
    ],
)
def test_of_the_plans_that_keep_the_target_the_closest_is_taken(
    tmp_path: Path, shares: list[tuple[int, float]], taken: int
) -> None:
    run, plans = measured_plans(tmp_path, shares)
    last = ChannelPlan({"conv": tuple(range(99))})
    assert kept_plan(run, last) == {**plans, 99: last}[taken]


def test_a_trained_plan_that_misses_gives_way_to_one_that_does_not(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [0.70, 0.99, 1.01, 0.72]  # the second plan takes longer once it is trained
    OtherDevice(1.0).install_measuring(monkeypatch, [share * 0.6 * by_table for share in shares])
    monkeypatch.setattr("compressor.contract.BINDING", 0.5)
    wanted = recipe(
        budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE, contract={"repeats": 1, "max_rounds": 3}
    )
    result = compress(wanted, out=tmp_path / "run")
    rounds = result.manifest["rounds"]
    assert [each["kept"] for each in rounds] == [True, True, False, True]
    kept = [group["kept"] for group in result.manifest["groups"]]
    assert kept == rounds[3]["widths"] == rounds[0]["widths"] != rounds[2]["widths"]
    assert result.exit_code == 0
    assert result.manifest["budgets"][0]["measured"] == pytest.approx(0.72 * 0.6 * by_table)
    assert resume(tmp_path / "run").manifest["rounds"] == rounds


def finished_on_its_table(by_table: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on a device that is as its table says."""
    OtherDevice(1.0).install(monkeypatch)
    wanted = recipe(budgets={"latency": f"{0.8 * by_table}ms"}, pruning=FINE)
    return compress(wanted, out=folder / "run").directory


def test_a_finished_run_is_not_searched_again(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished_on_its_table(by_table, tmp_path, monkeypatch)
    manifest = manifest_of(folder)
    last = manifest["rounds"][-1]
    last |= {"kept": True, "measured_ms": 0.9 * last["target_ms"], "predicted_ms": 0.97 * last["target_ms"]}
    manifest |= {"rounds": [last], "corrections": []}  # as if the last measurement had left latency unused
    (folder / "manifest.json").write_text(json.dumps(manifest))
    again = resume(folder).manifest
    assert again["rounds"] == [last]
    assert again["corrections"] == []
    assert again["stages"]["search"] == manifest["stages"]["search"]


def test_a_run_that_ended_with_a_miss_is_not_searched_again(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.0).install_measuring(monkeypatch, [share * 0.6 * by_table for share in (0.98, 1.01)])
    wanted = recipe(
        budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE, contract={"repeats": 1, "max_rounds": 2}
    )
    result = compress(wanted, out=tmp_path / "run")
    assert result.exit_code == 3
    episodes = (tmp_path / "run/search/episodes.jsonl").read_text()
    again = resume(tmp_path / "run")
    assert again.exit_code == 3
    assert again.manifest["rounds"] == result.manifest["rounds"]
    assert (tmp_path / "run/search/episodes.jsonl").read_text() == episodes


def test_a_run_goes_on_only_with_the_runtime_of_its_table(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished_on_its_table(by_table, tmp_path, monkeypatch)
    manifest = manifest_of(folder)
    monkeypatch.setattr("onnxruntime.__version__", "0.0.1")
    assert resume(folder).exit_code == 0  # nothing is left to measure
    manifest["stages"]["measure"]["finished"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CompressorError, match=r"measured elsewhere: onnxruntime-cpu .*this is .* 0\.0\.1"):
        resume(folder)
