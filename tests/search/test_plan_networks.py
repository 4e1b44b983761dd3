"""Networks of plans as a search scores them: compensated for the current weights of the dense network."""

from __future__ import annotations

import pytest
import torch

from compressor.data import DataBundle, load_data
from compressor.models import create_model
from compressor.pruning.compensate import compensate
from compressor.pruning.space import PruningSpace
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.networks import FIT_BATCH, Networks
from compressor.training.classification import Classification
from compressor.training.feeds import inputs_in
from tests.nets import trained_tiny


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    return load_data("digits", seed=0)


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    return PruningSpace(trained_tiny(), torch.zeros(1, 3, 32, 32))


def test_the_images_are_spread_over_the_classes(digits: DataBundle) -> None:
    batches, again, others = (
        [images for (images,) in inputs_in(digits.train, 100, seed, FIT_BATCH, "cpu")] for seed in (0, 0, 1)
    )
    assert [len(batch) for batch in batches] == [64, 36]
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0], others[0])


@pytest.mark.parametrize("method", ["moments", "quick", "layers"])
def test_networks_are_those_of_compensate(space: PruningSpace, digits: DataBundle, method: str) -> None:
    plan = space.uniform(0.5)
    networks = Networks(space, digits.train, method, images=64, seed=3)
    batches = list(inputs_in(digits.train, 16 if method == "quick" else 64, 3, FIT_BATCH, "cpu"))
    expected = compensate(space, plan, batches, method, seed=3).network.state_dict()
    for _ in range(2):  # the second from the moments of the first
        found = networks.build(plan).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sliced_networks(space: PruningSpace, digits: DataBundle) -> None:
    plan = space.uniform(0.5)
    networks = Networks(space, digits.train)
    assert not networks.compensated
    expected = space.apply(plan).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in networks.build(plan).state_dict().items())


def test_moments_follow_the_weights(digits: DataBundle) -> None:
    torch.manual_seed(0)
    space = PruningSpace(create_model("tests.nets:tiny", 10).eval(), torch.zeros(1, 3, 32, 32))
    plan = space.uniform(0.5)
    networks = Networks(space, digits.train, "moments", images=64)
    before = networks.build(plan).state_dict()
    with torch.no_grad():
        for parameter in space.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    networks.weights_moved()
    after = networks.build(plan).state_dict()
    fresh = Networks(space, digits.train, "moments", images=64).build(plan).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.equal(fresh[name], after[name]) for name in after)


def test_a_compensated_candidate_scores_better(space: PruningSpace, digits: DataBundle) -> None:
    """Half of the channels of a trained network, without training."""
    plan = space.uniform(0.5)
    cut, moments, layers = (
        Evaluator(space, Classification.of(digits), Scoring(compensate=method))(plan)
        for method in ("off", "moments", "layers")
    )
    assert moments > cut + 0.02
    assert layers > cut + 0.02
