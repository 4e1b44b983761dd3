"""The joint agent through the command line: what goes wrong is said, loses nothing, and can be mended."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.core.records import Checkpoint
from compressor.recipe import load_recipe
from compressor.training.loop import Trainer
from tests.runs import IMAGE_SIZE

TINY = ["--model", "tests.nets:tiny", "--flops", "60%", "--epochs", "4"]
FAST = [
    "--set",
    "search.max_evaluations=6",
    "--set",
    "search.batch_norm_batches=1",
    "--set",
    "contract.repeats=1",
    "--set",
    "pruning.compensate=off",
]
FAST += ["--set", "export.engine=false", "--set", f"image_size={IMAGE_SIZE}"]


def invoked(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def test_a_time_limit_cuts_the_training_of_the_search_and_says_so(tmp_path: Path) -> None:
    limit = ["--set", "search.max_seconds=0.000000001", "--out", str(tmp_path / "run")]
    code, output = invoked(*TINY, *FAST, *limit)
    assert code == 0
    note = "The search's time limit stopped its training after 0 of 2 epochs."
    assert note in output
    manifest = manifest_of(tmp_path / "run")
    assert note in manifest["notes"]
    assert [entry["phase"] for entry in manifest["training"]] == ["finetune"] * 2
    assert manifest["accuracy"]["dense_note"] == "The dense network is untrained."
    assert any("Allow the search more time: search.max_seconds." in note for note in manifest["notes"])


def test_an_untrained_network_teaches_nothing_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Any] = []

    def recording(*arguments: Any, **options: Any) -> Trainer:
        teachers.append(options["teacher"])
        return Trainer(*arguments, **options)

    monkeypatch.setattr("compressor.training.loop.Trainer", recording)
    folder = tmp_path / "run"
    code, output = invoked(*TINY[:-1], "1", *FAST, "--out", str(folder))
    assert code == 0
    assert teachers == [None]
    note = (
        "The dense network is untrained. Candidates were scored on an untrained network, so that their accuracy did "
        "not guide the search, and fine-tuning has no teacher. The search trains from 2 epochs on: --epochs 2 or more."
    )
    assert note in output
    manifest = manifest_of(folder)
    assert note in manifest["notes"]
    assert manifest["accuracy"]["dense_note"] == "The dense network is untrained."
    assert manifest["training"][0]["loss"] < 2.5


def spoilt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The loss of every step after so many is no number."""
    taken = 0

    def cross_entropy(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        loss = functional.cross_entropy(*arguments, **options)
        return loss * float("nan") if taken > steps else loss

    monkeypatch.setattr("compressor.training.classification.functional", SimpleNamespace(cross_entropy=cross_entropy))


@pytest.mark.parametrize(
    ("epoch", "field"), [(2, "training.learning_rate"), (3, "training.finetune_learning_rate")]
)
def test_a_loss_that_is_no_number_stops_and_goes_on_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, field: str
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoilt_after(patch, steps=(epoch - 1) * 40 + 5)  # an epoch of the digits has 40 steps of 32 images
        code, output = invoked(*TINY, *FAST, "--out", str(folder))
    assert code == 2
    within = epoch if field == "training.learning_rate" else epoch - 2
    assert f"NaN or infinite in epoch {within} of 2, at a learning rate of" in output
    assert f"compress --resume RUN --set {field}=" in output
    part = "search" if field == "training.learning_rate" else "finetune"
    state = Checkpoint(folder / f"checkpoints/{part}.pt").load()
    if epoch == 2:
        assert state is not None
        trained = Checkpoint(folder / "checkpoints" / state["weights"]).load() if part == "search" else state["trainer"]
        assert trained is not None
        assert trained["epoch"] == 1
        assert all(value.isfinite().all() for value in trained["model"].values())
    code, output = invoked("--resume", str(folder), "--set", f"{field}=0.002")
    assert code == 0
    assert "Resumed with other settings: " + field in output
    manifest = manifest_of(folder)
    assert [(entry["phase"], entry["epoch"]) for entry in manifest["training"]] == [
        ("warmup", 1), ("joint", 2), ("finetune", 1), ("finetune", 2)
    ]  # fmt: skip
    assert any("0.002" in note for note in manifest["notes"])
    assert getattr(load_recipe(folder / "recipe.yaml").training, field.partition(".")[2]) == 0.002


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in fine-tuning, after its search."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        spoilt_after(patch, steps=90)
        arguments = [*TINY, *FAST, "--set", "search.context_size=8", "--out", str(folder)]
        assert invoked(*arguments)[0] == 2
    return folder


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"format": 0}, "has format 0, expected"),
        ({"space": "another"}, "is of another pruning space"),
        ({"agent": "stepwise"}, "is of the agent stepwise, not of joint"),
    ],
)
def test_the_state_of_another_search_is_refused(
    stopped: Path, changed: dict[str, Any], expected: str
) -> None:
    checkpoint = Checkpoint(stopped / "checkpoints/search.pt")
    state = checkpoint.load()
    assert state is not None
    checkpoint.save({**state, **changed})
    before = (stopped / "search/episodes.jsonl").read_text()
    try:
        code, output = invoked("--resume", str(stopped))
    finally:
        checkpoint.save(state)
    assert code == 2
    assert expected in output
    assert (stopped / "search/episodes.jsonl").read_text() == before


def test_a_small_search_split_is_told_with_its_standard_error(stopped: Path) -> None:
    notes = [note for note in manifest_of(stopped)["notes"] if "standard error" in note]
    assert len(notes) == 1
    assert "143 images: an accuracy of 90 % is known to within 2.5%" in notes[0]


def test_too_few_joint_epochs_leave_the_environment_model_idle_and_say_so(stopped: Path) -> None:
    """Of 4 epochs the search has 2: one of warm-up, one joint. Of 5 it would have 3, two of them joint."""
    manifest = manifest_of(stopped)
    (note,) = [note for note in manifest["notes"] if "environment model" in note]
    assert "and the search has 1 joint epoch)" in note
    assert note.endswith("with 0.6 of the epochs for the search, --epochs 5 or more.")
    parts = {part["part"]: part for part in manifest["search"]["method"]["parts"]}
    assert parts["environment model"]["by"] == "recipe"
    assert parts["environment model"]["effect"].startswith("idle: it learns how rewards change")
    assert parts["alignment of the weights"]["effect"].startswith("1 epoch; mean penalty 0.0")
    assert parts["episodes near the best plan"]["by"] == "default"


def test_curves_and_episodes_of_a_run(stopped: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stopped / "search/curves")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"search/reward", "training/align_weight", "training/regulariser"} <= tags
    assert any(tag.startswith("favoured/") for tag in tags)
    assert {round(event.value, 9) for event in events.Scalars("training/align_weight")} == {1e-4}
    assert max(event.value for event in events.Scalars("training/regulariser")) > 0
    episodes = [json.loads(line) for line in (stopped / "search/episodes.jsonl").read_text().splitlines()]
    assert [episode["episode"] for episode in episodes] == list(range(len(episodes)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["search.reward.latency=-0.07"], "weighs latency, which has no budget here (there are: macs)"),
        (["search.reward.flops=0.5"], "'search.reward.flops' is 0.5"),
        (["search.reward.speed=-1"], "'search.reward.speed'"),
        (["training.ema_decay=1"], "'training.ema_decay' is 1"),
        (["training.schedule=flat"], "'training.schedule' is 'flat'"),
        (["search.settings.near_share=75"], "near_share is 75, expected 0 to 1"),
        (["search.settings.nearshare=0.5"], "nearshare"),
    ],
)
def test_bad_fields(tmp_path: Path, settings: list[str], expected: str) -> None:
    folder = tmp_path / "run"
    flags = [part for setting in settings for part in ("--set", setting)]
    code, output = invoked(*TINY, *flags, "--out", str(folder))
    assert code == 2
    assert expected in output
    assert not folder.exists()


def test_a_soft_factor_and_an_average_on_the_whole_road(tmp_path: Path) -> None:
    """The reward is the accuracy times (share of the parameters' budget)^-0.3; fine-tuned weights are averaged."""
    folder = tmp_path / "run"
    options = ["--params", "100%", "--set", "search.reward.params=-0.3", "--set", "training.ema_decay=0.9"]
    code, _ = invoked(*TINY, *FAST, *options, "--set", "training.one_schedule=true", "--out", str(folder))
    assert code == 0
    manifest = manifest_of(folder)
    target = next(entry["target"] for entry in manifest["budgets"] if entry["name"] == "params")
    for each in manifest["search"]["candidates"]:
        expected = each["accuracy"] * (each["costs"]["params"] / target) ** -0.3
        assert each["reward"] == pytest.approx(expected)
    assert manifest["accuracy"]["finetuned"] > 0.3
