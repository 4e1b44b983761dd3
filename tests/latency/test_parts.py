"""Signatures, surfaces, the correction, the choice of sub-networks, the profiler's events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.latency.assemble import export_candidate
from compressor.latency.correction import fit_correction, fit_factors, held_out_error
from compressor.latency.design import LEVELS, anchor_widths, grid_widths, random_widths
from compressor.latency.distinct import with_distinct_weights
from compressor.latency.noise import channel_block, middle, undisturbed
from compressor.latency.ort_profile import OrtCpu, _by_operator, tag
from compressor.latency.signature import (
    OpSignature,
    channels,
    network_signature,
    signature_of,
    weight_elements,
)
from compressor.latency.surface import KINDS, Surfaces, fit_surface
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from export.convert.to_onnx import export_onnx


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


def test_a_staircase_is_predicted_between_the_measured_points() -> None:
    def truth(c_in: np.ndarray, c_out: np.ndarray) -> np.ndarray:
        return 0.01 + 0.002 * np.ceil(c_in / 16) * np.ceil(c_out / 16)

    points = np.asarray([(a, b) for a in (16, 64, 128, 192, 256) for b in (16, 64, 128, 192, 256)])
    surface = fit_surface(points[:, 0], points[:, 1], truth(points[:, 0], points[:, 1]), block=16)
    asked = np.asarray([(a, b) for a in range(16, 257, 16) for b in range(16, 257, 16)])
    predicted = Surfaces([surface], 16)(asked[:, :1], asked[:, 1:])[:, 0]
    assert np.abs(predicted / truth(asked[:, 0], asked[:, 1]) - 1).max() < 0.02
    assert surface.covers((16, 256), (20, 30))
    assert not surface.covers((8, 256), (20, 30))


def test_the_slower_kernel_of_misfit_channels_is_predicted() -> None:
    rng = np.random.default_rng(0)

    def truth(c_in: np.ndarray, c_out: np.ndarray) -> np.ndarray:
        slower = np.where(c_in % 4 == 0, 1.0, 2.5)
        return 0.005 + 0.002 * slower * np.ceil(c_in / 16) * np.ceil(c_out / 16)

    c_in, c_out = rng.integers(16, 65, 60), rng.integers(4, 17, 60) * 4
    surface = Surfaces([fit_surface(c_in, c_out, truth(c_in, c_out), block=16)], 16)
    asked_in, asked_out = rng.integers(16, 65, 200), rng.integers(4, 17, 200) * 4
    predicted = surface(asked_in[:, None], asked_out[:, None])[:, 0]
    assert np.abs(predicted / truth(asked_in, asked_out) - 1).mean() < 0.10


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_surfaces_of_noise_are_positive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    c_in, c_out, ms = rng.integers(1, 100, 12), rng.integers(1, 100, 12), rng.uniform(0.001, 10, 12)
    surface = Surfaces([fit_surface(c_in, c_out, ms, block=8)], 8)
    asked = rng.integers(1, 120, (2, 50, 1))
    assert (surface(asked[0], asked[1]) > 0).all()


def test_the_correction_finds_a_line() -> None:
    totals = np.linspace(1, 10, 20)
    correction = fit_correction(totals, np.full(20, 7.0), 0.3 + 0.8 * totals)
    assert correction.offset == pytest.approx(0.3)
    assert correction.slope == pytest.approx(0.8)
    assert correction.weights == ()
    assert float(fit_correction([2.0], [9.0], [3.0])(4.0, 9.0)) == pytest.approx(6.0)
    falling = fit_correction([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert falling.slope > 0


def test_the_correction_sees_that_many_weights_leave_the_nearest_cache() -> None:
    rng = np.random.default_rng(3)
    totals, weights = rng.uniform(0.2, 1.0, 80), rng.uniform(0.0, 1e7, 80)

    def truth(total: np.ndarray, size: np.ndarray) -> np.ndarray:
        return 0.02 + total + 0.4 * np.clip((size - 1.6e6) / 4.8e6, 0.0, 1.0)

    correction = fit_correction(totals, weights, truth(totals, weights))
    unseen, sizes = rng.uniform(0.2, 1.0, 200), rng.uniform(0.0, 1e7, 200)
    off = np.abs(correction(unseen, sizes) / truth(unseen, sizes) - 1)
    by_sum_alone = fit_correction(totals, np.zeros(80), truth(totals, weights))
    assert off.mean() < 0.03
    assert off.mean() < 0.3 * np.abs(by_sum_alone(unseen, 0.0) / truth(unseen, sizes) - 1).mean()
    more = correction(np.full(50, 0.5), np.linspace(0, 2e7, 50))
    assert (np.diff(more) >= 0).all()


def test_each_kind_of_term_gets_its_factor() -> None:
    rng = np.random.default_rng(5)
    parts = rng.uniform(0.5, 2.0, (60, len(set(KINDS))))
    factors = np.asarray([0.0, 0.7, 1.1, 0.6, 1.3, 0.9, 0.8])
    truth = parts @ factors
    found = np.asarray(fit_factors(parts, truth.tolist()))
    assert np.corrcoef(found, factors)[0, 1] > 0.95  # drawn to one another, yet in the right order
    alike = parts.sum(axis=1) * float(np.median(truth / parts.sum(axis=1)))
    assert np.abs(parts @ found / truth - 1).mean() < 0.5 * np.abs(alike / truth - 1).mean()
    assert fit_factors(parts, (3.0 * parts.sum(axis=1)).tolist()) == pytest.approx([3.0] * len(factors))
    assert fit_factors(parts[:5], [1.0] * 5) == ()


def test_a_few_slowed_networks_do_not_bend_the_correction() -> None:
    rng = np.random.default_rng(8)
    totals = rng.uniform(0.2, 1.0, 60)
    truth = 0.05 + 1.1 * totals
    slowed = np.where(np.arange(60) % 5 == 0, 1.4, 1.0) * truth
    correction = fit_correction(totals, np.full(60, 7.0), slowed)
    assert np.abs(correction(totals, 7.0) / truth - 1).max() < 0.04


def test_factors_scale_terms_of_their_kind_only() -> None:
    rng = np.random.default_rng(6)
    c_in, c_out = rng.integers(1, 100, 40), rng.integers(1, 100, 40)
    fitted = fit_surface(c_in, c_out, 0.1 + 0.01 * c_in + 0.002 * c_in * c_out, block=8)
    asked = rng.integers(8, 100, (2, 30, 1))
    parts = Surfaces([fitted], 8).by_kind(*asked)
    assert parts.sum(axis=1) == pytest.approx(Surfaces([fitted], 8)(*asked)[:, 0])
    doubled = Surfaces([fitted], 8, [1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0])
    assert doubled(*asked)[:, 0] == pytest.approx(parts.sum(axis=1) + parts[:, 4])


def test_weights_are_counted_by_kind() -> None:
    keys = [
        "conv k3x3 s1x1 p1x1 d1x1 g1 in8x8",
        "depthwise k3x3 s1x1 p1x1 d1x1 gc in8x8",
        "grouped k1x1 s1x1 p0x0 d1x1 g4 in8x8",
        "grouped k3x3 s1x1 p1x1 d1x1 gc/4 in8x8",
        "linear k1x1 s1x1 p0x0 d1x1 g1 in1x1",
    ]
    found = weight_elements(keys)(np.asarray([[3, 16, 16, 8, 20]]), np.asarray([[16, 16, 20, 8, 10]]))
    assert found.tolist() == [9 * 3 * 16 + 9 * 16 + 16 * 20 // 4 + 9 * 4 * 8 + 20 * 10]
    assert OpSignature.from_key(keys[3]).key == keys[3]
    assert OpSignature.from_key(keys[3]).macs(8, 8) == 64 * 9 * 4 * 8


def test_groups_that_go_whole_are_known_to_tables_and_estimates() -> None:
    """ResNeXt-50 at half, layer1.0.conv2: 16 of its 32 groups of 4 channels stay."""
    from torchvision.models import resnext50_32x4d

    from compressor.latency.layout import layout_fields, layout_of
    from compressor.latency.roofline import operators_of

    space = PruningSpace(resnext50_32x4d(weights=None).eval(), torch.zeros(1, 3, 64, 64))
    half = space.round(0.5 * space.dense_widths)
    place = [layer.name for layer in space.layers].index("layer1.0.conv2")
    assert space.layer_macs(half)[place] == 589_824
    assert signature_of(space.layers[place]).key == "grouped k3x3 s1x1 p1x1 d1x1 gc/4 in16x16"
    assert signature_of(space.layers[place]).macs(64, 64) == 589_824
    c_in, c_out = channels(space, half[None])
    assert operators_of(space).work(c_in, c_out, 1)[0][0].tolist() == space.layer_macs(half).tolist()
    again = layout_of(layout_fields(space)).layers
    assert [layer.group_size for layer in again] == [layer.group_size for layer in space.layers]
    assert [layer.weights(64, 64) for layer in again] == [layer.weights(64, 64) for layer in space.layers]


def test_held_out_error_by_hand() -> None:
    error = held_out_error([1.1, 1.8, 3.0], [1.0, 2.0, 3.0])
    assert error.mape == pytest.approx(0.2 / 3)
    assert error.worst == pytest.approx(0.1)
    assert error.bias == pytest.approx(0.0)
    assert error.spearman == 1.0
    assert held_out_error([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]).spearman == pytest.approx(-1.0)
    assert held_out_error([1.0, 1.0], [1.0, 2.0]).spearman == 1.0


def test_the_grid_holds_every_pair_of_levels_of_groups_that_meet(space: PruningSpace) -> None:
    widths = grid_widths(space)
    assert widths.shape == (LEVELS**2, len(space.groups))
    for row in widths:
        space.widths(row)
    inputs, outputs = channels(space, widths)
    for index, layer in enumerate(space.layers):
        groups = {group for group, _ in (*layer.in_channels.terms, *layer.out_channels.terms)}
        if len(groups) == 2:
            first, second = (len(np.unique(widths[:, group])) for group in groups)
            pairs = set(zip(inputs[:, index].tolist(), outputs[:, index].tolist(), strict=True))
            assert len(pairs) == first * second
    assert {tuple(row) for row in np.stack([space.min_widths])} <= {
        tuple(row) for row in anchor_widths(space)
    }
    for group in range(len(space.groups)):
        assert widths[:, group].min() == space.min_widths[group]
        assert widths[:, group].max() == space.dense_widths[group]


def test_random_sub_networks_are_legal_repeatable_and_of_every_size(space: PruningSpace) -> None:
    widths = random_widths(space, 60, seed=3)
    assert np.array_equal(widths, random_widths(space, 60, seed=3))
    for row in widths:
        space.widths(row)
    share = widths.sum(axis=1) / space.dense_widths.sum()
    assert share.min() < 0.35
    assert share.max() > 0.85


def test_nodes_count_to_the_operator_they_serve(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.c(torch.relu(x + self.b(x)).mean((2, 3)))

    path = tmp_path / "net.onnx"
    export_onnx(Net().eval(), torch.zeros(1, 3, 8, 8), path)
    network = tag(path)
    assert network.operators == 3
    assert network.epilogues[0] == "Relu"
    assert network.epilogues[1].startswith("Add+Relu+")
    assert network.epilogues[2] == ""
    times = OrtCpu().measure(network, 0.02)
    assert times.operators_ms.shape[1] == 3
    assert (times.operators_ms.mean(axis=0) > 0).all()
    assert times.median_ms > 0


def test_products_that_are_no_layer_count_to_the_one_before(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 4)
    ).eval()
    path = tmp_path / "net.onnx"
    export_onnx(net, torch.zeros(1, 3, 4, 4), path)
    assert tag(path).operators > 2  # 2x2 pixels are pooled to 3x3 by products with constants
    network = tag(path, [8 * 27, 72 * 4])
    assert network.operators == 2
    assert "MatMul" in network.epilogues[0]
    assert OrtCpu().measure(network, 0.02).operators_ms.shape[1] == 2


def test_events_are_summed_by_run_and_operator(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)).eval(), torch.zeros(1, 3, 4, 4), path)
    network = tag(path)

    def event(index: int, name: str, start: int, duration: int) -> dict[str, object]:
        arguments = {"node_index": str(index)}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": arguments}

    events = [
        event(7, "@0.0_nchwc", 0, 10), event(8, "Reorder", 11, 3), event(9, "@1.", 15, 5),
        event(7, "@0.0_nchwc", 30, 20), event(8, "Reorder", 51, 4), event(9, "@1.", 56, 6),
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 99, "args": {}},
    ]  # fmt: skip
    assert _by_operator(events[::-1], network) == pytest.approx(np.asarray([[0.013, 0.005], [0.024, 0.006]]))


def test_untrained_networks_are_timed_with_all_their_weights(tmp_path: Path) -> None:
    model = create_model("resnet18", 10, "none", (3, 32, 32)).eval()
    assert not bool(model.layer4[1].bn2.weight.any())  # as torchvision begins it, with our settings
    space = PruningSpace(model, torch.zeros(1, 3, 32, 32), granularity=16)
    network = export_candidate(space, space.rank(), torch.zeros(1, 3, 32, 32), np.asarray(space.dense_widths))
    stored = [item for item in onnx.load_from_string(network.model).graph.initializer if len(item.dims) == 4]
    assert len(stored) == 20
    shapes = [len(item.dims) for item in onnx.load_from_string(network.model).graph.initializer]
    assert shapes.count(1) == 21  # the biases of the folded normalisations, and the classifier's
    assert not bool(model.layer4[1].bn2.weight.any())  # the network itself is left alone
    assert with_distinct_weights(model.layer1[0].conv1) is model.layer1[0].conv1


def test_interrupted_runs_do_not_count() -> None:
    calm = np.stack([np.full(20, 1.0), np.full(20, 1.0)], axis=1)
    assert np.median(undisturbed(calm)) == 1.0
    mixed = calm.copy()
    mixed[:12, 0] = 4.0
    assert set(undisturbed(mixed)) == {1.0}
    mixed[:, 0] = 4.0
    assert set(undisturbed(mixed)) == {1.0}
    assert middle(np.asarray([1.0, 2.0, 4.0, 99.0])) == 3.0


def test_runs_on_a_slowed_processor_do_not_count() -> None:
    slowed = np.tile(np.linspace(1.0, 1.1, 40)[:, None], (1, 2))
    slowed[:30] *= 1.9  # no other process ran on this core: both clocks agree
    assert undisturbed(slowed).tolist() == slowed[30:, 0].tolist()


def test_the_channel_block_is_a_vectors() -> None:
    assert channel_block() in (1, 8, 16)
