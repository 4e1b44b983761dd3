"""Scoring networks and plans."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compressor.data import DataBundle, MemorySplit, Preprocessing, load_data
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from compressor.search.evaluate import Evaluator, Scoring
from compressor.training.classification import Classification
from compressor.training.scoring import (
    accuracy,
    closeness,
    log_probabilities,
    reestimate_batch_norm,
    standard_error,
)


class Brightness(nn.Module):
    """Class 1 for images that are brighter than the middle, else class 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def split_of(levels: list[int], labels: list[int]) -> MemorySplit:
    images = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return MemorySplit(images, torch.tensor(labels), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))


def test_accuracy_counts() -> None:
    split = split_of([0, 255, 10, 250, 240], [0, 1, 1, 1, 0])
    assert accuracy(Brightness(), split) == pytest.approx(3 / 5)
    assert accuracy(Brightness(), split, batch_size=2) == pytest.approx(3 / 5)
    assert accuracy(Brightness(), split, batch_size=2, max_batches=1) == 1.0


def test_giving_up_never_changes_a_rank() -> None:
    """8 images, of which the first 4 are wrong: 60 % is out of reach after 4."""
    split = split_of([0] * 8, [1] * 4 + [0] * 4)
    seen = accuracy(Brightness(), split, batch_size=2, floor=0.6)
    assert seen == 0.0
    assert accuracy(Brightness(), split, batch_size=2, floor=0.5) == 0.5
    assert accuracy(Brightness(), split, batch_size=2, floor=0.4) == 0.5


def test_modes_are_put_back() -> None:
    model = nn.Sequential(nn.Dropout(), Brightness())
    model.train()
    model[0].eval()
    accuracy(model, split_of([0, 255], [0, 1]))
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_closeness_by_hand() -> None:
    """Two classes: the dense network is sure of neither, the other one is as sure of both as its brightness says."""
    split = split_of([0, 255], [0, 1])
    goals = torch.full((2, 2), 0.5).log()
    sure = (torch.tensor([1.0, -1.0]) / 4).softmax(0)  # of both images, the classes exchanged; at a temperature of 4
    divergence = float((0.5 * (0.5 / sure).log()).sum())
    assert closeness(Brightness(), split, goals) == pytest.approx(math.exp(-divergence))
    own = log_probabilities(Brightness(), split, batch_size=1)
    assert own.exp().sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert closeness(Brightness(), split, own, batch_size=1) == 1.0


def test_a_hopeless_closeness_is_below_its_floor() -> None:
    split = split_of([0] * 4 + [255] * 4, [0] * 8)
    goals = torch.tensor([[-30.0, 0.0]] * 4 + [[0.0, -30.0]] * 4)  # the opposite
    full = closeness(Brightness(), split, goals)
    assert closeness(Brightness(), split, goals, batch_size=2, floor=full - 1e-6) == pytest.approx(full)
    assert closeness(Brightness(), split, goals, batch_size=2, floor=0.9) < 0.9


def test_standard_error() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 100) == 0.0


def test_batch_norm_statistics_by_hand() -> None:
    """Four grey levels in two batches: the plain mean of the batches' means and (unbiased) variances."""
    split = split_of([0, 51, 102, 255], [0, 0, 1, 1])
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(48, 2))
    before = model[0].momentum
    reestimate_batch_norm(model, split, batches=2, batch_size=2)
    batches = [x[:, 0] for x, _ in split.batches(2, shuffle_seed=0, drop_last=True)]
    mean = torch.stack([x.mean() for x in batches]).mean()
    variance = torch.stack([x.var() for x in batches]).mean()
    assert model[0].running_mean.tolist() == pytest.approx([mean.item()] * 3)
    assert model[0].running_var.tolist() == pytest.approx([variance.item()] * 3)
    assert model[0].momentum == before
    assert model.training


def test_batch_norm_of_frozen_and_missing_layers() -> None:
    split = split_of([0, 51, 102, 255], [0, 0, 1, 1])
    reestimate_batch_norm(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), split)
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    reestimate_batch_norm(nn.Sequential(untracked), split)
    assert untracked.running_mean is None


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    torch.manual_seed(0)
    return PruningSpace(create_model("cifar_resnet20", 10), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    return load_data("digits", seed=0)


def test_plans_are_scored_once_until_the_weights_move(space: PruningSpace, digits: DataBundle) -> None:
    evaluate = Evaluator(space, Classification.of(digits), Scoring(bn_batches=2, batch_size=64), search_images=60)
    assert evaluate.images == 60
    weights = {key: value.clone() for key, value in space.model.state_dict().items()}
    plan = space.uniform(0.5)
    score = evaluate(plan)
    assert 0 <= score <= 1
    assert evaluate(plan) == score
    assert evaluate(space.plan(dict(plan.widths))) == score  # the same widths by another way
    assert evaluate.evaluations == 1
    assert evaluate.seconds > 0
    evaluate.weights_moved()
    assert evaluate(plan) == score
    assert evaluate.evaluations == 2
    assert all(torch.equal(weights[key], value) for key, value in space.model.state_dict().items())


def test_the_dense_plan_scores_as_the_dense_network(space: PruningSpace, digits: DataBundle) -> None:
    evaluate = Evaluator(space, Classification.of(digits), Scoring(bn_batches=2, batch_size=64))
    dense = create_model("cifar_resnet20", 10)
    dense.load_state_dict(space.model.state_dict())
    reestimate_batch_norm(dense, digits.train.sample(128), batches=2, batch_size=64)
    assert evaluate(space.dense()) == pytest.approx(accuracy(dense, digits.search), abs=1.5 / 143)


def test_hopeless_candidates_are_not_remembered(space: PruningSpace, digits: DataBundle) -> None:
    evaluate = Evaluator(space, Classification.of(digits), Scoring(bn_batches=1, batch_size=16))
    plan = space.smallest()
    early = evaluate(plan, floor=0.99)
    assert early < 0.99
    full = evaluate(plan)
    assert evaluate.evaluations == 2
    assert full == evaluate(plan)


def test_scores_in_bf16_are_close_to_those_in_fp32(digits: DataBundle) -> None:
    torch.manual_seed(0)
    space = PruningSpace(create_model("cifar_resnet20", 10), torch.zeros(1, 3, 32, 32))
    plan = space.uniform(0.5)
    full, half = (
        Evaluator(space, Classification.of(digits), scoring, search_images=100)(plan)
        for scoring in (Scoring(bn_batches=1, mixed_precision=precision) for precision in ("no", "bf16"))
    )
    assert half == pytest.approx(full, abs=0.1)


def test_the_dense_network_is_closest_to_itself(digits: DataBundle) -> None:
    torch.manual_seed(0)
    space = PruningSpace(create_model("tests.nets:tiny", 10).eval(), torch.zeros(1, 3, 32, 32))
    evaluate = Evaluator(space, Classification.of(digits, "closeness"), Scoring(compensate="moments"))
    dense, half = evaluate.many([space.dense(), space.uniform(0.5)])
    assert dense == pytest.approx(1.0)
    assert 0 < half < 1
    with torch.no_grad():
        space.model.linear.bias.add_(1.0 * torch.arange(10))
    evaluate.weights_moved()
    assert evaluate(space.dense()) == pytest.approx(1.0)
