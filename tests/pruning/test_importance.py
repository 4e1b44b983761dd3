"""Which channels each importance keeps, by hand on a network of three filters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.groups import Group
from compressor.pruning.space import PruningSpace


class Three(nn.Module):
    """1x1 convolution to three channels, batch-norm, mean, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[3.0, 0.0], [2.0, 2.0], [1.0, 2.5]])[..., None, None])
            self.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture
def space() -> PruningSpace:
    return PruningSpace(Three().eval(), torch.randn(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        # |w|: 3, 4, 3.5
        ("l1", (1, 2)),
        # Lengths: 3, 2.83, 2.69
        ("l2", (0, 1)),
        # |scale|: 0.5, 2, 1
        ("bn", (1, 2)),
        # Distances: 0-1 2.24, 0-2 3.20, 1-2 1.12: sums 5.44, 3.35, 4.32
        ("fpgm", (0, 2)),
    ],
)
def test_magnitudes(space: PruningSpace, method: str, kept: tuple[int, ...]) -> None:
    assert space.plan({"conv": 2}, method).keep["conv"] == kept


def test_scores_are_scaled_to_mean_one(space: PruningSpace) -> None:
    np.testing.assert_allclose(space.rank("l1").scores[0], np.array([3, 4, 3.5]) / 3.5)


def test_taylor_follows_the_gradient_and_leaves_the_model_alone(space: PruningSpace) -> None:
    with torch.no_grad():
        # The second channel reaches no output.
        space.model.head.weight.copy_(torch.tensor([[1.0, 0.0, 1.0], [-1.0, 0.0, 2.0]]))
        space.model.norm.bias.fill_(0.3)
    data = [(torch.randn(8, 2, 4, 4), torch.arange(8) % 2)]
    space.model.train()
    with torch.no_grad():
        ranking = space.rank("taylor", data)
    assert ranking.scores[0][1] == pytest.approx(0, abs=1e-7)
    assert ranking.kept(0, 2) == (0, 2)
    assert space.model.training
    assert all(p.grad is None for p in space.model.parameters())
    assert torch.equal(space.model.norm.running_mean, torch.zeros(3))
    by_loss = space.rank("taylor", lambda model: nn.functional.cross_entropy(model(data[0][0]), data[0][1]))
    np.testing.assert_allclose(by_loss.scores[0], ranking.scores[0])


def test_random_is_seeded(space: PruningSpace) -> None:
    plans = {seed: space.plan({"conv": 1}, "random", seed=seed).keep["conv"] for seed in range(20)}
    assert plans == {seed: space.plan({"conv": 1}, "random", seed=seed).keep["conv"] for seed in range(20)}
    assert len(set(plans.values())) == 3


def test_a_users_function(space: PruningSpace) -> None:
    def smallest_first(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
        assert group.members == ("conv",)
        return -weights["conv.weight"].flatten(1).abs().sum(1)

    assert space.plan({"conv": 1}, smallest_first).keep["conv"] == (0,)


def test_one_ranking_serves_many_plans_and_ties_keep_the_first(space: PruningSpace) -> None:
    with torch.no_grad():
        space.model.conv.weight.fill_(1.0)
    ranking = space.rank("l1")
    assert [space.plan([k], ranking).keep["conv"] for k in (1, 2, 3)] == [(0,), (0, 1), (0, 1, 2)]


def test_importance_sees_the_weights_of_the_moment(space: PruningSpace) -> None:
    with torch.no_grad():
        space.model.conv.weight[0] = 100.0
    assert space.plan({"conv": 1}).keep["conv"] == (0,)


def test_bad_importance(space: PruningSpace) -> None:
    with pytest.raises(CompressorError, match="no importance 'l3'"):
        space.rank("l3")
    with pytest.raises(CompressorError, match="needs data"):
        space.rank("taylor")
    with pytest.raises(CompressorError, match="no batch"):
        space.rank("taylor", [])
    with pytest.raises(CompressorError, match="pairs of inputs"):
        space.rank("taylor", [torch.randn(2)])
    with pytest.raises(CompressorError, match=r"gave shape \(2,\).*3 units"):
        space.rank(lambda group, weights: [1, 2])
    with torch.no_grad():
        space.model.conv.weight[0] = float("nan")
    with pytest.raises(CompressorError, match="not finite"):
        space.rank("l1")
