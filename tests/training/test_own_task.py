"""The task of a user's objects: what its scores are worth in the search, and how a loss is distilled."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from compressor import CompressorError
from compressor.training.likeness import RawOutputs
from compressor.training.loaders import InputsOfBatch, Loader, Memory
from compressor.training.own_task import OwnTask
from compressor.training.settings import TrainSettings

INPUTS = InputsOfBatch((torch.zeros(1, 2),))


def task(**given: Any) -> OwnTask:
    usual: dict[str, Any] = dict.fromkeys(
        ("train", "loss", "calibration", "search", "test", "evaluate", "score")
    )
    return OwnTask(INPUTS, **{**usual, "likeness": RawOutputs(), **given})


def test_shares_are_rewarded_as_they_are() -> None:
    shares = task(dense=0.8)
    assert [shares.unit(value) for value in (0.3, 1.5, -2.0, float("nan"))] == [0.3, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("dense", [-0.4, 32.0, -1e-9, 5000.0])
def test_other_scores_keep_their_order_around_the_dense_one(dense: float) -> None:
    scores = task(dense=dense)
    values = [dense + step * max(abs(dense), 1e-9) for step in (-0.5, -0.1, -0.01, 0.0, 0.01, 0.3)]
    units = [scores.unit(value) for value in values]
    assert units == sorted(units)
    assert len(set(units)) == len(units)
    assert all(0 < unit < 1 for unit in units)
    assert scores.unit(dense) == 0.5


def losses(found: OwnTask, model: nn.Module, batch: Any, teacher: nn.Module | None) -> Any:
    return found.losses(model, batch, teacher, TrainSettings(), nullcontext)


def test_the_teacher_sees_what_the_loss_passed_to_the_network() -> None:
    student, teacher = nn.Linear(2, 3), nn.Linear(2, 3)
    batch = {"a": torch.rand(5, 2), "b": torch.rand(5, 3)}

    def error(model: nn.Module, each: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(2 * each["a"]) - each["b"]).square().mean()

    labelled = task(train=Loader([batch], 1), loss=error)
    found = losses(labelled, student, batch, teacher)
    goal = teacher(2 * batch["a"])
    expected = (student(2 * batch["a"]) - goal).square().mean() / (goal.var(correction=0) + 1e-6)
    assert found.distilled.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.inputs == 5
    assert found.right is None
    together = 0.75 * found.loss.item() + 0.25 * expected.item()
    assert found.together(0.25).item() == pytest.approx(together, rel=1e-5)
    assert losses(labelled, student, batch, None).distilled is None


def test_outputs_of_other_shapes_are_not_distilled() -> None:
    labelled = task(train=Loader([0], 1), loss=lambda model, each: model(each).mean())
    found = losses(labelled, nn.Linear(2, 3), torch.rand(4, 2), nn.Linear(2, 1))
    assert found.distilled is None
    assert found.together(0.5).item() == found.loss.item()


def test_without_a_loss_the_teacher_alone_trains() -> None:
    inputs = Memory((torch.rand(6, 2),), 6)
    alone = task(calibration=inputs)
    assert not alone.labelled
    assert alone.gradients("cpu", 0) is None
    student, teacher = nn.Linear(2, 3), nn.Linear(2, 3)
    found = losses(alone, student, next(inputs.batches(6)), teacher)
    assert found.loss is None
    found.together(0.5).backward()
    assert student.weight.grad is not None
    assert teacher.weight.grad is None


def test_functions_leave_the_mode_and_the_generators_as_they_were() -> None:
    network = nn.Linear(2, 3).train()
    torch.manual_seed(1)
    before = torch.get_rng_state()

    def score(model: nn.Module) -> float:
        return float(torch.rand(())) + model.training

    seen = [task().called("evaluate", score, network, "cpu") for _ in range(2)]
    assert seen[0] == seen[1] < 1
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(CompressorError, match="evaluate returned bool, expected a number"):
        task().called("evaluate", lambda _: True, network, "cpu")
