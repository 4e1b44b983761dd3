"""Random plans: the slim network is the masked dense one, and costs what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import (
    Attentive,
    RepVGG,
    Tied,
    UNet,
    Zoo,
    assert_is_dense_with_zeros,
    filled,
    fvcore_macs,
)

EXAMPLES = 5  # other ones in every run


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return build


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "zoo": (Zoo, (1, 3, 32, 32)),
    "unet": (UNet, (1, 3, 16, 16)),
    "attentive": (Attentive, (1, 10, 24)),
    "tied": (Tied, (1, 8)),
    "repvgg": (RepVGG, (1, 3, 16, 16)),
    "resnet18": (_torchvision("resnet18"), (1, 3, 32, 32)),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), (1, 3, 32, 32)),
    "shufflenet_v2_x0_5": (_torchvision("shufflenet_v2_x0_5"), (1, 3, 32, 32)),
    "squeezenet1_1": (_torchvision("squeezenet1_1"), (1, 3, 48, 48)),
}
#: Groups that a layer normalisation or a softmax over channels sees: there a dropped channel is not a zero.
NOT_LINEAR = {"zoo": ("down",)}


@cache
def _space(name: str) -> tuple[PruningSpace, Tensor]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = filled(build().double())
    example = torch.randn(shape, dtype=torch.float64)
    return PruningSpace(model, example), example


def _random_plan(space: PruningSpace, seed: int, dense: tuple[str, ...] = ()) -> ChannelPlan:
    widths = space.random_widths(np.random.default_rng(seed))
    for group in space.groups:
        if group.name in dense:
            widths[group.index] = group.width
    return space.plan(widths, "random", seed=seed)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_slim_equals_dense_with_dropped_channels_masked(name: str, seed: int) -> None:
    space, example = _space(name)
    plan = _random_plan(space, seed, NOT_LINEAR.get(name, ()))
    assert_is_dense_with_zeros(space.apply(plan), space, plan, example, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_costs_equal_fvcore_on_the_built_network(name: str, seed: int) -> None:
    space, example = _space(name)
    plan = _random_plan(space, seed)
    small = space.apply(plan)
    widths = space.widths(plan.widths)
    assert space.macs(widths) == fvcore_macs(small, example)
    assert space.params(widths) == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_layers_tell_the_built_shapes(name: str, seed: int) -> None:
    space, _ = _space(name)
    plan = _random_plan(space, seed)
    widths = space.widths(plan.widths)
    modules = dict(space.apply(plan).named_modules())
    for layer in space.layers:
        module = modules.get(layer.name)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert (int(layer.in_channels(widths)), int(layer.out_channels(widths))) == (
                module.in_channels,
                module.out_channels,
            )
            assert layer.kernel == module.kernel_size
        elif isinstance(module, nn.Linear):
            assert (int(layer.in_channels(widths)), int(layer.out_channels(widths))) == (
                module.in_features,
                module.out_features,
            )


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 1.0))
def test_rounding_is_legal_and_nearest(name: str, seed: int, share: float) -> None:
    space, _ = _space(name)
    wanted = np.random.default_rng(seed).uniform(0, share, len(space.groups)) * space.dense_widths
    rounded = space.round(wanted)
    assert (space.widths(rounded) == rounded).all()
    for group in space.groups:
        legal = space.choices(group.index)
        assert abs(rounded[group.index] - wanted[group.index]) == np.abs(legal - wanted[group.index]).min()


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_apply_is_deterministic_and_keeps_old_order(name: str, seed: int) -> None:
    space, _ = _space(name)
    plan = _random_plan(space, seed)
    first, second = space.apply(plan), space.apply(plan)
    for (key, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    weights = dict(space.model.named_parameters())
    for key, axes in space.indices(plan).items():
        for axis, index in axes.items():
            assert (index.diff() > 0).all()
            assert (
                index.numel()
                == dict(first.named_parameters() if key in weights else first.named_buffers())[key].shape[
                    axis
                ]
            )


@pytest.mark.parametrize("name", NETWORKS)
def test_keeping_everything_is_bit_identical_and_the_dense_model_untouched(name: str) -> None:
    space, example = _space(name)
    before = {key: value.clone() for key, value in space.model.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(space.apply(space.dense())(example), space.model(example))
    space.apply(space.smallest())
    for key, value in space.model.state_dict().items():
        assert torch.equal(before[key], value), key
    assert all(parameter.grad is None for parameter in space.model.parameters())
