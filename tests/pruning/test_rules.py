"""What single operations mean for channels, on networks of a few layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.pruning.space import PruningSpace
from tests.pruning.networks import assert_is_dense_with_zeros, filled, fvcore_macs

Ending = Callable[[Tensor], object]


class Segmenter(nn.Module):
    """Two convolutions and a head of 10 classes, whose maps of 8x8 pixels go through `end`."""

    def __init__(self, end: Ending) -> None:
        super().__init__()
        self.end = end
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> object:
        return self.end(self.head(self.second(self.first(x).relu()).relu()))


def _score_and_label(y: Tensor) -> Tensor:
    score, label = y.softmax(1).max(1)
    return torch.stack([score, label.float()], 1)


LABELS: dict[str, tuple[str, Ending]] = {
    "argmax": ("argmax", lambda y: y.argmax(1)),
    "of a vector": ("argmax", lambda y: y.mean((2, 3)).argmax(-1)),
    "converted": ("argmin", lambda y: torch.argmin(y, dim=1, keepdim=True).to(torch.uint8)),
    "max": ("max", lambda y: y.softmax(1).max(1)),
    "median": ("median", lambda y: torch.median(y, dim=1)[1]),
    "among scores": ("max", _score_and_label),
}


@pytest.mark.parametrize("case", LABELS)
def test_classes_whose_numbers_are_returned_stay(case: str) -> None:
    operation, end = LABELS[case]
    space = PruningSpace(Segmenter(end).eval(), torch.zeros(1, 3, 8, 8))
    assert [group.name for group in space.groups] == ["first", "second"]
    assert [(s.name, s.reason) for s in space.skipped] == [("head", f"the number of a channel is used ({operation})")]
    assert space.outputs == 10
    assert space.apply(space.uniform(0.5)).head.weight.shape == (10, 8, 1, 1)


def test_labels_of_a_pruned_network_are_those_of_the_dense_one_with_zeros() -> None:
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    space = PruningSpace(filled(Segmenter(lambda y: y.argmax(1))), example)
    plan = space.uniform(0.5)
    assert_is_dense_with_zeros(space.apply(plan), space, plan, example, rtol=0, atol=0)


class Attending(nn.Module):
    """Weighs pixels by the mean and the largest value over channels (CBAM)."""

    def __init__(self, largest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.largest = largest
        self.first, self.weigh = nn.Conv2d(3, 16, 3), nn.Conv2d(2, 1, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        seen = torch.cat([x.mean(1, keepdim=True), self.largest(x)], 1)
        return self.head((x * self.weigh(seen).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize(
    "largest",
    [
        lambda x: x.max(1, keepdim=True)[0],
        lambda x: torch.max(x, dim=1)[0].unsqueeze(1),
        lambda x: torch.amax(x, 1, keepdim=True),
    ],
)
def test_channels_stay_prunable_where_only_the_largest_value_is_used(largest: Callable[[Tensor], Tensor]) -> None:
    space = PruningSpace(Attending(largest).eval(), torch.zeros(1, 3, 8, 8))
    assert [(group.name, group.width) for group in space.groups] == [("first", 16)]
    assert space.outputs == 4


def test_channels_stay_where_the_number_of_the_largest_is_used_inside() -> None:
    model = Attending(lambda x: x.max(1, keepdim=True)[1].float()).eval()
    space = PruningSpace(model, torch.zeros(1, 3, 8, 8))
    assert not space.groups
    assert {s.name: s.reason for s in space.skipped}["first"] == "the number of a channel is used (max)"
    assert space.outputs == 4


class Interleaved(nn.Module):
    """Puts the channels of a convolution into the order that `mix` gives."""

    def __init__(self, mix: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.mix = mix
        self.first, self.second = nn.Conv2d(3, width, 3), nn.LazyConv2d(8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.mix(self.first(x).relu())).relu().mean((2, 3)))


def _interleaved(mix: Callable[[Tensor], Tensor], width: int) -> tuple[PruningSpace, Tensor]:
    example = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = Interleaved(mix, width)
    model(example)
    return PruningSpace(filled(model), example), example


@pytest.mark.parametrize("width", [4, 6, 8, 14, 16])
def test_channels_that_are_taken_in_steps_are_removed_step_by_step(width: int) -> None:
    space, example = _interleaved(lambda y: torch.cat([y[:, ::2], y[:, 1::2]], 1), width)
    group = space.groups[0]
    assert (group.name, group.width, group.unit) == ("first", width // 2, 2)
    for seed in range(5):
        plan = space.plan(space.random_widths(np.random.default_rng(seed)), "random", seed=seed)
        assert_is_dense_with_zeros(space.apply(plan), space, plan, example, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", [lambda y: y[:, 2::2], lambda y: y[:, :6:2], lambda y: y[:, ::3]])
def test_channels_that_are_taken_in_other_steps_stay(mix: Callable[[Tensor], Tensor]) -> None:
    space, _ = _interleaved(mix, 8)
    assert [group.name for group in space.groups] == ["second"]
    assert {s.name: s.reason for s in space.skipped}["first"] == "every few of its channels are taken by number"


class Squeezing(nn.Module):
    """Squeeze-and-excitation of 8 channels, whose pooled maps lose their last axes by `drop`."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.drop = drop
        self.first, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        gate = self.gate(self.drop(x.mean((2, 3), keepdim=True))).sigmoid()
        return self.head((x * gate.reshape(1, -1, 1, 1)).mean((2, 3)))


def test_a_squeeze_that_would_drop_a_single_channel_keeps_all() -> None:
    example = torch.zeros(1, 3, 8, 8)
    assert not PruningSpace(Squeezing(lambda y: y.squeeze()).eval(), example).groups
    space = PruningSpace(Squeezing(lambda y: y.squeeze(3).squeeze(2)).eval(), example)
    assert [(group.name, group.width) for group in space.groups] == [("first", 8)]
    assert space.apply(space.smallest())(example).shape == (1, 4)


class Unfollowed(nn.Module):
    """Layers whose channels are not followed: 20 words of 32 channels to 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(100, 32), nn.Conv1d(32, 16, 3)
        self.memory, self.cell, self.pair = nn.LSTM(16, 12), nn.GRUCell(12, 12), nn.Bilinear(12, 12, 10)
        self.hidden, self.head = nn.Linear(10, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.memory(self.mix(self.words(x).transpose(1, 2)).permute(2, 0, 1))[0][-1]
        x = self.cell(x)
        return self.head(self.hidden(self.pair(x, x)).relu())


def test_layers_that_are_not_followed_are_named() -> None:
    space = PruningSpace(Unfollowed().eval(), torch.zeros(1, 20, dtype=torch.int64))
    assert [group.name for group in space.groups] == ["hidden"]
    unknown = "the operation '{}' is not known to keep channels apart (in {})"
    assert {s.name: s.reason for s in space.skipped} == {
        "words": "it is looked up by an index (in words)",
        "mix": unknown.format("lstm", "memory"),
        "memory": unknown.format("lstm", "memory"),
        "cell": unknown.format("gru_cell", "cell"),
        "pair": unknown.format("bilinear", "pair"),
        "head": "it makes the network's output",
    }


class Offsets(nn.Module):
    """A deformable and a transposed depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.first, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16)
        self.offset, self.bent = nn.Conv2d(16, 18, 3, padding=1), DeformConv2d(16, 24, 3, padding=1)
        self.second, self.head = nn.Conv2d(24, 32, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.first(x).relu())
        return self.head(self.second(self.bent(x, self.offset(x))).mean((2, 3)))


def test_convolutions_that_are_not_followed_are_named() -> None:
    space = PruningSpace(Offsets().eval(), torch.zeros(1, 3, 8, 8))
    assert [group.name for group in space.groups] == ["second"]
    reasons = {s.name: s.reason for s in space.skipped}
    assert reasons["up"] == "transposed convolution with groups (in up)"
    assert (
        reasons["bent"]
        == "the operation 'torchvision::deform_conv2d' is not known to keep channels apart (in bent)"
    )


class Crossed(nn.Module):
    """64 pixels attend to 16 patches, whose keys and values have a width of their own."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.pixels, self.patches = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(3, 16, 2, stride=2)
        self.query = nn.Linear(24, 32)
        self.attention = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (y.flatten(2).transpose(1, 2) for y in (self.pixels(x), self.patches(x)))
        found = self.attention(self.query(query), key, key, need_weights=self.weights)[0]
        return self.head(found.mean(1))


@pytest.mark.parametrize("weights", [False, True])
def test_attention_with_keys_of_another_width_stays(weights: bool) -> None:
    example = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    space = PruningSpace(filled(Crossed(weights)), example)
    assert [(group.name, group.width) for group in space.groups] == [("pixels", 24)]
    left = "this form of multi-head attention is left as it is (in attention)"
    assert {s.name: s.reason for s in space.skipped} == {
        **dict.fromkeys(("query", "patches", "attention", "attention.out_proj"), left),
        "head": "it makes the network's output",
    }
    macs = dict(zip([layer.name for layer in space.layers], space.layer_macs(space.dense_widths), strict=True))
    assert macs["attention.q_proj"] == macs["attention.out_proj"] == 64 * 32 * 32
    assert macs["attention.k_proj"] == macs["attention.v_proj"] == 16 * 16 * 32
    plan = space.uniform(0.5)
    small = space.apply(plan)
    assert_is_dense_with_zeros(small, space, plan, example, rtol=1e-4, atol=1e-5)
    assert space.macs(space.widths(plan.widths)) == fvcore_macs(small, example)
