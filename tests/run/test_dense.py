"""Given weights that answer as if they guessed, and fine-tuning that ends below where it began."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor import CompressorError, run_recipe
from compressor.core.answers import Answers
from compressor.core.manifest import Epoch
from compressor.models import create_model
from compressor.models.weights import FRESH_HEAD
from compressor.run.dense import collapsed, lost_in_finetuning, problem
from compressor.run.folder import RunFolder
from compressor.run.job import Job
from compressor.run.stages import _effect_of_no_training, begin, dense_teacher
from compressor.training.task import Examined
from tests.runs import manifest_of, recipe


def answers(labels: torch.Tensor, right: int) -> torch.Tensor:
    """The first `right` answers are right, the others the next class."""
    classes = int(labels.max()) + 1
    return torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % classes)


@pytest.mark.parametrize(
    ("classes", "images", "right", "wrong"),
    [
        (1000, 1000, 3, True),  # 0.3 %: three classes where they belong by luck
        (1000, 1000, 630, False),
        (10, 10_000, 1_000, True),
        (10, 10_000, 5_500, False),
        (10, 20, 2, True),
        (2, 10, 6, False),  # so few images show nothing
        (2, 400, 205, True),
        (2, 400, 300, False),
    ],
)
def test_guessing_is_told_from_noise(classes: int, images: int, right: int, wrong: bool) -> None:
    labels = torch.arange(images) % classes
    shuffled = labels[torch.randperm(images, generator=torch.Generator().manual_seed(0))]
    assert ("no better than guessing" in problem(answers(shuffled, right), shuffled)) is wrong


def test_one_answer_for_all_is_guessing_and_a_rare_class_found_is_not() -> None:
    labels = (torch.arange(1000) % 10 == 0).long()  # nine tenths are class 0
    assert "guessing (90.00%)" in problem(torch.zeros_like(labels), labels)
    assert problem(answers(labels, 950), labels) == ""


def test_published_accuracy_is_a_promise() -> None:
    labels = torch.arange(1000)
    assert problem(answers(labels, 749), labels, 0.755) == ""
    assert "far below the published 80.86%" in problem(answers(labels, 630), labels, 0.8086)


def test_fine_tuning_that_loses_is_said() -> None:
    assert lost_in_finetuning(0.86, 0.80, 0.88, 10_000) is None
    assert "lowered the accuracy from 80.00% to 60.00%" in (lost_in_finetuning(0.6, 0.8, 0.88, 10_000) or "")
    assert "28.0 points below" in (lost_in_finetuning(0.6, 0.5, 0.88, 10_000) or "")
    assert lost_in_finetuning(0.7, 0.8, 0.8, 20) is None  # noise of twenty images


def outcome(right: int, images: int = 400) -> Examined:
    labels = torch.arange(images) % 10
    return Examined(right / images, (answers(labels, right), labels))


def epochs(losses: list[float], shares: list[float | None]) -> list[Epoch]:
    return [Epoch(loss=loss, accuracy=share) for loss, share in zip(losses, shares, strict=True)]


@pytest.mark.parametrize(
    ("losses", "shares", "collapse"),
    [
        ([2.0, 0.5, 2.3], [0.3, 0.9, 0.1], True),
        ([2.0, 0.5, 0.6], [0.3, 0.9, 0.7], False),  # it rose a little
        ([0.02, 0.01, 0.02], [0.99, 1.0, 0.99], False),  # twice hardly anything
        ([2.0, 0.5, 2.3], [None, None, None], True),  # of mixed images no share is right
        ([2.0, 0.5, 1.0], [None, None, None], False),
        ([2.0, 1.0, 0.5], [0.3, 0.6, 0.9], False),
        ([2.0], [0.1], False),
    ],
)
def test_a_loss_that_rises_again_is_a_collapse(
    losses: list[float], shares: list[float | None], collapse: bool
) -> None:
    said = collapsed("slim", epochs(losses, shares), outcome(390), "training.finetune_learning_rate")
    if not collapse:
        assert said is None
        return
    assert said == (
        "The training of the slim network collapsed: its loss rose from 0.5 in epoch 2 to 2.3 in epoch 3. Lower "
        "training.finetune_learning_rate, or train longer (--epochs)."
    )


def test_a_trained_network_that_guesses_is_named() -> None:
    fine = epochs([2.0, 1.0], [0.3, 0.6])
    assert collapsed("dense", fine, Examined(0.1, None), "training.learning_rate") is None
    assert collapsed("dense", fine, outcome(40), "training.learning_rate") == (
        "After 2 epochs of training the dense network scores 10.00% on 400 test images, no better than guessing "
        "(10.00%). Lower training.learning_rate, or train longer (--epochs)."
    )


def test_a_run_whose_training_collapses_warns_until_it_does_not(tmp_path: Path) -> None:
    wanted = recipe(
        agent="uniform", budgets={"flops": "60%"}, epochs=3, training={"finetune_learning_rate": 1e4, "grad_clip": 1.0}
    )
    result = run_recipe(wanted, out=tmp_path / "run")
    (said,) = result.manifest["warnings"].values()
    assert "training.finetune_learning_rate" in said
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert 'class="banner doubtful"' in page
    assert said in page
    with closing(RunFolder.open(tmp_path / "run")) as run:
        run.warn("finetune", None)
        assert run.manifest.warnings == {}


def test_weights_that_guess_stop_the_run_unless_they_are_accepted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(create_model("tests.nets:tiny", 10).state_dict(), tmp_path / "net.pt")
    wanted = recipe(
        weights=str(tmp_path / "net.pt"), agent="uniform", epochs=1, budgets={"flops": "60%"}, image_size=16
    )
    with pytest.raises(CompressorError, match="no better than guessing") as caught:
        run_recipe(wanted, out=tmp_path / "run")
    for word in ("--mean", "data.channel_order", "classes are in another order", "--accept-dense"):
        assert word in caught.value.hint
    accepted = Job.prepare(wanted.changed({"accept_dense": True}).resolved())
    with closing(RunFolder.open(tmp_path / "run")) as run:
        run.stage("begin", partial(begin, run, accepted))
    found = manifest_of(tmp_path / "run")
    assert any("The recipe accepts that." in note for note in found["notes"])
    assert any("does not say how its images were prepared" in note for note in found["notes"])
    assert found["preprocessing"]["origin"] == "assumed: usual for ImageNet"
    assert found["stages"]["begin"]["finished"]


def test_a_network_with_a_fresh_head_teaches_once_the_search_has_trained_it(tmp_path: Path) -> None:
    labels = torch.arange(1000) % 10
    guesses = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    loaded, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def teacher(*phases: str, given: bool = True, name: str = "tests.nets:tiny") -> Any:
        job: Any = Job.__new__(Job)
        job.recipe, job.teacher, job.model = recipe(model=name), loaded if given else None, model
        known = SimpleNamespace(training=[Epoch(phase=phase) for phase in phases])
        run: Any = SimpleNamespace(manifest=known, path=tmp_path)
        return dense_teacher(run, job)

    def answered(dense: torch.Tensor) -> None:
        Answers(truth=labels.tolist(), dense=dense.tolist()).write(tmp_path / "answers.json")

    answered(guesses)
    assert teacher() is loaded
    assert teacher(given=False) is None
    answered(labels)
    assert teacher(given=False) is model  # the user's function gave it trained weights
    assert teacher(given=False, name="cifar_resnet20") is None
    setattr(model, FRESH_HEAD, 3)
    assert teacher() is None  # however well it answers
    assert teacher(given=False) is None
    assert teacher("finetune") is None
    assert teacher("joint", "finetune") is model


@pytest.fixture
def of_three(tmp_path: Path) -> Path:
    """Weights of the tiny network for three classes; the digits have ten."""
    torch.save(create_model("tests.nets:tiny", 3).state_dict(), tmp_path / "three.pt")
    return tmp_path / "three.pt"


def test_nothing_is_trained_only_with_a_trained_last_layer(of_three: Path, tmp_path: Path) -> None:
    for fields in ({"weights": str(of_three)}, {"model": "tests.run.test_dense:headed"}):
        wanted = recipe(**fields, agent="uniform", epochs=0, budgets={"flops": "60%"}, image_size=32)
        with pytest.raises(CompressorError, match=r"the last layer of tests.* is new, for 10 classes") as refused:
            run_recipe(wanted, out=tmp_path / "run")
        assert "--epochs 1 or more" in refused.value.hint
        assert not (tmp_path / "run").exists()


def headed() -> torch.nn.Module:
    """The tiny network for three classes, however many there are."""
    return create_model("tests.nets:tiny", 3)


def test_a_fresh_head_that_is_better_than_guessing_is_no_teacher(
    of_three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.run.dense.problem", lambda *_: "")
    monkeypatch.setattr("compressor.run.stages.problem", lambda *_: "")
    wanted = recipe(weights=str(of_three), agent="uniform", epochs=1, budgets={"flops": "60%"})
    found = run_recipe(wanted, out=tmp_path / "run").manifest
    assert found["accuracy"]["dense_note"] == "The dense network has an untrained last layer."
    assert found["accuracy"].get("compensated") is None
    (note,) = [note for note in found["notes"] if "untrained last layer" in note]
    assert note.endswith(
        "fine-tuning has no teacher. Give the search a share of the epochs: --set search.epochs_share=0.6 "
        "--epochs 2, or more epochs."
    )


@pytest.mark.parametrize(
    ("epochs", "search", "effect", "fix"),
    [
        (
            0, {}, "did not guide the search, and the delivered network is only cut.",
            "The search trains from 2 epochs on: --epochs 2 or more.",
        ),
        (
            0, {"epochs_share": 0.0, "brief_iterations": 5}, "The delivered network is only cut.",
            "Give the search a share of the epochs: --set search.epochs_share=0.6 --epochs 2, or more epochs.",
        ),
        (
            2, {"epochs_share": 0.0}, "did not guide the search, and fine-tuning has no teacher.",
            "Give the search a share of the epochs: --set search.epochs_share=0.6.",
        ),
        (1, {"brief_iterations": 5}, "Fine-tuning has no teacher.", "from 2 epochs on: --epochs 2 or more."),
    ],
)  # fmt: skip
def test_what_follows_from_no_training_and_what_is_enough(
    epochs: int, search: dict[str, Any], effect: str, fix: str
) -> None:
    job: Any = Job.__new__(Job)
    job.recipe = recipe(epochs=epochs, search=search).resolved()
    job.task = SimpleNamespace(metric=SimpleNamespace(name="accuracy"))
    said = _effect_of_no_training(job)
    assert f"{effect} " in said
    assert said.endswith(fix)
