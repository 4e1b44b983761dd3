"""Runs that are tracked: what trackers get, also after a kill, and that one that fails ends no run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from compressor import Recipe, run_recipe
from compressor.core.errors import CompressorError
from compressor.core.manifest import Accuracy, Export, Latency, Manifest, Stage
from compressor.run import tracking
from compressor.run.pipeline import resume
from compressor.run.trackers import Point
from compressor.run.tracking import numbers_of
from tests.runs import manifest_of, recipe


class Recorder:
    """A tracker in memory; its runs stay for the next process."""

    runs: ClassVar[dict[str, Recorder]] = {}
    fails: ClassVar[str] = ""

    def __init__(self, recipe: Recipe, run_name: str, known: str | None) -> None:
        if Recorder.fails == "begin":
            raise ConnectionError("no route to the tracker\nwith details")
        self.id, self.where = known or f"run{len(self.runs)}", "memory"
        before = self.runs.get(self.id)
        self.recipe, self.name, self.ended = recipe, run_name, [] if before is None else before.ended
        self.curves: list[tuple[str, int, Mapping[str, float]]] = [] if before is None else before.curves
        self.found: dict[str, Any] = {} if before is None else before.found
        self.runs[self.id] = self

    def curve(self, axis: str, points: Sequence[Point]) -> None:
        if Recorder.fails == "curve":
            raise TimeoutError("the tracker is down")
        self.curves += [(axis, point.step, point.values) for point in points]

    def numbers(self, values: Mapping[str, float]) -> None:
        self.found |= values

    def texts(self, values: Mapping[str, str]) -> None:
        self.found |= values

    def close(self, finished: bool) -> None:
        if Recorder.fails == "close":
            time.sleep(5)
        self.ended.append(finished)


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.run.trackers._TRACKERS", {"mlflow": Recorder})
    monkeypatch.setattr("compressor.run.pipeline.check_tracker", lambda name: None)
    monkeypatch.setattr(tracking, "INTERVAL_S", 0.02)
    monkeypatch.setattr(Recorder, "runs", {})
    monkeypatch.setattr(Recorder, "fails", "")


def tracked(**fields: Any) -> Recipe:
    return recipe(agent="random", budgets={"flops": "60%"}, track="mlflow", **fields)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "search/episodes.jsonl").read_text().splitlines()]


def check(run: Recorder, folder: Path) -> None:
    """The tracker has each episode and each epoch of the run once, and its results."""
    manifest = manifest_of(folder)
    episodes = [
        ("episode", place, {"search/reward": each["reward"], "search/accuracy": each["accuracy"]}
         | {f"search/{name}": cost for name, cost in each["costs"].items()})
        for place, each in enumerate(log_of(folder))
    ]  # fmt: skip
    assert [each for each in run.curves if each[0] == "episode"] == episodes
    losses = [
        (each["epoch"], each["phase"], each["loss"]) for each in manifest["training"]
    ]
    found = [
        (step, name.removeprefix("training/loss_"), value)
        for axis, step, values in run.curves
        for name, value in values.items()
        if axis == "epoch" and name.startswith("training/loss_")
    ]
    assert found == losses
    accuracy = manifest["accuracy"]
    for name, key in (("dense", "dense"), ("cut", "pruned"), ("finetuned", "finetuned"), ("exported", "exported")):
        assert run.found[f"score/{name}"] == accuracy[key]
    assert run.found["score/deployed"] == accuracy["finetuned"]
    assert run.found["latency/measured_ms"] == manifest["latency"]["measured_ms"]
    (budget,) = manifest["budgets"]
    assert run.found["budget/macs/measured"] == budget["measured"] == run.found["macs/slim"]
    assert run.found["status"] == "finished"
    assert run.found["verdict"].startswith("Budget kept")
    for name in manifest["files"]:
        assert Path(run.found[f"files/{name}"]) == folder.resolve() / name


def test_a_tracked_run(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "birds"
    result = run_recipe(tracked(), out=folder)
    (run,) = Recorder.runs.values()
    check(run, folder)
    assert (result.exit_code, run.name, run.ended, run.recipe.model) == (0, "birds", [True], "tests.nets:tiny")
    assert "The run is tracked by memory" in said
    assert list((folder / "search/curves").iterdir())  # TensorBoard's
    assert not any("tracker" in note for note in result.manifest["notes"])
    resume(folder)
    check(run, folder)
    assert list(Recorder.runs) == [run.id]


def test_the_deployed_score_is_that_of_the_file_that_was_timed() -> None:
    manifest = Manifest(
        accuracy=Accuracy(finetuned=0.9, exported=0.9),
        exports={"int8": Export(file="model.int8.onnx", accuracy=0.8)},
        stages={"export": Stage(finished="2026-01-01")},
    )
    assert "score/deployed" not in numbers_of(manifest)  # which file it is, is known once it is measured
    manifest.stages["measure"] = Stage(finished="2026-01-01")
    assert numbers_of(manifest)["score/deployed"] == 0.9
    manifest.latency = Latency(precision="int8", measured_ms=1.0)
    found = numbers_of(manifest)
    assert (found["score/exported"], found["score/deployed"], found["latency/measured_ms"]) == (0.9, 0.8, 1.0)


def test_a_killed_run_continues_its_tracked_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.pipeline.finetune", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tracked(), out=folder)
    (run,) = Recorder.runs.values()
    assert (run.ended, "score/finetuned" in run.found) == ([False], False)
    assert len(run.curves) >= len(log_of(folder)) > 0
    resume(folder)
    assert list(Recorder.runs) == [run.id]
    check(Recorder.runs[run.id], folder)
    assert run.ended == [False, True]


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.fails = "curve"
    folder = tmp_path / "run"
    result = run_recipe(tracked(), out=folder)
    assert result.exit_code == 0
    assert sum("The tracker fails: the tracker is down." in line and "tries again" in line for line in said) == 1
    (note,) = (note for note in result.manifest["notes"] if "tracker" in note)
    assert note == f"The tracker fails: the tracker is down. The rest is sent by: compress --resume {folder}"
    assert manifest_of(folder)["notes"] == result.manifest["notes"]
    Recorder.fails = ""
    resume(folder)
    (run,) = Recorder.runs.values()
    check(run, folder)
    Recorder.fails = "close"
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.1)
    assert "has not answered for 0.1 s" in " ".join(resume(folder).manifest["notes"])


def test_a_tracker_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.fails = "begin"
    folder = tmp_path / "run"
    with pytest.raises(CompressorError) as caught:
        run_recipe(tracked(), out=folder)
    assert caught.value.message == "MLflow cannot track the run: no route to the tracker."
    assert "--track none" in caught.value.hint
    monkeypatch.setattr("compressor.run.pipeline._stages", lambda run, job: 0)
    assert resume(folder, {"track": "none"}).exit_code == 0
    assert Recorder.runs == {}
    assert not (folder / tracking.SENT).exists()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_client_is_said_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from compressor.run.trackers import check_tracker

    monkeypatch.setattr("compressor.run.pipeline.check_tracker", check_tracker)
    monkeypatch.setattr("compressor.run.trackers.find_spec", lambda name: None)
    with pytest.raises(CompressorError, match=f"--track {name} needs the client of") as caught:
        run_recipe(recipe(track=name, model="no.such:network"), out=tmp_path / "run")
    assert caught.value.hint == f"Install it: pip install 'compressor[{name}]'"
    assert not (tmp_path / "run").exists()


def follower(folder: Path, manifest: dict[str, Any], episodes: int) -> tracking.Follower:
    """A follower of a folder with these contents, which has not begun."""
    (folder / "search").mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [json.dumps({"reward": place / 10, "accuracy": 0.5, "costs": {"macs": place}}) for place in range(episodes)]
    (folder / "search/episodes.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"reward": 0')
    sent = tracking.Sent(tracker="mlflow", id="abc", episodes=2, epochs=5)
    return tracking.Follower(folder, Recorder(recipe(), "run", "abc"), sent)


def test_what_is_new_is_sent_but_not_while_a_latency_is_measured(tmp_path: Path) -> None:
    measuring = {"stages": {"measure": {"started": "now", "finished": None}}, "accuracy": {"dense": 0.25}}
    found = follower(tmp_path, measuring, 4)
    found._send(last=False)
    run = Recorder.runs["abc"]
    assert (run.curves, run.found) == ([], {})
    measuring["stages"]["measure"]["finished"] = "later"  # type: ignore[index]
    measuring["accuracy"] = {"dense": 0.25, "finetuned": float("nan")}
    (tmp_path / "manifest.json").write_text(json.dumps(measuring))
    found._send(last=False)
    assert [(axis, step, values["search/reward"]) for axis, step, values in run.curves] == [
        ("episode", 2, 0.2), ("episode", 3, 0.3),
    ]  # fmt: skip
    assert (run.found["score/dense"], "score/finetuned" in run.found) == (0.25, False)
    assert json.loads((tmp_path / tracking.SENT).read_text()) == {
        "tracker": "mlflow", "id": "abc", "episodes": 4, "epochs": 0,
    }  # fmt: skip
    found._send(last=False)
    assert len(run.curves) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", '{"tracker": "mlflow", "id": "../x"}', '{"tracker": "wandb", "id": "1"}']
)
def test_a_record_that_is_damaged_or_of_another_tracker_is_not_followed(tmp_path: Path, content: str) -> None:
    from compressor.run.folder import RunFolder

    run = RunFolder(tmp_path)
    (tmp_path / tracking.SENT).write_text(content)
    with tracking.followed(run, tracked()):
        pass
    assert list(Recorder.runs) == ["run0"]
    assert json.loads((tmp_path / tracking.SENT).read_text())["id"] == "run0"
