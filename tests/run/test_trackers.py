"""The trackers' own clients, with stores in a folder of the test; each skips where its client is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.core.errors import CompressorError
from compressor.run.trackers import Point, Tracker, check_tracker, open_tracker
from tests.runs import recipe


def _use(tracker: Tracker, first: int) -> None:
    tracker.curve("episode", [Point(place, {"search/reward": place / 10}) for place in range(first, first + 3)])
    tracker.curve("epoch", [Point(1, {"training/loss_finetune": 0.5})])
    tracker.numbers({"score/dense": 0.75, "budget/my.costs:of/target": 3.0})
    tracker.texts({"status": "running", "files/model.onnx": "/runs/one/model.onnx"})


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    wanted = recipe(track="mlflow")
    check_tracker("mlflow")
    first = open_tracker(wanted, "birds", None)
    _use(first, 0)
    first.close(finished=False)
    again = open_tracker(wanted, "birds", first.id)
    client: Any = mlflow.MlflowClient()
    assert client.get_run(first.id).info.status == "RUNNING"
    _use(again, 3)
    again.close(finished=True)
    (run,) = client.search_runs([client.get_experiment_by_name("compressor").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (again.id, "birds", "FINISHED")
    assert run.data.params["model"] == "tests.nets:tiny"
    assert run.data.params["search.max_evaluations"] == "6"
    assert run.data.metrics["score/dense"] == 0.75
    assert run.data.tags["files/model.onnx"] == "/runs/one/model.onnx"
    rewards = {each.step: each.value for each in client.get_metric_history(again.id, "search/reward")}
    assert rewards == {place: place / 10 for place in range(6)}


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    wanted = recipe(track="wandb")
    check_tracker("wandb")
    first = open_tracker(wanted, "birds", None)
    _use(first, 0)
    first.close(finished=False)
    again = open_tracker(wanted, "birds", first.id)
    _use(again, 3)
    again.close(finished=True)
    assert again.id == first.id
    kept = b"".join(path.read_bytes() for path in tmp_path.glob(f"wandb/offline-run-*-{first.id}/*.wandb"))
    for text in ("birds", "tests.nets:tiny", "search/reward", "score/dense", "/runs/one/model.onnx"):
        assert text.encode() in kept


def test_wandb_without_an_account_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it remembers the variables of an earlier test
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(CompressorError, match="knows no account") as caught:
        check_tracker("wandb")
    assert "WANDB_MODE=offline" in caught.value.hint
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    check_tracker("wandb")


def test_a_server_that_does_not_answer_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # discard: nothing listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompressorError, match="MLflow cannot track the run") as caught:
        open_tracker(recipe(track="mlflow"), "birds", None)
    assert "\n" not in caught.value.message
