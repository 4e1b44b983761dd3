"""Fine-tuning that makes the compensated network worse: it is not delivered, and the run says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import RunResult, run_recipe
from compressor.core.metrics import Metric
from compressor.data import load_data
from compressor.pruning.artefact import read_plan
from compressor.run import finetuning
from compressor.run.folder import RunFolder
from compressor.run.job import Job
from compressor.run.pipeline import resume
from compressor.training.scoring import accuracy
from tests.nets import trained_tiny
from tests.runs import manifest_of, recipe


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe whose learning rate destroys trained weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(trained_tiny().state_dict(), path)
    fields = {
        "agent": "uniform", "epochs": 2, "weights": str(path), "budgets": {"params": "60%"}, "image_size": 32,
        "pruning": {"compensation_images": 64}, "training": {"finetune_learning_rate": 30.0, "grad_clip": 0.0},
    }  # fmt: skip
    return recipe(**fields)


@pytest.fixture(scope="module")
def harmful(wanted: Any, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_recipe(wanted, tmp_path_factory.mktemp("harmful") / "run")


def test_the_network_before_a_harmful_training_is_delivered(harmful: RunResult) -> None:
    manifest = manifest_of(harmful.directory)
    scores, data = manifest["accuracy"], load_data("digits", seed=0)
    assert scores["discarded"] < scores["compensated"] == scores["finetuned"]
    assert accuracy(harmful.model, data.test) == pytest.approx(scores["compensated"])
    assert abs(scores["exported"] - scores["finetuned"]) < 0.01
    said = [note for note in manifest["notes"] if note.startswith("Fine-tuning lowered the accuracy on the search")]
    assert len(said) == 1
    assert "is delivered as before. On training images it fell, too" in said[0]
    assert said[0].endswith("lower training.finetune_learning_rate, or train longer (--epochs).")
    page = (harmful.directory / "report.html").read_text(encoding="utf-8")
    assert "Accuracy, fine-tuned, not delivered" in page
    assert "with more training" not in page  # the advice of a run whose training helped


def test_a_run_that_is_resumed_after_a_harmful_training_delivers_the_same(
    harmful: RunResult, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "_delivered", _stop)  # the training has ended, and its result is judged next
        with pytest.raises(KeyboardInterrupt):
            run_recipe(wanted, tmp_path / "stopped")
    again = resume(tmp_path / "stopped")
    ours, theirs = harmful.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert manifest_of(tmp_path / "stopped")["accuracy"] == manifest_of(harmful.directory)["accuracy"]


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


class Seen:
    """Training images on which networks have these scores, one after the other."""

    def __init__(self, *scores: float) -> None:
        self._scores: Iterator[float] = iter(scores)

    def judge(self, *_: object) -> Any:
        return Metric(), lambda _: next(self._scores)


def test_only_a_lower_score_returns_to_the_start_and_training_images_tell_why(
    harmful: RunResult, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.prepare(wanted.resolved())
    monkeypatch.setattr(type(job.task), "on_calibration", lambda *_: Seen(0.9, 0.8))  # after training, and before
    with RunFolder.open(harmful.directory) as run:
        plan, start = read_plan(run.path), run.checkpoint(finetuning.START)
        kept = start.load()
        assert kept is not None
        slim = job.space.apply(plan)  # without compensation, as a network that training has changed
        score = job.task.judge(job.teacher, job.torch_device)[1](slim.eval())
        start.save({**kept, "score": score})
        assert finetuning._returned_to_start(run, job, plan, slim, job.teacher) is None
        start.save({**kept, "score": score + 0.001})
        note = finetuning._returned_to_start(run, job, plan, slim, job.teacher)
    assert note is not None
    assert note.endswith(
        "On training images it rose from 80.00% to 90.00%: there are too few of them. Add images, or train less."
    )
    assert all(torch.equal(value.cpu(), kept["weights"][name]) for name, value in slim.state_dict().items())
