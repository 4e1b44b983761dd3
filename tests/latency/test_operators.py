"""Keys of operators and networks, and what operators cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.latency.operators import (
    Operators,
    OpSignature,
    channels,
    network_signature,
    signature_of,
)
from compressor.pruning.space import PruningSpace


def test_signature_keys_round_trip(space: PruningSpace) -> None:
    for layer in space.layers:
        signature = signature_of(layer, "Add+Relu")
        assert OpSignature.from_key(signature.key) == signature
    assert signature_of(space.layers[0]).key == "conv k3x3 s1x1 p1x1 d1x1 g1 in16x16"
    assert signature_of(space.layers[4], "Clip").key == "depthwise k3x3 s2x2 p1x1 d1x1 gc in16x16 +Clip"
    with pytest.raises(CompressorError, match="not an operator signature"):
        OpSignature.from_key("conv 3x3")


def test_network_signature_ignores_weights_and_steps(space: PruningSpace, example: Tensor) -> None:
    torch.manual_seed(1)
    again = PruningSpace(type(space.model)().eval(), example, granularity=4)
    larger = PruningSpace(type(space.model)().eval(), torch.zeros(1, 3, 24, 24), granularity=8)
    assert network_signature(again) == network_signature(space)
    assert network_signature(larger) != network_signature(space)


def test_weights_are_counted_by_kind() -> None:
    keys = [
        "conv k3x3 s1x1 p1x1 d1x1 g1 in8x8",
        "depthwise k3x3 s1x1 p1x1 d1x1 gc in8x8",
        "grouped k1x1 s1x1 p0x0 d1x1 g4 in8x8",
        "grouped k3x3 s1x1 p1x1 d1x1 gc/4 in8x8",
        "linear k1x1 s1x1 p0x0 d1x1 g1 in1x1",
    ]
    c_in, c_out = np.asarray([[3, 16, 16, 8, 20]]), np.asarray([[16, 16, 20, 8, 10]])
    found = Operators.of_keys(keys).cost(c_in, c_out).weights.sum(axis=-1)
    assert found.tolist() == [9 * 3 * 16 + 9 * 16 + 16 * 20 // 4 + 9 * 4 * 8 + 20 * 10]
    assert OpSignature.from_key(keys[3]).key == keys[3]
    assert Operators.of_keys(keys[3:4]).cost(8, 8).macs == 64 * 9 * 4 * 8


def test_groups_that_go_whole_are_known_to_tables_and_estimates() -> None:
    """ResNeXt-50 at half, layer1.0.conv2: 16 of its 32 groups of 4 channels stay."""
    from torchvision.models import resnext50_32x4d

    from compressor.latency.estimate import EstimatedOperators
    from compressor.latency.layout import layout_fields, layout_of

    space = PruningSpace(resnext50_32x4d(weights=None).eval(), torch.zeros(1, 3, 64, 64))
    half = space.round(0.5 * space.dense_widths)
    place = [layer.name for layer in space.layers].index("layer1.0.conv2")
    assert space.layer_macs(half)[place] == 589_824
    assert signature_of(space.layers[place]).key == "grouped k3x3 s1x1 p1x1 d1x1 gc/4 in16x16"
    assert Operators([signature_of(space.layers[place])]).cost(64, 64).macs == 589_824
    c_in, c_out = channels(space, half[None])
    assert EstimatedOperators.of_space(space).work(c_in, c_out, 1)[0][0].tolist() == space.layer_macs(half).tolist()
    again = layout_of(layout_fields(space)).layers
    assert [layer.group_size for layer in again] == [layer.group_size for layer in space.layers]
    assert [layer.weights(64, 64) for layer in again] == [layer.weights(64, 64) for layer in space.layers]


class Frames(nn.Module):
    """Convolutions of frames that are folded into the batch, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.head = nn.ConvTranspose2d(16, 4, 2, stride=2), nn.Linear(4, 5)

    def forward(self, frames: Tensor) -> Tensor:
        inputs, count = frames.shape[:2]
        found = self.up(self.down(self.first(frames.flatten(0, 1)).relu()).relu()).relu()
        return self.head(found.mean((2, 3))).view(inputs, count, -1).mean(1)


def test_frames_folded_into_the_batch_count_to_one_input() -> None:
    """7 frames of 8x8: the operators do 7 times the work with the same weights."""
    from compressor.latency.estimate import EstimatedOperators
    from compressor.latency.layout import layout_fields, layout_of

    spaces = {count: PruningSpace(Frames().eval(), torch.zeros(1, count, 3, 8, 8)) for count in (1, 7)}
    one, space = spaces[1], spaces[7]
    assert [layer.images for layer in space.layers] == [7, 7, 7, 1]
    half = space.round(0.5 * space.dense_widths)[None]
    c_in, c_out = channels(space, half)
    cost, single = (Operators(each.layers).cost(c_in, c_out) for each in (space, one))
    assert cost.macs[0].tolist() == space.layer_macs(half)[0].tolist() == (7 * one.layer_macs(half)[0]).tolist()
    assert cost.weights.tolist() == single.weights.tolist()
    assert (cost.moved - cost.weights).tolist() == (7 * (single.moved - single.weights)).tolist()
    work = EstimatedOperators.of_space(space).work(c_in, c_out, 1)
    assert work[0].tolist() == cost.macs.tolist()
    layers = layout_of(layout_fields(space)).layers
    assert [layer.multiply_adds(half)[0] for layer in layers] == space.layer_macs(half)[0].tolist()
    assert Operators(layers).cost(c_in, c_out).moved.tolist() == cost.moved.tolist()


def test_keys_tell_how_many_frames_are_folded() -> None:
    spaces = {count: PruningSpace(Frames().eval(), torch.zeros(1, count, 3, 8, 8)) for count in (1, 7, 8)}
    assert len({network_signature(space) for space in spaces.values()}) == 3
    first = signature_of(spaces[7].layers[0], "Relu")
    assert first.key == "conv k3x3 s1x1 p1x1 d1x1 g1 in8x8 n7 +Relu"
    assert OpSignature.from_key(first.key) == first
    assert Operators.of_keys([first.key]).cost(3, 8).macs == 7 * 64 * 9 * 3 * 8
    assert signature_of(spaces[1].layers[0]).key == "conv k3x3 s1x1 p1x1 d1x1 g1 in8x8"


def test_an_estimate_grows_with_the_frames() -> None:
    from compressor.latency.table import LatencyTable

    table = LatencyTable.load("jetson-orin-nano-8gb", precision="fp16")
    times = [
        table.predict(PruningSpace(Frames().eval(), torch.zeros(1, count, 3, 96, 96))) for count in (1, 32, 64)
    ]
    assert times[2] - times[0] == pytest.approx(63 / 31 * (times[1] - times[0]), rel=0.1)


def test_a_convolution_without_a_batch_axis() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x[0]).relu())[None]

    space = PruningSpace(Unbatched().eval(), torch.zeros(1, 3, 8, 6))
    assert [layer.in_hw for layer in space.layers] == [(8, 6), (8, 6)]
    dense = space.dense_widths[None]
    assert Operators(space.layers).cost(*channels(space, dense)).macs.tolist() == space.layer_macs(dense).tolist()
