"""Why a network is not faster: kernels found in the profiler, and the gap that they add up to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.core.errors import CompressorError
from compressor.latency.estimate import count_non_gemm
from compressor.latency.explain import Kernel, Profile, explain, profile_onnx, read_trt_profile
from compressor.latency.networks import file_nodes
from compressor.latency.peaks import Machine, calibrate, estimated_machine
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from export.convert.to_onnx import export_onnx

MACHINE = Machine(1e6, (1.0, 1e9), (1e6, 1e6), 0.01, "made up")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small network and its half as ONNX files."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    example = torch.zeros(1, 3, 16, 16)
    space = PruningSpace(model, example)
    folder = tmp_path_factory.mktemp("pair")
    paths = (folder / "dense.onnx", folder / "slim.onnx")
    export_onnx(model, example, paths[0])
    export_onnx(space.apply(space.plan([40, 40])), example, paths[1])
    return paths


def test_a_file_says_what_its_nodes_compute(pair: tuple[Path, Path]) -> None:
    weighted = [node for node in file_nodes(pair[1]) if node.operator >= 0]
    assert [node.macs for node in weighted] == [3 * 40 * 9 * 256, 40 * 40 * 9 * 64, 400]
    assert [node.channels for node in weighted] == [(3, 40), (40, 40), (40, 10)]


def test_every_kernel_is_found_in_both_networks(pair: tuple[Path, Path]) -> None:
    dense, slim = profile_onnx(pair, seconds=0.1)
    for profile, width in ((dense, 64), (slim, 40)):
        bearing = [kernel for kernel in profile.kernels if kernel.weighted]
        assert [kernel.channels for kernel in bearing] == [(3, width), (width, width), (width, 10)]
        assert all(kernel.computed_macs >= kernel.macs > 0 for kernel in bearing)
        assert any("Pool" in kernel.op and not kernel.weighted for kernel in profile.kernels)
        assert profile.whole_ms > 0
        assert sum(kernel.ms for kernel in profile.kernels) <= 1.2 * profile.whole_ms
    assert {kernel.key for kernel in dense.kernels} >= {
        kernel.key for kernel in slim.kernels if kernel.weighted
    }


def test_gaps_add_up_and_the_largest_comes_first() -> None:
    dense = Profile(
        (
            Kernel(0, "Conv", 0, True, 4.0, 1000, 1000, (10, 10)),
            Kernel(1, "Conv", 0, True, 4.0, 1000, 1000, (10, 10)),
            Kernel(1, "Add", 0, False, 2.0, moved_bytes=100),
        ),
        10.0,
    )
    slim = Profile(
        (
            Kernel(0, "Conv", 0, True, 1.0, 200, 200, (2, 10)),
            Kernel(1, "Conv", 0, True, 3.0, 800, 1000, (8, 10)),
            Kernel(1, "Add", 0, False, 2.0, moved_bytes=50),
            Kernel(1, "ReorderOutput", 0, False, 0.5, moved_bytes=50),
        ),
        6.5,
    )
    lines = explain(dense, slim, ["first", "second"], MACHINE, [(4.1, 0.9), (4.2, 3.1)])
    assert [line.name for line in lines] == ["second", "Add at second", "ReorderOutput at second", "first"]
    assert [line.gap_ms for line in lines] == pytest.approx([1.0, 1.0, 0.5, -1.0])
    assert sum(line.gap_ms for line in lines) == pytest.approx(6.5 - 0.5 * 10)
    second, add, reorder, first = lines
    assert second.padding == pytest.approx(0.2)
    assert (second.predicted_dense_ms, second.predicted_slim_ms) == (4.2, 3.1)
    assert (
        "80% of its multiply-adds in 75% of its time; it was cut less than the network (50%)"
        in second.sentence
    )
    assert "50% of its bytes in 100% of its time" in add.sentence
    assert "changes the layout" in reorder.sentence
    assert "not needed in the dense network" in reorder.sentence
    assert first.sentence == ""
    assert add.layer is None
    assert first.layer == 0


@pytest.mark.parametrize(
    ("kernel", "bound", "words"),
    [
        (Kernel(0, "Conv", 0, True, 0.9, 100, 100, (4, 4)), "launch", "starting it"),
        (Kernel(0, "Conv", 0, True, 0.9, 100, 100, (4, 4), 300_000, 200_000), "bandwidth", "memory"),
        (Kernel(0, "Conv", 0, True, 0.9, 100, 500_000, (4, 4)), "compute", "only pads its 4 to 4 channels"),
        (Kernel(0, "Conv", 0, True, 0.9, 100, 100, (3, 5), blocked=False), "launch", "multiples of 4"),
    ],
)
def test_the_reason_follows_from_the_peaks(kernel: Kernel, bound: str, words: str) -> None:
    wide = Kernel(0, "Conv", 0, True, 1.0, 1000, 1000, (13, 13), 1_000_000, 200_000)
    (line,) = explain(Profile((wide,), 1.0), Profile((kernel,), 0.9), ["conv"], MACHINE)
    assert line.bound == bound
    assert words in line.sentence


def test_this_machines_peaks_are_plausible() -> None:
    machine = calibrate(1)
    assert 1e5 < machine.macs_per_ms < 1e9  # 0.1 G to 1 T multiply-adds a second
    assert all(1e5 < speed < 1e9 for speed in machine.bytes_per_ms)  # 0.1 to 1000 GB/s
    assert 1e-4 <= machine.launch_ms < 1.0
    assert machine.compute_ms(2 * machine.macs_per_ms) == pytest.approx(2.0)
    assert machine.transfer_ms(0) == 0.0


def test_peaks_of_an_estimate_are_called_estimated() -> None:
    fields = LatencyTable.load("jetson-orin-nano-8gb", precision="fp16").fields.roofline["fp16"]
    assert "estimated" in estimated_machine(fields, "jetson-orin-nano-8gb").how


def test_tensorrts_layer_profile_is_read(pair: tuple[Path, Path]) -> None:
    nodes = file_nodes(pair[0])
    conv = [node.name for node in nodes if node.operator >= 0]
    relu = next(node.name for node in nodes if node.op == "Relu")
    text = json.dumps(
        [
            {"count": 100},
            {
                "name": f"{conv[0]} + {relu}",
                "timeMs": 20.0,
                "averageMs": 0.2,
                "medianMs": 0.19,
                "percentage": 40.0,
            },
            {"name": f"Reformatting CopyNode for Output Tensor 0 to {conv[0]} + {relu}", "averageMs": 0.05},
            {"name": conv[1], "timeMs": 20.0, "averageMs": 0.2, "percentage": 40.0},
        ]
    )
    profile = read_trt_profile(text, "profile.json", pair[0], element_bytes=2, block=8)
    assert [(each.operator, each.weighted, each.ms) for each in profile.kernels] == [
        (0, True, 0.19), (0, False, 0.05), (1, True, 0.2),
    ]  # fmt: skip
    assert profile.kernels[0].computed_macs == pytest.approx(
        profile.kernels[0].macs * 8 / 3
    )  # 3 inputs padded to 8
    for wrong in ("[]", "{}", "nonsense", '[{"name": "a", "averageMs": -1}]'):
        with pytest.raises(CompressorError, match="not a layer profile"):
            read_trt_profile(wrong, "profile.json", pair[0], element_bytes=2, block=8)
    with pytest.raises(CompressorError, match="None of the layers"):
        read_trt_profile('[{"name": "other", "averageMs": 1}]', "p", pair[0], element_bytes=2, block=8)


def test_non_gemm_kernels_are_counted_beside_the_operators() -> None:
    gate = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Hardswish()
    )
    kernels, moved = count_non_gemm(lambda: gate.eval()(torch.zeros(1, 8, 4, 4)), 2)
    assert kernels.tolist() == [0.0, 1.0]  # normalisation and ReLU are computed along, hard-swish is not
    assert moved.tolist() == [0.0, 2 * 16 * 16]
    early = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    kernels, _ = count_non_gemm(lambda: early.eval()(torch.zeros(1, 8, 4, 4)), 2)
    assert kernels.tolist() == [2.0, 0.0]  # a pooling, and a normalisation that no convolution takes in
    assert np.array_equal(count_non_gemm(lambda: early(torch.zeros(1, 8, 4, 4)), 5)[0], np.zeros(5))
