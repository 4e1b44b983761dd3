"""Detectors with the constructs of YOLO networks: groups, slicing, compensation."""

from __future__ import annotations

import pytest
import torch

from compressor.pruning.checks import compare, confirm_macs
from compressor.pruning.compensate import compensate
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import assert_is_dense_with_zeros, filled
from tests.yolo import Yolo

SHAPE = (1, 3, 32, 48)
GROUPS = {
    "layers.0.conv": (8, 1), "layers.1.conv": (16, 1),
    "layers.2.enter.conv": (8, 2), "layers.2.blocks.0.one.conv": (8, 1), "layers.2.leave.conv": (16, 1),
    "layers.3.conv": (32, 1),
    "layers.4.enter.conv": (16, 2), "layers.4.blocks.0.one.conv": (16, 1), "layers.4.leave.conv": (32, 1),
    "layers.5.enter.conv": (16, 1), "layers.5.leave.conv": (32, 1),
    "layers.8.enter.conv": (8, 2), "layers.8.blocks.0.one.conv": (8, 1), "layers.8.blocks.0.two.conv": (8, 1),
    "layers.8.leave.conv": (16, 1), "layers.9.conv": (16, 1),
    "layers.11.enter.conv": (16, 2), "layers.11.blocks.0.one.conv": (16, 1), "layers.11.blocks.0.two.conv": (16, 1),
    "layers.11.leave.conv": (32, 1),
    "layers.12.sides.0.0.conv": (16, 1), "layers.12.sides.1.0.conv": (16, 1),
    "layers.12.kinds.0.0.conv": (12, 1), "layers.12.kinds.1.0.conv": (12, 1),
}  # fmt: skip
"""Width and channels of a unit; both halves of a split lose the same channels."""


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(24, *SHAPE[1:], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ran", [False, True])
def test_halves_lose_the_same_channels_and_the_heads_outputs_stay(ran: bool) -> None:
    network, example = filled(Yolo()), torch.randn(SHAPE)
    if ran:
        network(example)  # its anchors are kept, and computed again for other channels
    space = PruningSpace(network, example)
    assert {group.name: (group.width, group.unit) for group in space.groups} == GROUPS
    outputs = ("sides.0.1", "sides.1.1", "kinds.0.1", "kinds.1.1", "expected.conv")
    assert {part.name for part in space.skipped} == {f"layers.12.{name}" for name in outputs}
    plan = space.uniform(0.5, "random")
    small = space.apply(plan)
    assert_is_dense_with_zeros(small, space, plan, example, rtol=1e-3, atol=1e-3)
    assert confirm_macs(space, space.widths(plan.widths), small).confirmed


def test_groups_are_those_of_torch_pruning() -> None:
    """Its graph cannot trace halves of a split that are joined again; with two convolutions it can."""
    example = torch.randn(SHAPE)
    space = PruningSpace(filled(Yolo(form="apart")), example)
    found = compare(space, space.uniform(0.5, "random"))
    assert (found.failed, found.other) == ("", {})
    assert len(found.agreed) == len(space.groups) == 28
    space = PruningSpace(filled(Yolo()), example)
    assert "cannot trace" in compare(space, space.uniform(0.5)).failed


def test_maps_that_are_outputs_stay_dense() -> None:
    network, example = filled(Yolo(raw=True)), torch.randn(SHAPE)
    space = PruningSpace(network, example)
    small = space.apply(space.uniform(0.5))
    (_, parts), (_, dense) = small(example), network(example)
    assert [each.shape for each in parts["maps"]] == [each.shape for each in dense["maps"]]


@pytest.mark.parametrize(
    ("method", "ran"), [("layers", False), ("layers", True), ("quick", True), ("moments", True)]
)
def test_a_detector_that_keeps_its_anchors_is_compensated(pictures: torch.Tensor, method: str, ran: bool) -> None:
    network = filled(Yolo())
    if ran:
        network(pictures[:1])
    space = PruningSpace(network, pictures[:1])
    found = compensate(space, space.uniform(0.6), [pictures], method)
    assert found.refitted
    assert found.error < found.error_cut
