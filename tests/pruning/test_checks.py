"""torch-pruning and fvcore check the slim network; faults that are put in on purpose are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.pruning import checks, slicer
from compressor.pruning import space as space_module
from compressor.pruning.checks import EXACT, Disagreement, compare, confirm_cut, confirm_macs
from compressor.pruning.counts import MultiplyAdds
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import Attentive, UNet, Zoo, filled
from tests.pruning.test_blocks import Traps
from tests.pruning.test_space import Grouped

Slim = tuple[PruningSpace, ChannelPlan, nn.Module]


def slim_of(model: nn.Module, *shape: int) -> Slim:
    space = PruningSpace(filled(model), torch.zeros(1, *shape))
    plan = space.plan(space.random_widths(np.random.default_rng(0)), "random")
    return space, plan, space.apply(plan)


@pytest.fixture
def unet() -> Slim:
    return slim_of(UNet(), 3, 16, 16)


def test_what_torch_pruning_can_express_is_confirmed(unet: Slim) -> None:
    space, plan, slim = unet
    before = {name: tensor.clone() for name, tensor in space.model.state_dict().items()}
    with torch.no_grad():  # training since does not matter, nor that its mode is another
        slim.train().out.weight.add_(1)
        found = confirm_cut(space, plan, slim)
    assert (found.confirmed, found.words) == (
        True,
        "confirmed by torch-pruning: 54 tensors, 11 groups of channels",
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in space.model.state_dict().items())
    assert slim.training
    counted = confirm_macs(space, space.widths(plan.widths), slim)
    assert counted.confirmed
    assert counted.words.startswith(
        f"confirmed by fvcore: {space.macs(space.widths(plan.widths)):,} multiply-adds; "
    )
    assert "max_pool2d (2)" in counted.words
    assert slim.training


def test_grouped_convolutions_that_lose_whole_groups_are_confirmed() -> None:
    space, plan, slim = slim_of(Grouped(), 3, 10, 10)
    assert slim.rows.groups < 8
    assert confirm_cut(space, plan, slim).confirmed
    words = confirm_macs(space, space.widths(plan.widths), slim).words
    assert "it does not count _convolution_mode (1)" in words  # padding="same"


def test_what_its_graph_cannot_express_is_named_and_the_rest_compared() -> None:
    space, plan, slim = slim_of(Zoo(), 3, 32, 32)
    found = confirm_cut(space, plan, slim)
    assert found.confirmed is None
    assert found.words.startswith("8 of 9 groups of channels confirmed by torch-pruning; not checked: ")
    assert "grouped convolution, reshape, transpose, view" in found.words
    assert "such as gate: it leaves channels in axis 1 of 'grouped.weight'" in found.words
    attentive = slim_of(Attentive(), 10, 24)
    found_there = compare(*attentive[:2])
    assert list(found_there.other) == ["embed", "attention"]
    assert "it also removes" in found_there.coarser["embed"]


class Forgetful(nn.Module):
    """Autograd does not see its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x)
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """Its output is a number that no graph tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x)).detach()


def test_what_its_graph_cannot_trace_is_not_checked() -> None:
    found = confirm_cut(*slim_of(Forgetful(), 3, 8, 8))
    assert found.confirmed is None
    assert found.words == (
        "not checked: its graph cannot express 1 group (1 that it cannot remove), such as conv: its graph has no node "
        "that makes axis 0 of 'conv.weight'"
    )
    whole = confirm_cut(*slim_of(Plain(), 3, 8, 8))
    assert whole.confirmed is None
    assert whole.words.startswith("not checked: its graph")


def test_without_removed_channels_there_is_nothing_to_confirm() -> None:
    torch.manual_seed(0)
    space = PruningSpace(filled(Traps()), torch.randn(1, 3, 12, 12))
    for removed, words in (
        ((), "no channels were removed"),
        (("plain",), "no channels were removed; not checked: the removal of 1 block, which torch-pruning cannot do"),
        (
            ("plain", "active"),
            "no channels were removed; not checked: the removal of 2 blocks, which torch-pruning cannot do",
        ),
    ):
        plan = space.plan({}, removed=removed)
        assert confirm_cut(space, plan, space.apply(plan)).words == words


def test_a_single_group_is_no_plural() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    space = PruningSpace(filled(model), torch.zeros(1, 3, 4, 4))
    plan = space.plan({"0": 5})
    assert confirm_cut(space, plan, space.apply(plan)).words.endswith(" tensors, 1 group of channels")


class InTraining(nn.Module):
    """A second head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.spare = nn.Conv2d(3, 8, 1), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(x) + self.spare(x) if self.training else self.head(x)


def test_layers_that_only_training_uses_are_named() -> None:
    space, plan, slim = slim_of(InTraining(), 3, 8, 8)
    assert slim.spare.in_features < 8
    assert confirm_cut(space, plan, slim).words == (
        "1 of 1 group of channels confirmed by torch-pruning; not checked: its graph does not reach 1 tensor, such "
        "as spare.weight"
    )


def _mirrored(tensor: Tensor, kept: Sequence[slicer.Cut]) -> Tensor:
    """Keeps as many channels, but those at the other end."""
    turned = [(axis, (tensor.shape[axis] - 1 - index).flip(0), run) for axis, index, run in kept]
    return slicer.cut(tensor, turned)


def _last_swapped(tensor: Tensor, kept: Sequence[slicer.Cut]) -> Tensor:
    """Keeps the right channels of vectors, the last two of them in the wrong order."""
    made = slicer.cut(tensor, kept)
    return (
        made
        if made.dim() != 1 or len(made) < 2 or not kept
        else torch.cat([made[:-2], made[-1:], made[-2:-1]])
    )


@pytest.mark.parametrize("broken", [_mirrored, _last_swapped])
def test_slicing_that_is_wrong_by_an_index_is_found(
    unet: Slim, broken: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, plan, _ = unet
    monkeypatch.setattr(space_module, "cut", broken)
    slim = space.apply(plan)  # the same shapes, and a network that runs
    with pytest.raises(Disagreement, match="torch-pruning keeps other elements of '") as caught:
        confirm_cut(space, plan, slim)
    assert caught.value.exit_code == 1


def test_a_layout_that_is_off_by_one_is_found(unet: Slim, monkeypatch: pytest.MonkeyPatch) -> None:
    space, plan, _ = unet
    place = dict(space.slicer.axes["join2.0.weight"])[1]
    layout = space.slicer.layouts[place]
    moved = slicer.Layout(np.roll(layout.group, 1), np.roll(layout.unit, 1), layout.groups, layout.run)
    layouts = [moved if each == place else kept for each, kept in enumerate(space.slicer.layouts)]
    monkeypatch.setattr(space.slicer, "layouts", layouts)
    with pytest.raises(Disagreement, match=r"disagrees with the slim network about the channels of '.*join2"):
        confirm_cut(space, plan, space.apply(plan))


def test_a_delivered_network_of_another_plan_is_found(unet: Slim) -> None:
    space, plan, _ = unet
    with pytest.raises(
        Disagreement, match=r"Tensor 'down1\.0\.bias|Tensor 'down1\.0\.weight' of the slim network has shape"
    ):
        confirm_cut(space, plan, space.apply(space.dense()))


def test_a_wrong_count_is_found_in_all_and_by_layer(unet: Slim, monkeypatch: pytest.MonkeyPatch) -> None:
    space, plan, slim = unet
    widths = space.widths(plan.widths)
    right: Any = MultiplyAdds.layers

    def moved(self: MultiplyAdds, each: Any) -> Any:
        found = right(self, each).copy()
        found[:, 0] += 100
        found[:, 1] -= 100  # the sum is right
        return found

    with monkeypatch.context() as patch:
        patch.setattr(MultiplyAdds, "layers", moved)
        with pytest.raises(Disagreement, match=r"layer 'down1\.0', the pruning space says"):
            confirm_macs(space, widths, slim)
    monkeypatch.setattr(MultiplyAdds, "__call__", lambda self, each: np.full(len(each), 123))
    with pytest.raises(Disagreement, match="the pruning space says 123"):
        confirm_macs(space, widths, slim)


def test_exact_operations_have_rules() -> None:
    from compressor.pruning import rules  # noqa: F401
    from compressor.pruning.registry import _RULES

    assert set(_RULES) >= EXACT


def test_where_its_network_does_not_run_its_graph_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortcuts that are padded with zero channels: it adds tensors of other sizes."""
    from compressor.models import create_model

    monkeypatch.setattr(checks, "obstacles", lambda *_: ())
    found = confirm_cut(*slim_of(create_model("cifar_resnet20", 10), 3, 16, 16))
    assert found.confirmed is None
    assert found.words.startswith("9 of 12 groups of channels confirmed by torch-pruning; not checked: ")
