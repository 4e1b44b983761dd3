"""How the promise in milliseconds is kept: on slower, faster and noisy devices, and across stops."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from compressor import run_recipe
from compressor.core.conditions import UNLOADED
from compressor.core.errors import CompressorError
from compressor.core.manifest import Epoch, Manifest, Measurement
from compressor.core.metrics import PYTHON
from compressor.latency.local import LocalCpu
from compressor.latency.networks import tag
from compressor.latency.paired import Ratio, Timing
from compressor.latency.table import LatencyTable
from compressor.pruning.plan import ChannelPlan
from compressor.report import plots
from compressor.report.records import sources
from compressor.run.contract import Contract, correction_at
from compressor.run.finish import undecided_note
from compressor.run.pipeline import resume
from tests.other_device import OtherDevice, Proportional, timing
from tests.runs import FAST, manifest_of, recipe

FINE = {"granularity": 4, "min_share": 0.1, "compensate": "off"}  # time does not depend on compensation


@pytest.fixture(scope="module")
def by_table(finished: Path) -> float:
    """What the made-up device's table says that the dense network takes, in milliseconds."""
    return Proportional().measure(tag(finished / "checkpoints/dense.onnx"), 1.0).median_ms


@dataclass
class Restless(Proportional):
    """Takes a third longer with each network that it is given."""

    def whole(self, total: np.ndarray) -> np.ndarray:
        return np.asarray(super().whole(total) * 1.3**self.measured)


def test_a_device_that_is_too_noisy_for_a_table_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(LocalCpu, "table", partialmethod(LocalCpu.measured, device=Restless()))
    monkeypatch.setattr(LocalCpu, "time_limit_s", 0.0)  # the fewest networks show it
    with pytest.raises(CompressorError, match=r"too noisy to measure a latency table: .* at most 50% is accepted"):
        run_recipe(recipe(budgets={"latency": "80%"}, pruning=FINE), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("factor", "offset", "noise"), [(1.5, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.0, 0.02)])
def test_a_device_that_differs_or_is_noisy_tightens_the_search_until_it_measures_the_target(
    by_table: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    offset: float,
    noise: float,
) -> None:
    OtherDevice(factor, noise, offset * by_table).install(monkeypatch)
    asked = "80%" if offset else f"{0.8 * by_table}ms"
    wanted = recipe(budgets={"latency": asked}, pruning=FINE)
    result = run_recipe(wanted, out=tmp_path / "run")
    rounds = result.manifest["rounds"]
    assert rounds[-1]["kept"]
    assert result.exit_code == 0
    budget = result.manifest["budgets"][0]
    assert budget["measured"] <= budget["target"]
    if not noise:
        scored = result.manifest["search"]["evaluations"]
        assert scored > result.manifest["evaluations_before"] > 0  # those of all searches
        assert not rounds[0]["kept"]
        assert offset == 0 or rounds[0]["ratio"] > 1.02 * rounds[0]["predicted_ratio"]
        assert rounds[-1]["ratio"] == pytest.approx(rounds[-1]["predicted_ratio"], rel=0.1)
        assert rounds[-1]["ratio"] < rounds[0]["ratio"]


def test_a_share_is_of_the_dense_network_at_the_same_time(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that others slow down, or no longer do, since its table was made; milliseconds stay what they are."""
    OtherDevice(1.5).install(monkeypatch)
    manifest = run_recipe(recipe(budgets={"latency": "60%"}, pruning=FINE), out=tmp_path / "run").manifest
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

    # The page compares predictions with the target of the same machine: the table's dense network is faster here.
    recorded = Manifest.model_validate(manifest_of(tmp_path / "run"))
    assert recorded.search is not None
    pick = plots.chosen(recorded)
    assert pick is not None
    assert plots.within_budgets(recorded, pick)
    assert recorded.search.targets["latency"] == pytest.approx(0.6 * by_table, rel=0.01)
    assert plots.price(recorded, pick, "latency") == pytest.approx(1.5 * pick.costs["latency"], rel=0.01)
    assert not any(", over a budget" in row["cost"] for row in sources(recorded)["sources"])


def test_milliseconds_are_those_of_the_quiet_machine(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours that slow both networks down by half in the last measurement break no promise."""
    quiet, busy = OtherDevice(1.0), OtherDevice(1.5)
    quiet.install(monkeypatch)
    turns: list[int] = []

    def measured(dense: Path, slim: Path, *_: object) -> Timing:
        turns.append(len(turns))
        return (busy if len(turns) > 1 else quiet).measured(dense, slim)

    monkeypatch.setattr("compressor.latency.local.measured", measured)
    wanted = recipe(budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE)
    manifest = run_recipe(wanted, out=tmp_path / "run").manifest
    (budget,), latency = manifest["budgets"], manifest["latency"]
    assert (manifest["exit_code"], budget["verdict"]) == (0, "kept")
    assert turns == [0, 1]
    assert budget["dense"] == latency["dense_ms"] == pytest.approx(by_table, rel=1e-3)
    assert budget["measured"] == latency["measured_ms"] == pytest.approx(latency["ratio"] * budget["dense"])
    assert latency["dense_median_ms"] == pytest.approx(1.5 * by_table, rel=1e-3)  # what was met meanwhile
    assert "corrections" not in manifest


def test_what_cannot_be_told_is_not_searched_again_and_ends_with_4(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = OtherDevice(1.0)
    device.install(monkeypatch)

    def wide(dense: Path, slim: Path, *_: object) -> Timing:
        found = device.measured(dense, slim)
        ratio = replace(found.ratio, value=0.61, low=0.58, high=0.64)
        return replace(found, ratio=ratio)

    monkeypatch.setattr("compressor.latency.local.measured", wide)
    result = run_recipe(recipe(budgets={"latency": "60%"}, pruning=FINE), out=tmp_path / "run")
    (budget,) = result.manifest["budgets"]
    assert (result.exit_code, budget["verdict"], budget["kept"]) == (4, "undecided", None)
    assert len(result.manifest["rounds"]) == 2  # before the fine-tuning, and after it
    assert "corrections" not in result.manifest
    (note,) = [each for each in result.manifest["notes"] if "cannot decide whether the latency" in each]
    low, high = result.manifest["latency"]["interval"]
    assert f"takes {low:.3f}-{high:.3f} of the dense one's time (95 % interval)" in note
    assert f"compress --recipe {tmp_path / 'run' / 'recipe.yaml'} --set contract.seconds=" in note


@pytest.mark.parametrize(
    ("data", "interval", "seconds", "words"),
    [
        ("digits", [0.48, 0.53], 90, "takes 0.480-0.530 of the dense one's time (95 % interval)"),
        ("digits", [0.002, 366.721], 90, "there were too few runs to know how far its result is off. A new run"),
        ("digits", [0.0, None], 90, "there were too few runs to know how far its result is off. A new run"),
        ("digits", None, 90, "compress --recipe 'my runs/one/recipe.yaml' --set contract.seconds=300. "),
        ("digits", None, 400, "--set contract.seconds=800. "),
        (PYTHON, None, 90, 'the same call with contract={"seconds": 300} and another out. '),
    ],
)
def test_an_undecided_run_is_told_what_may_decide(
    data: str, interval: list[float | None] | None, seconds: float, words: str
) -> None:
    manifest = Manifest.tolerant({"data": data, "latency": {"interval": interval}})
    note = undecided_note(manifest, Path("my runs/one"), seconds)
    assert words in note
    assert note.endswith("compress measure 'my runs/one' measures again without judging anew.")
    assert ("compress --recipe" in note) == (data != PYTHON)


def test_a_delivered_network_undecided_above_the_aim_is_searched_again(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = OtherDevice(1.0)
    device.install(monkeypatch)
    found = iter([(0.59, 0.582, 0.5995), (0.603, 0.599, 0.607)])  # before fine-tuning: kept; after it: undecided

    def measured(dense: Path, slim: Path, *_: object) -> Timing:
        timing = device.measured(dense, slim)
        value, low, high = next(found, (0.58, 0.575, 0.585))
        return replace(timing, ratio=replace(timing.ratio, value=value, low=low, high=high))

    monkeypatch.setattr("compressor.latency.local.measured", measured)
    result = run_recipe(recipe(budgets={"latency": "60%"}, pruning=FINE), out=tmp_path / "run")
    (budget,), rounds = result.manifest["budgets"], result.manifest["rounds"]
    assert [each["verdict"] for each in rounds] == ["kept", "undecided", "kept", "kept"]
    assert (result.exit_code, budget["verdict"]) == (0, "kept")
    assert len(result.manifest["corrections"]) == 1
    assert rounds[1]["widths"] == rounds[0]["widths"] != rounds[2]["widths"] == rounds[3]["widths"]


def test_a_correction_survives_a_stop_once(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.0, offset_ms=0.5 * by_table).install(monkeypatch)
    wanted = recipe(budgets={"latency": "80%"}, pruning=FINE)
    undisturbed = run_recipe(wanted, out=tmp_path / "one").manifest
    said = []

    def stop_after_the_refit(text: str) -> None:
        said.append(text)
        if "refitted" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("compressor.run.contract.say", stop_after_the_refit)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(wanted, out=tmp_path / "two")
    disturbed = resume(tmp_path / "two").manifest
    assert said
    for name in ("rounds", "corrections", "groups", "accuracy"):
        assert disturbed[name] == undisturbed[name]


def test_a_device_that_cannot_reach_the_target_ends_with_3_and_everything_written(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.0, offset_ms=50 * by_table).install(monkeypatch)
    result = run_recipe(
        recipe(budgets={"latency": "80%"}, agent="uniform", pruning=FINE),
        out=tmp_path / "run",
    )
    assert result.exit_code == 3
    budget = result.manifest["budgets"][0]
    assert budget["kept"] is False
    assert budget["measured"] > budget["target"]
    for name in ("model.onnx", "model.safetensors", "report.html"):
        assert (tmp_path / "run" / name).exists()


@pytest.mark.usefixtures("busy_machine")
def test_a_budget_that_is_met_already_prunes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine itself, whose table is made of the fewest networks, each measured for a moment."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(LocalCpu, "time_limit_s", 0.0)
    monkeypatch.setattr("compressor.latency.assemble.SECONDS_A_NETWORK", 0.04)
    result = run_recipe(recipe(budgets={"latency": "10s"}), out=tmp_path / "run")
    assert result.exit_code == 0
    assert all(group["kept"] == group["width"] for group in result.manifest["groups"])
    assert any("nothing was pruned" in note for note in result.manifest["notes"])


def test_latency_that_is_left_unused_sends_the_search_on(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherDevice(1.0, offset_ms=-0.15 * by_table).install(
        monkeypatch
    )  # slim networks are faster than its table
    wanted = recipe(budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE, training={})
    result = run_recipe(wanted, out=tmp_path / "run")
    first, *after, probed, last = result.manifest["rounds"]
    assert first["kept"]
    assert first["measured_ms"] < 0.92 * first["target_ms"]
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
    device = OtherDevice(1.0, offset_ms=-0.15 * by_table)
    device.install(monkeypatch)
    first_ms: list[float] = []

    def moody(dense: Path, slim: Path, *_: object) -> Timing:
        """Twice the time for every plan that is larger than the first."""
        found = device.measured(dense, slim)
        first_ms.append(found.slim.median_ms)
        if found.slim.median_ms > 1.03 * first_ms[0]:
            return timing([found.dense.median_ms] * 9, [2 * found.slim.median_ms] * 9)
        return found

    monkeypatch.setattr("compressor.latency.local.measured", moody)
    contract = {"repeats": 1, "max_rounds": 3}
    result = run_recipe(
        recipe(budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE, contract=contract),
        out=tmp_path / "run",
    )
    rounds = result.manifest["rounds"]
    assert rounds[0]["kept"]
    assert not rounds[1]["kept"]
    assert rounds[-1]["kept"]
    assert result.exit_code == 0
    assert [group["kept"] for group in result.manifest["groups"]] == rounds[-1]["widths"]


@pytest.mark.parametrize(
    ("epochs", "trained_s", "fields", "probe_s"),
    [
        (10, [7.0, 8.0, 9.0], {}, 32.0),  # 4 epochs of 8 s follow the search's 6
        (10, [100.0], {}, 90.0),  # and no longer than any measurement
        (10, [0.1], {}, 20.0),  # but long enough to find a plan that misses
        (0, [], {}, 20.0),
        (10, [], {}, 90.0),  # how long the training takes is not known
        (10, [8.0], {"percentile": 99}, 90.0),  # a percentile's interval is read as it is
    ],
)
def test_a_probe_takes_no_longer_than_the_training_that_it_may_save(
    epochs: int, trained_s: list[float], fields: dict[str, Any], probe_s: float
) -> None:
    search = {**FAST, "epochs_share": 0.6}
    wanted = recipe(epochs=epochs, search=search, budgets={"latency": "50%"}, contract={}, **fields).resolved()
    space = SimpleNamespace(row=lambda _: np.array([2]), dense_row=np.array([4]))
    job: Any = SimpleNamespace(recipe=wanted, table=None, latency_budget=None, space=space)
    run: Any = SimpleNamespace(manifest=Manifest(training=[Epoch(seconds=each) for each in trained_s]))
    contract, plan = Contract(run, job), cast(ChannelPlan, None)
    assert contract.turns(plan).seconds == 90.0
    assert contract.probe_turns(plan) == replace(contract.turns(plan), seconds=probe_s)


@pytest.mark.parametrize(
    ("precision", "probed", "delivered", "ratio", "verdict"),
    [
        ("fp32", "", "", 0.3343, "kept"),  # the widths alone determine the time
        ("int8", "", "", 0.3343, "kept"),
        ("int8", "", "b", 0.354, "undecided"),  # layers in floats
        ("mixed", "a", "b", 0.354, "undecided"),
        ("mixed", "b", "b", 0.3343, "kept"),
    ],
)
def test_only_measurements_of_the_same_file_are_combined(
    precision: str, probed: str, delivered: str, ratio: float, verdict: str
) -> None:
    before = Measurement(
        predicted_ms=0.33, measured_ms=0.33, target_ms=0.35, dense_ms=1.0, predicted_ratio=0.33, ratio=0.33,
        interval=[0.328, 0.332], target_ratio=0.35, verdict="kept", kept=True, widths=[8, 8], file=probed,
    )  # fmt: skip
    wanted = SimpleNamespace(precision=precision, conditions=UNLOADED)
    job: Any = SimpleNamespace(
        latency_budget=SimpleNamespace(share=lambda dense_ms: 0.35, relative=True),
        space=SimpleNamespace(row=lambda plan: [8, 8], dense_row=[16, 16]),
        recipe=wanted,
    )
    run: Any = SimpleNamespace(manifest=Manifest(rounds=[before]))
    own = Ratio(value=0.354, low=0.3495, high=0.3585, dense_ms=1.0)
    found = Contract(run, job).combined(cast(Any, None), own, delivered)
    assert (found.value, found.verdict(0.35)) == (pytest.approx(ratio, abs=1e-4), verdict)


def measured_plans(folder: Path, shares: list[tuple[int, float]]) -> tuple[Contract, dict[int, ChannelPlan]]:
    """A run's contract after these measurements: (channels of the plan, share of the target)."""
    run: Any = SimpleNamespace(manifest=Manifest(), file=folder.joinpath)
    contract = Contract(run, cast(Any, None))
    (folder / "search").mkdir()
    plans = {width: ChannelPlan({"conv": tuple(range(width))}) for width, _ in shares}
    for width, share in shares:
        run.manifest.rounds = [
            *run.manifest.rounds,
            Measurement(
                predicted_ms=0.5,
                measured_ms=0.5 * share,
                target_ms=0.5,
                dense_ms=1.0,
                predicted_ratio=0.5,
                ratio=0.5 * share,
                interval=[0.5 * share, 0.5 * share],
                target_ratio=0.5,
                verdict="kept" if share <= 1 else "missed",
                kept=share <= 1,
                widths=[width],
            ),
        ]
        contract.remember(plans[width])
    return contract, plans


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
    contract, plans = measured_plans(tmp_path, shares)
    last = ChannelPlan({"conv": tuple(range(99))})
    assert contract.best_plan(last) == {**plans, 99: last}[taken]


def test_a_dense_network_that_met_a_busy_machine_does_not_shift_the_shares(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own time in the table is 30 % too high. Shares of it would let a plan of 78 % pass for one of 60 %."""
    OtherDevice(1.0).install(monkeypatch)
    install = LatencyTable.dense_ms
    monkeypatch.setattr(LatencyTable, "dense_ms", lambda table, space: 1.3 * install(table, space))
    manifest = run_recipe(recipe(budgets={"latency": "60%"}, pruning=FINE), out=tmp_path / "run").manifest
    first = manifest["rounds"][0]
    assert first["predicted_ratio"] == pytest.approx(first["ratio"], rel=0.02)
    assert len(manifest["rounds"]) == 2
    assert manifest["exit_code"] == 0


def test_plans_on_both_sides_of_the_aim_are_interpolated() -> None:
    """ResNet-18 as measured: one factor took it from 0.71 to 0.37, and back to 0.48, for an aim of 0.455."""
    first, second = (0.453, 0.714), (0.286, 0.368)
    assert correction_at(0.455, [first]) == first
    predicted, measured = correction_at(0.455, [first, second])
    assert measured == 0.455
    assert predicted == pytest.approx(0.286 + (0.455 - 0.368) / (0.714 - 0.368) * (0.453 - 0.286))
    third = (0.351, 0.482)  # the closest on either side count
    assert correction_at(0.455, [first, second, third])[0] == pytest.approx(0.286 + 0.065 * 0.087 / 0.114)


def test_contradicting_plans_are_not_interpolated() -> None:
    """The slower one was predicted to be the faster one."""
    assert correction_at(0.5, [(0.4, 0.6), (0.45, 0.45)]) == (0.45, 0.45)


def test_a_trained_plan_that_misses_gives_way_to_one_that_does_not(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [0.70, 0.99, 1.01, 0.72]  # the second plan takes longer once it is trained
    OtherDevice(1.0).install_measuring(monkeypatch, [share * 0.6 * by_table for share in shares])
    monkeypatch.setattr("compressor.run.contract.BINDING", 0.5)
    wanted = recipe(
        budgets={"latency": f"{0.6 * by_table}ms"}, pruning=FINE, contract={"repeats": 1, "max_rounds": 3}
    )
    result = run_recipe(wanted, out=tmp_path / "run")
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
    return run_recipe(wanted, out=folder / "run").directory


def test_a_finished_run_is_not_searched_again(
    by_table: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished_on_its_table(by_table, tmp_path, monkeypatch)
    manifest = manifest_of(folder)
    last = manifest["rounds"][-1]
    share = last["target_ratio"]
    last |= {
        "verdict": "kept",
        "kept": True,
        "interval": [0.89 * share, 0.91 * share],
        "predicted_ratio": 0.97 * share,
    }
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
    result = run_recipe(wanted, out=tmp_path / "run")
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
