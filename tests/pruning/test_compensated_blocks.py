"""Compensation of networks without some blocks: which layers are refitted, to what, and what that brings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.pruning.absence import Absence
from compressor.pruning.calibration import QUICK, Reference
from compressor.pruning.compensate import DenseMoments, compensate
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import filled


class Linear(nn.Module):
    """x + conv(x), which the layer before it can take over whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Normed(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), as in a ResNet."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.second = nn.Conv2d(8, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.two(F.relu(self.first(self.one(x)))))
        return F.relu(x + y)


def linear() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), Linear(), Linear(), nn.Conv2d(6, 4, 1))


def normed() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), *(Normed() for _ in range(4)), *head)


def _space(build: Callable[[], nn.Module]) -> tuple[PruningSpace, Tensor]:
    torch.manual_seed(0)
    return PruningSpace(filled(build()), torch.randn(1, 3, 10, 10)), torch.randn(96, 3, 10, 10)


def test_a_linear_block_is_taken_over_whole() -> None:
    """The layer before two removed blocks is fitted to the output of the second, which it can compute exactly."""
    space, images = _space(linear)
    plan = space.plan({}, removed=["1", "2"])
    found = compensate(space, plan, [images])
    assert found.error_cut > 0.05
    assert found.error < 1e-6 * found.error_cut
    assert "0" in found.refitted
    torch.testing.assert_close(found.network(images), space.model(images), rtol=1e-3, atol=1e-3)


def test_ends_and_places() -> None:
    space, images = _space(normed)
    reference = Reference(space, [images], effort=QUICK)
    calls = reference.recording.calls
    whole = Absence.of(reference, space.dense())
    assert whole.order == reference.order
    assert whole.names == reference.names
    assert whole.ends == {}
    assert whole.places == {number: number for number in range(len(calls))}
    absence = Absence.of(reference, space.plan({}, removed=["3", "4"]))
    assert len(absence.names) == len(whole.names) - 2 * 7  # two each of conv, norm; two relu, one addition
    (end, goal), = absence.ends.items()
    assert [calls[each].name for each in (end, goal)] == ["add", "add"]
    assert goal == [number for number, call in enumerate(calls) if call.name == "add"][2]
    by_layer = {site.layer: site for site in reference.sites}
    assert absence.end(by_layer["2.two"]) == goal
    assert absence.touches(by_layer["2.two"])
    assert not absence.touches(by_layer["2.one"])
    assert absence.touches(by_layer["5.one"])
    assert by_layer["3.one"].number not in absence.places


class Activated(nn.Module):
    """The input of two blocks x + conv(x) comes from an activation, as in a YOLO."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), act
        self.one, self.two, self.after = Linear(), Linear(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.two(self.one(self.act(self.norm(self.stem(x))))))


CUT = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)]
OTHERS = [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(), nn.PReLU(), nn.Sigmoid(), nn.Tanh()]
IN_PLACE = [nn.SiLU(inplace=True), nn.Hardswish(inplace=True), nn.LeakyReLU(0.1, inplace=True)]


@pytest.mark.parametrize("act", [*CUT, *OTHERS, *IN_PLACE], ids=repr)
def test_a_goal_behind_an_activation(act: nn.Module) -> None:
    """Only ReLU, ReLU6 and Hardtanh may lie between a layer and its goal; else the layer after makes up for them."""
    space, images = _space(lambda: Activated(act))
    plan = space.plan({}, removed=["one", "two"])
    reference = Reference(space, [images], effort=QUICK)
    absence = Absence.of(reference, plan)
    calls = reference.recording.calls
    if act in CUT:
        (end, goal), = absence.ends.items()
        assert calls[end].name == "batch_norm"
        assert goal == [number for number, call in enumerate(calls) if call.name == "add"][1]
        return
    assert absence.ends == {}
    found = compensate(space, plan, [images])
    assert list(found.refitted) == ["after"]  # linear blocks and a linear layer: nothing is lost
    assert found.error < 1e-6 * found.error_cut
    torch.testing.assert_close(found.network.stem.weight, space.model.stem.weight)


@pytest.mark.parametrize("method", ["layers", "quick"])
def test_removed_blocks_and_channels_together(method: str) -> None:
    space, images = _space(normed)
    plan = space.plan({"0": 9, "2.one": 5, "5.one": 6}, removed=["3", "4"])
    found = compensate(space, plan, [images], method)
    assert found.error < 0.6 * found.error_cut
    assert set(found.refitted) >= {"2.two", "5.two"}
    assert not any(name.startswith(("3", "4")) for name in [*found.refitted, *found.left])
    assert [key for key in found.network.state_dict() if key.startswith(("3.", "4."))] == []
    moments = DenseMoments(space, [images])  # does without the blocks, and refits what lost channels
    assert moments.apply(plan)(images).shape == (96, 4)


def test_plans_without_blocks_are_compensated_as_before() -> None:
    space, images = _space(normed)
    plan = space.plan({"0": 9, "2.one": 5})
    shared = Reference(space, [images], effort=QUICK)
    first = compensate(space, plan, shared).network
    compensate(space, ChannelPlan(plan.keep, ("3",)), shared)  # shares the reference, and leaves it as it was
    second = compensate(space, plan, shared).network
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
