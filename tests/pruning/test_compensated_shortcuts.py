"""Compensation of residual sums whose shortcut has fewer elements than the layer's output, and is repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.pruning.compensate import compensate
from compressor.pruning.least_squares import Samples
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace

SHORTCUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "(N, C, 1, 1)": lambda t: t[:, :, None, None],
    "(N, 1, 1, 1)": lambda t: 0.1 * t[:, :1, None, None],
    "(C, 1, 1)": lambda t: t.mean(0)[:, None, None],
    "(1, C, 1, 1)": lambda t: t.mean(0)[None, :, None, None],
    "()": lambda t: 0.1 * t.mean(),
}
"""Shape of a shortcut -> how it is computed from one vector per image."""


class Conditioned(nn.Module):
    """conv a: 3->6, whose channel 5 is 2 * channel 0 - channel 3; conv b reads them, and a shortcut is added."""

    def __init__(self, shortcut: Callable[[Tensor], Tensor], act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.act, self.shortcut = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), act, shortcut
        with torch.no_grad():
            for each in (self.a.weight, self.a.bias):
                each[5] = 2 * each[0] - each[3]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.act(self.b(self.a(x)) + self.shortcut(t))


class Rows(nn.Module):
    """As `Conditioned`, of linear layers: (N, T, C) + (N, 1, C), or without the axis T."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 6), nn.Linear(6, 4), act
        with torch.no_grad():
            for each in (self.a.weight, self.a.bias):
                each[5] = 2 * each[0] - each[3]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.act(self.b(self.a(x)) + (t[:, None] if x.dim() == 3 else t))


def _check(model: nn.Module, x: Tensor, t: Tensor, method: str = "layers") -> None:
    """The layer b takes the removed channel over whole, as it does without a shortcut."""
    space = PruningSpace(model.eval(), (x[:1], t[:1]))
    found = compensate(space, ChannelPlan({"a": (0, 1, 2, 3, 4)}), [(x, t)], method)
    weight = model.b.weight
    expected = weight[:, :5].clone()
    expected[:, 0] += 2 * weight[:, 5]
    expected[:, 3] -= weight[:, 5]
    assert found.error_cut > 1e-3
    assert list(found.refitted) == ["b"]
    torch.testing.assert_close(found.network.b.weight, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.network.b.bias, model.b.bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [256, 64, 10], ids=lambda count: f"{count} images")  # chunks of 32, 8 and 1
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=["relu", "silu"])
@pytest.mark.parametrize("shape", SHORTCUTS)
def test_a_shortcut_that_is_repeated(shape: str, act: nn.Module, images: int) -> None:
    torch.manual_seed(0)
    model = Conditioned(SHORTCUTS[shape], act)
    method = "quick" if images == 256 else "layers"  # quick: at 27 of the 36 positions
    _check(model, torch.randn(images, 3, 10, 10), 2 * torch.randn(images, 4), method)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=["relu", "silu"])
@pytest.mark.parametrize("shape", [(64, 9, 8), (16, 9, 8), (200, 8), (15, 8)])
def test_a_vector_for_all_rows_of_an_image(shape: tuple[int, ...], act: nn.Module) -> None:
    torch.manual_seed(0)
    _check(Rows(act), torch.randn(*shape), 2 * torch.randn(shape[0], 4))


def test_offsets_of_parts_with_one_sample_are_all_kept() -> None:
    parts = [torch.full((1, 1, 2), float(number)) for number in range(3)]
    assert Samples(parts, parts, parts).joined()[2].tolist() == [[[0, 0], [1, 1], [2, 2]]]
    wide = [torch.zeros(1, 4, 2) for _ in range(3)]
    alike = [torch.ones(1, 1, 2) for _ in range(3)]
    assert Samples(wide, wide, alike).joined()[2].tolist() == [[[1, 1]]]
