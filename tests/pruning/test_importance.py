"""Which channels each importance keeps, by hand on a network of three filters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.groups import Group
from compressor.pruning.moments import DenseMoments
from compressor.pruning.reconstruction import STRENGTH, Reader
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import Attentive, UNet, Zoo, filled


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
    with pytest.raises(CompressorError, match="needs data"):
        space.rank("reconstruction")
    with pytest.raises(CompressorError, match=r"gave shape \(2,\).*3 units"):
        space.rank(lambda group, weights: [1, 2])
    with torch.no_grad():
        space.model.conv.weight[0] = float("nan")
    with pytest.raises(CompressorError, match="not finite"):
        space.rank("l1")


class Doubled(nn.Module):
    """Channels 0 to 2 are the input's, channel 3 is channel 0 again; one output reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 1, 1)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])[..., None, None])
            self.b.weight.copy_(torch.tensor([1.0, 2.0, 0.5, 0.1])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_reconstruction_by_hand() -> None:
    space = PruningSpace(Doubled().eval(), torch.zeros(1, 3, 8, 8))
    data = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    ranking = space.rank("reconstruction", data)
    # Channel 0 replaces channel 3 at no cost; then squared weights are 1.21, 4 and 0.25, and all variances 1.
    assert ranking.scores[0].tolist() == [2, 3, 1, 0]
    assert not ranking.by_l1
    shared = space.rank("reconstruction", DenseMoments(space, data))
    assert shared.scores[0].tolist() == [2, 3, 1, 0]


def test_losses_of_a_reader_are_those_of_least_squares() -> None:
    random = torch.Generator().manual_seed(0)
    root, weight = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((10, 30), (10, 3)))
    moments = root @ root.T / 30
    matrix = moments + STRENGTH * moments.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    inputs = torch.arange(8).reshape(4, 2)  # of four units; the last two inputs are of another group

    def error(gone: list[int]) -> float:
        """Least squared error of outputs without some inputs."""
        kept = [each for each in range(10) if each not in gone]
        refitted = torch.zeros_like(weight)
        refitted[kept] = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight)
        return float(((weight - refitted) * (matrix @ (weight - refitted))).sum())

    first = inputs.flatten()
    reader = Reader(torch.linalg.inv(matrix)[first][:, first], weight[first], 4)
    torch.testing.assert_close(
        reader.losses(), torch.tensor([error(pair.tolist()) for pair in inputs], dtype=torch.float64)
    )
    reader.remove(1)
    assert float(reader.losses()[3]) == pytest.approx(error([2, 3, 6, 7]) - error([2, 3]))
    reader.remove(3)
    reader.keep(torch.tensor([0, 2]))
    assert float(reader.losses()[0]) == pytest.approx(error([0, 1, 2, 3, 6, 7]) - error([2, 3, 6, 7]))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Zoo(), (3, 32, 32)), (UNet(), (3, 16, 16)), (Attentive(), (10, 24))],
    ids=["zoo", "unet", "attention"],
)
def test_reconstruction_ranks_every_group_or_names_it(model: nn.Module, shape: tuple[int, ...]) -> None:
    space = PruningSpace(filled(model), torch.zeros(1, *shape))
    ranking = space.rank("reconstruction", [torch.randn(24, *shape)])
    by_l1 = [group.index for group in space.groups if group.name in ranking.by_l1]
    assert len(by_l1) <= len(space.groups) // 2
    l1 = space.rank("l1")
    for group, scores in enumerate(ranking.scores):
        assert sorted(scores) == list(range(len(scores))) if group not in by_l1 else (scores == l1.scores[group]).all()


def test_reconstruction_through_a_flattened_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).eval()
    space = PruningSpace(model, torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        model[3].weight[:, 72:108] *= 0.01  # channel 2
    assert space.rank("reconstruction", [torch.randn(64, 3, 8, 8)]).scores[0][2] == 0
