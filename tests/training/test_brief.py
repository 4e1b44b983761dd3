"""A few steps of training before a candidate is scored: the same for all, and without a trace afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.data import DataBundle, load_data
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.sites import check_workers
from compressor.training.classification import Classification
from compressor.training.loop import BriefTraining
from compressor.training.settings import TrainSettings

SETTINGS = TrainSettings(batch_size=32, learning_rate=0.05, ema_decay=0.9)


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    return load_data("digits", seed=0)


@pytest.fixture
def space() -> PruningSpace:
    torch.manual_seed(0)
    return PruningSpace(create_model("tests.nets:tiny", 10), torch.zeros(1, 3, 32, 32))


def test_each_candidate_is_trained_from_the_same_weights(space: PruningSpace, digits: DataBundle) -> None:
    weights = {name: tensor.clone() for name, tensor in space.model.state_dict().items()}
    train = BriefTraining(Classification.of(digits), SETTINGS, seed=3)
    evaluate = Evaluator(space, Classification.of(digits), Scoring(bn_batches=1), brief=train, brief_steps=25)
    plans = [space.uniform(0.5), space.smallest(), space.uniform(0.5)]
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    scores = evaluate.many(plans)
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    assert all(torch.equal(weights[name], tensor) for name, tensor in space.model.state_dict().items())
    assert evaluate.evaluations == 2
    evaluate.weights_moved()
    assert evaluate.many(plans[::-1]) == scores[::-1]

    plain = Evaluator(space, Classification.of(digits), Scoring(bn_batches=1))
    by_hand = space.apply(plans[0])
    train(by_hand, 25)
    assert scores[0] == plain.score(by_hand)
    assert scores[0] > plain(plans[0]) + 0.15  # untrained weights are near 0.1
    network = space.apply(plans[0])
    assert evaluate.score(network, steps=0) == plain(plans[0])


def test_more_steps_than_an_epoch_has(space: PruningSpace, digits: DataBundle) -> None:
    small = dataclasses.replace(digits, train=digits.train.sample(40))
    network = space.apply(space.uniform(0.5))
    before = network.get_parameter("conv1.weight").detach().clone()
    BriefTraining(Classification.of(small), SETTINGS, seed=0)(network, 3)
    assert not torch.equal(network.get_parameter("conv1.weight"), before)
    assert not network.training


def test_a_loss_that_is_no_number(space: PruningSpace, digits: DataBundle) -> None:
    train = BriefTraining(Classification.of(digits), TrainSettings(batch_size=32, learning_rate=1e30), seed=0)
    with pytest.raises(CompressorError, match="candidate became NaN or infinite in its 4 steps") as caught:
        train(space.apply(space.uniform(0.5)), 4)
    assert "training.finetune_learning_rate=2e+29" in caught.value.hint


def test_workers_do_not_train() -> None:
    check_workers(1, 8)
    check_workers("1", 8)
    check_workers("2")  # recipes may have the number as text
    with pytest.raises(
        CompressorError, match="--workers 2: workers only score, and cannot train candidates for 8 steps"
    ):
        check_workers(2, 8)
