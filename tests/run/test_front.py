"""Several targets of one search: a run each, what they share, and what a stop leaves."""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import compressor
from compressor import CompressorError, RunResult, run_recipe
from compressor.cli.app import app
from compressor.core.files import sha256_file
from compressor.core.front import DropLimit, Front, Lost, Point, TargetRun
from compressor.recipe import Budgets
from compressor.report import closing_front, judge_front
from compressor.report.page import EPISODES
from compressor.run.exports import Request, export_format
from compressor.run.finish import report_again
from compressor.run.front import worst
from compressor.run.max_drop import STEPS, Narrowing, judged
from compressor.run.measure import measure_again
from compressor.run.pipeline import resume
from compressor.run.predict import predict
from compressor.run.runs import clean, find_runs
from compressor.run.share import card_of
from compressor.run.stages import _worse_than
from compressor.search.environment import Score
from tests.other_device import OtherDevice
from tests.run.test_own import FAST as OWN
from tests.run.test_own import Own, batches, loss, pictures, share
from tests.runs import manifest_of, recipe

TARGETS = "75%,50%"
LIST: dict[str, Any] = {
    "budgets": {"latency": TARGETS, "params": "90%"}, "agent": "knapsack", "epochs": 2,
    "pruning": {"granularity": 4, "compensate": "off"}, "search": {"max_evaluations": 10, "batch_norm_batches": 1},
}  # fmt: skip
OFFSET_MS = 0.02
"""How much longer the device takes for slim networks than its table says."""


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Two targets on a device that takes a third longer than its table says for slim networks."""
    with pytest.MonkeyPatch.context() as patch:
        OtherDevice(1.0, offset_ms=OFFSET_MS).install(patch)
        return run_recipe(recipe(**LIST), out=tmp_path_factory.mktemp("front") / "whole")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    OtherDevice(1.0, offset_ms=OFFSET_MS).install(monkeypatch)


def test_each_target_is_a_run_of_its_own_below_the_first(front: RunResult) -> None:
    assert [each.directory.name for each in front.runs] == ["latency-75", "latency-50"]
    assert front.exit_code == 0
    for each, limit in zip(front.runs, (0.75, 0.5), strict=True):
        found = {budget["name"]: budget for budget in each.manifest["budgets"]}
        assert found["latency"]["target"] == pytest.approx(limit * found["latency"]["dense"])
        assert found["latency"]["kept"]
        assert found["params"]["measured"] <= 0.9 * found["params"]["dense"]
        for name, checksum in each.manifest["files"].items():
            assert sha256_file(each.directory / name) == checksum
        assert sum(parameter.numel() for parameter in each.model.parameters()) == found["params"]["measured"]
        assert (each.directory / "report.html").exists()
    with pytest.raises(CompressorError, match="has 2 networks"):
        _ = front.model


def test_the_table_the_dense_network_and_the_scored_plans_serve_all(front: RunResult) -> None:
    manifests = [each.manifest for each in front.runs]
    accuracies = {manifest["accuracy"]["dense"] for manifest in manifests}
    assert len(accuracies) == 1
    logs = [[json.loads(line) for line in (each.directory / EPISODES).read_text().splitlines()] for each in front.runs]
    plans = [{tuple(line["widths"]) for line in log if line["round"] == log[0]["round"]} for log in logs]
    assert len(plans[1]) <= 0.8 * len(plans[0])  # those of the searches without corrections
    trainings = [[epoch for epoch in m["training"] if epoch["phase"] != "finetune"] for m in manifests]
    assert trainings[0] == trainings[1]
    assert len(trainings[0]) == 1
    weights = [sorted((each.directory / "checkpoints").glob("search-weights-*")) for each in front.runs]
    assert len({sha256_file(path) for (path,) in weights}) == 1
    tables = [json.loads((each.directory / "latency_table.json").read_text()) for each in front.runs]
    assert tables[0]["entries"] == tables[1]["entries"]
    assert tables[0]["raised"] == 1 < tables[1]["raised"]  # it begins with what the first target has measured
    first = manifests[1]["rounds"][0]
    assert abs(first["measured_ms"] - first["predicted_ms"]) < OFFSET_MS  # what an uncorrected table is wrong by
    assert any("continues that of latency-75" in note for note in manifests[1]["notes"])


def test_front_json_has_the_networks_as_measured(front: RunResult) -> None:
    content = json.loads((front.directory / "front.json").read_text())
    assert content == front.manifest
    recorded = Front.read(front.directory / "front.json")
    assert (recorded.status, recorded.exit_code, recorded.agent) == ("finished", 0, "knapsack")
    assert [target.continues for target in recorded.targets] == ["", "latency-75"]
    assert all((target.known or 0) > 10 for target in recorded.targets[1:])
    dense = recorded.dense()
    assert dense is not None
    assert (dense.ratio, dense.tested) == (1.0, front.runs[0].manifest["accuracy"]["dense"])
    assert dense.latency_ms == recorded.dense_ms
    for run, point in zip(front.runs[::-1], recorded.of("ours"), strict=True):
        assert point.target == run.directory.name
        assert (front.directory / str(point.onnx)).samefile(run.onnx)
        assert point.ratio == run.manifest["latency"]["ratio"]
        assert point.tested == run.manifest["accuracy"]["finetuned"]
        assert point.widths == [group["kept"] for group in run.manifest["groups"]]
        assert point.searched is not None
    for kind in ("uniform", "knapsack"):
        points = recorded.of(kind)  # type: ignore[arg-type]
        assert len(points) == 2
        for point, ours in zip(points, recorded.of("ours"), strict=True):
            assert point.target == ours.target
            assert point.ratio is not None
            assert point.ratio <= 1.02 * float(ours.target.removeprefix("latency-")) / 100
            assert point.tested is None
            assert point.searched is not None
            assert point.searched <= float(ours.searched or 0) + 1e-9  # all are candidates of the search


def test_the_closing_table_has_a_row_for_each_delivered_network(front: RunResult) -> None:
    """The agent is the knapsack, as is one of the networks that need no search."""
    assert [row[""] for row in closing_front(front.manifest).records()] == ["dense", "latency-75", "latency-50"]
    page = (front.directory / "report.html").read_text()
    assert page.count(">delivered (knapsack)</th>") == 2


def test_the_page_shows_the_front(front: RunResult) -> None:
    page = (front.directory / "report.html").read_text()
    assert "2 networks: every budget is kept." in page
    assert page.count("<svg") == 2
    assert 'href="latency-50/report.html"' in page
    assert 'href="latency-50/model.onnx"' in page
    assert CliRunner().invoke(app, ["report", str(front.directory)]).exit_code == 0
    assert (front.directory / "report.html").read_text() == page


def test_commands_on_one_run_work_and_the_whole_is_refused_with_a_hint(front: RunResult) -> None:
    one = front.runs[1].directory
    assert any("model.fp16.onnx" in line for line in export_format(one, Request(precision="fp16")))
    commands = (
        lambda: export_format(front.directory, Request()), lambda: measure_again(front.directory),
        lambda: predict(front.directory, [front.directory / "report.html"]), lambda: card_of(front.directory),
    )  # fmt: skip
    for command in commands:
        with pytest.raises(CompressorError, match="holds the runs of several targets") as caught:
            list(command())
        assert "latency-75" in caught.value.hint


def stopped_after(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """The user stops what comes after so many calls of a function."""
    module, _, function = name.rpartition(".")
    plain, counted = getattr(import_module(module), function), count(1)

    def fragile(*given: Any, **more: Any) -> Any:
        if next(counted) > calls:
            raise KeyboardInterrupt
        return plain(*given, **more)

    monkeypatch.setattr(name, fragile)


def test_a_stopped_front_ends_as_one_that_was_not(
    device: None, front: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the export of the second run, and once more after that run."""
    folder = tmp_path / "whole"
    with monkeypatch.context() as patch:
        stopped_after(patch, "compressor.run.pipeline.export", 1)
        with pytest.raises(KeyboardInterrupt, match=re.escape(f"--resume {folder}")):
            run_recipe(recipe(**LIST), out=folder)
    assert manifest_of(folder / "latency-75")["status"] == "finished"
    assert manifest_of(folder / "latency-50")["status"] != "finished"
    latest = max(folder.glob("latency-*"), key=lambda path: path.stat().st_mtime)
    with monkeypatch.context() as patch:
        stopped_after(patch, "compressor.run.front.points", 0)
        with pytest.raises(KeyboardInterrupt, match=re.escape(f"--resume {folder}")):
            resume(latest)  # of one of the runs: the whole continues
    assert manifest_of(folder / "latency-50")["status"] == "finished"
    again = resume(folder)
    assert again.directory.samefile(folder)
    assert again.exit_code == front.exit_code
    for run, undisturbed in zip(again.runs, front.runs, strict=True):
        for key in ("groups", "accuracy"):
            assert run.manifest[key] == undisturbed.manifest[key]
        rounds = [[each["widths"] for each in one.manifest["rounds"]] for one in (run, undisturbed)]
        assert rounds[0] == rounds[1]
        for file in ("model.safetensors", "channels.json"):
            assert sha256_file(run.directory / file) == sha256_file(undisturbed.directory / file)
    assert again.manifest["points"] == front.manifest["points"]


def test_a_finished_front_resumes_to_itself(device: None, front: RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(front.directory, folder)
    again = resume(folder)
    assert again.manifest["points"] == front.manifest["points"]
    assert again.exit_code == 0
    with pytest.raises(CompressorError, match=r"budgets.latency is 75%,50%, not 50%"):
        resume(folder, {"budgets": {"latency": "50%"}})


def test_runs_of_a_front_are_listed_and_cleaned_only_once_no_other_needs_them(front: RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(front.directory, folder)
    runs = find_runs([tmp_path])
    assert [run.name for run in runs] == ["latency-75", "latency-50"]
    Front.read(folder / "front.json").model_copy(update={"status": "running"}).write(folder / "front.json")
    assert all("others continue its search" in each.reason for each in clean(runs))
    shutil.copy(front.directory / "front.json", folder)
    assert all("checkpoints/search.pt" in each.files for each in clean(runs))
    assert report_again(folder)[1] == "2 networks: every budget is kept."


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ({"flops": "60%,0.1%"}, "cannot be reached"),
        ({"flops": "60%,0.6x"}, "flops-60 and flops-0.6x are the same limit"),
        ({"flops": "60%,nonsense"}, "not understood"),
        ({"max_drop": 1, "latency": "50%"}, "--latency gives it"),
        ({"max_drop": 1, "flops": "60%,50%"}, "looks for one network"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_written(
    device: None, tmp_path: Path, budgets: dict[str, Any], said: str
) -> None:
    with pytest.raises(CompressorError, match=said):
        run_recipe(recipe(budgets=budgets), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_worst_target_decides_the_exit_code() -> None:
    assert [worst(codes) for codes in ([0, 0], [0, 4], [4, 3], [])] == [0, 4, 3, 0]


def test_the_command_takes_lists(device: None, front: RunResult, tmp_path: Path) -> None:
    words = ["--model", "tests.nets:tiny", "--flops", "60%,40%", "--epochs", "2", "--dry-run"]
    dry = CliRunner().invoke(app, words)
    assert dry.exit_code == 0, dry.output
    assert "flops-60: Budget macs" in dry.output
    assert "flops-40: Budget macs" in dry.output
    shutil.copytree(front.directory, tmp_path / "whole")
    done = CliRunner().invoke(app, ["--resume", str(tmp_path / "whole")])
    assert done.exit_code == 0, done.output
    assert "2 networks: every budget is kept." in done.output
    assert done.output.count("latency-50") >= 1


# ---------------------------------------------------------------- the other way round
def entry(share: float, drop: float, **more: Any) -> TargetRun:
    name = f"{100 * share:g}"
    return TargetRun(folder=f"latency-{name}", budgets={"latency": f"{name}%"}, lost=Lost(search_drop=drop, **more))


def test_the_range_of_latencies_is_halved() -> None:
    """The accuracy falls by 2 points for each tenth of the time that is saved: a loss of 5 is at 0.75."""
    order, done = Narrowing(Budgets(max_drop=5, params="50%"), least=0.2), list[TargetRun]()
    while (target := order.next(done)) is not None:
        assert (target.budgets.max_drop, target.budgets.params) == (None, "50%")
        share = float(str(target.budgets.latency).rstrip("%")) / 100
        done.append(entry(share, 20 * (1 - share)))
    assert [each.budgets["latency"] for each in done] == ["60%", "80%", "70%", "75%", "72.5%"]
    assert len(done) == STEPS
    points = [Point(kind="ours", target=each.folder, ratio=float(each.folder[8:]) / 100) for each in done]
    found = judged(Front(targets=done, points=points), 5.0)
    assert (found.chosen, found.kept, found.steps) == ("latency-75", True, STEPS)
    none = judged(Front(targets=done, points=points), 1.0)
    assert (none.chosen, none.kept) == ("latency-80", False)


def test_a_network_that_hardly_gets_faster_is_refused() -> None:
    """0.965 of the time by the table, a margin of 2 %: 0.985, and 2 % above that is more than 0.99."""
    table = SimpleNamespace(curve=lambda _: lambda _: [0.965], fitted_dense_ms=lambda _: 1.0)
    space = SimpleNamespace(smallest_row=np.zeros(2))
    job: Any = SimpleNamespace(table=table, space=space, recipe=SimpleNamespace(contract=SimpleNamespace(margin=0.02)))
    with pytest.raises(CompressorError, match="the smallest one takes 98% of the dense network's time"):
        Narrowing.of(job, Budgets(max_drop=1))
    table.curve = lambda _: lambda _: [0.9]
    assert Narrowing.of(job, Budgets(max_drop=1)).least == pytest.approx(1.02 * 0.9 / 0.98)


def test_an_unknown_loss_is_not_the_smallest() -> None:
    done = [entry(0.5, 3.0), TargetRun(folder="latency-60", budgets={"latency": "60%"}, lost=Lost())]
    assert judged(Front(targets=done), 1.0).chosen == "latency-50"


def test_a_failed_training_is_named_beside_a_missed_target() -> None:
    done = [
        TargetRun(folder="latency-50", status="finished", exit_code=3, verdict="Budget missed."),
        TargetRun(folder="latency-60", status="finished", exit_code=0, state="doubtful"),
    ]
    assert judge_front(Front(status="finished", exit_code=3, targets=done)).remarks == (
        "latency-50: Budget missed.", "latency-60: a training has failed, as its own page says."
    )  # fmt: skip


def test_a_network_without_a_search_that_scores_higher_is_named() -> None:
    scores = {
        name: Score((), accuracy, accuracy, {}, 0.0)
        for name, accuracy in (("dense", 0.96), ("uniform", 0.63), ("knapsack", 0.805))
    }
    note = _worse_than(scores, Score((), 0.705, 0.705, {}, 0.0))
    assert note is not None
    assert note.startswith("The knapsack network within the same limits scores 80.5% on the search split")
    assert _worse_than(scores, scores["knapsack"]) is None


def test_of_the_networks_that_keep_it_the_fastest_as_measured_is_chosen() -> None:
    done = [entry(0.5, 0.9, test_drop=1.0, error=0.2), entry(0.6, 0.5)]
    points = [Point(kind="ours", target="latency-50", ratio=0.49), Point(kind="ours", target="latency-60", ratio=0.47)]
    assert judged(Front(targets=done, points=points), 1.0).chosen == "latency-60"
    assert judged(Front(targets=done, points=points[:1]), 1.0) == DropLimit(
        points=1.0, steps=2, most_steps=STEPS, chosen="latency-50", kept=True, confirmed="undecided"
    )


@pytest.mark.parametrize(
    ("search", "test", "said"),
    [
        (0.5, 1.114, ("on the search split: it loses 0.50 and takes", "On the test split it loses 1.11 (")),
        (-2.1, -0.3, ("on the search split: it gains 2.10 and takes", "On the test split it gains 0.30 (")),
        (0.0, -0.004, ("on the search split: it loses 0.00 and takes", "On the test split it loses 0.00 (")),
    ],
)
def test_what_is_lost_and_gained_in_words(search: float, test: float, said: tuple[str, str]) -> None:
    found = TargetRun(folder="latency-50", status="finished", lost=Lost(search_drop=search, test_drop=test, error=0.79))
    limit = DropLimit(points=1.0, steps=5, most_steps=5, chosen="latency-50", kept=True, confirmed="undecided")
    judged_front = judge_front(Front(status="finished", targets=[found], max_drop=limit))
    assert said[0] in judged_front.sentence
    assert judged_front.remarks[0].startswith(said[1])


@pytest.mark.parametrize(
    ("interval", "close"),
    [
        ([0.80, 0.83], ""),
        ([0.80, 0.85], "latency-85"),  # its own begins at 0.84
        ([0.80, 0.91], "latency-85, latency-90"),
        ([0.02, 12.0], "latency-85, latency-90"),
        (None, "latency-85, latency-90"),
    ],
)
def test_networks_whose_times_cannot_be_told_apart_are_named(interval: list[float | None] | None, close: str) -> None:
    done = [entry(0.9, 0.1), entry(0.7, 2.0), entry(0.85, 0.4), entry(0.8, 0.9)]
    intervals = {"90": [0.9, 0.92], "70": [0.6, 0.9], "85": [0.84, 0.86], "80": interval}
    points = [
        Point(kind="ours", target=f"latency-{name}", ratio=float(name) / 100, interval=ends)
        for name, ends in intervals.items()
    ]
    front = Front(status="finished", targets=done, points=points)
    front.max_drop = judged(front, 1.0)
    said = judge_front(front)
    assert "latency-80 is the fastest of the 4 networks" in said.sentence
    assert ("(interval not known)" in said.sentence) == (interval == [0.02, 12.0])
    assert said.remarks == ((f"Its time cannot be told apart from that of {close}.",) if close else ())


def test_the_fastest_network_within_a_loss_is_found_and_confirmed(
    device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.run.max_drop.STEPS", 3)
    fields = {**LIST, "search": {"max_evaluations": 6, "batch_norm_batches": 1}}
    del fields["budgets"]
    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.pipeline.export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(**fields, budgets={"max_drop": 8}), out=tmp_path / "run")
    result = resume(tmp_path / "run")
    recorded = Front.read(tmp_path / "run/front.json")
    assert len({target.lost.search_dense for target in recorded.targets if target.lost}) == 1  # one dense network
    limit = recorded.max_drop
    assert limit is not None
    assert result.chosen is not None
    assert result.chosen.directory.name == limit.chosen
    assert 2 <= len(result.runs) == limit.steps <= 3
    chosen = next(target for target in recorded.targets if target.folder == limit.chosen)
    assert chosen.lost is not None
    assert limit.kept == (float(chosen.lost.search_drop or 0) <= 8)
    accuracy = result.chosen.manifest["accuracy"]
    assert chosen.lost.test_drop == pytest.approx(100 * (accuracy["dense"] - accuracy["finetuned"]))
    assert 0 < float(chosen.lost.error or 0) < 5
    faster = [
        target for target in recorded.targets
        if float(target.folder[8:]) < float(limit.chosen[8:]) and limit.kept
    ]  # fmt: skip
    assert all(float(target.lost.search_drop or 0) > 8 for target in faster if target.lost)
    assert result.exit_code == {"kept": 0, "undecided": 4, "missed": 3}[str(limit.confirmed)] or not limit.kept
    assert result.onnx == result.chosen.onnx
    page = (tmp_path / "run/report.html").read_text()
    assert re.search(r"On the test split it (loses|gains) \d", page)


def test_own_objects_have_several_targets_and_a_limit_in_their_score(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": batches(), "loss": loss, "evaluate": share(1), "epochs": 0, "agent": "uniform"}
    rest = {name: value for name, value in OWN.items() if name not in ("params", "agent")}
    model, example = Own(), torch.zeros(1, 1, 8, 8)
    result = compressor.compress(model, example, params=["70%", "50%"], out=tmp_path / "run", **options, **rest)
    assert [each.directory.name for each in result.runs] == ["params-70", "params-50"]
    sizes = [sum(each.numel() for each in run.model.parameters()) for run in result.runs]
    assert sizes[1] < sizes[0]
    with pytest.raises(CompressorError, match="objects of the Python program"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"test": share(2)}, "by agreement with the dense network, the test split by score."),
        ({"test": lambda _: 31.4}, "by agreement with the dense network, the test split by a score that is no share."),
        ({"evaluate": share(1), "test": lambda _: 31.4}, "by score, the test split by a score that is no share."),
    ],
)
def test_a_limit_of_lost_accuracy_is_in_one_metric(
    device: None, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"calibration": [pictures(8)], "epochs": 0, "max_drop": 1, **given}
    rest = {name: value for name, value in OWN.items() if name != "params"}
    with pytest.raises(CompressorError, match=re.escape(said)) as refused:
        compressor.compress(Own(), torch.zeros(1, 1, 8, 8), out=tmp_path / "run", **options, **rest)
    assert "Give evaluate=" in refused.value.hint
    assert not (tmp_path / "run").exists()
