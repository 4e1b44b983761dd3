"""Times of a network's parts in both precisions, and of the conversions between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.latency.precisions import CpuTimer, KernelTime, _conversion, kernel_times, part_prices
from compressor.latency.request import Request
from export.convert.calibrated import ONNXRUNTIME, Calibrated
from export.convert.half import open_fp32
from export.convert.mixed import parts_of
from export.convert.to_onnx import export_onnx
from tests.export.nets import SmallNet

IMAGES = np.random.default_rng(3).standard_normal((8, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def calibrated(tmp_path: Path) -> Calibrated:
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), tmp_path / "net.onnx")
    proto, header = open_fp32(tmp_path / "net.onnx")
    return Calibrated(proto, header.inputs[0], IMAGES, "minmax", runtime=ONNXRUNTIME)


def test_every_part_is_timed_in_both_precisions(calibrated: Calibrated) -> None:
    parts = parts_of(calibrated.proto, ONNXRUNTIME)
    prices = part_prices(calibrated, parts, [0.1] * len(parts.parts), CpuTimer(Request()))
    assert prices is not None
    kinds = [part.nodes[0].rsplit("/", 1)[-1] for part in parts.parts]
    for kind, float_ms, int8_ms in zip(kinds, prices.float_ms, prices.int8_ms, strict=True):
        assert int8_ms > 0, kind
        assert float_ms > 0 or kind == "Add"  # which may be fused into the convolution before it
    assert len(prices.to_int8_ms) == len(prices.to_float_ms) == len(parts.crossings)
    assert min(*prices.to_int8_ms, *prices.to_float_ms) >= 0
    assert max(prices.to_int8_ms) > 0


def test_kernels_belong_to_nodes_of_their_own_file(calibrated: Calibrated) -> None:
    names = ["/branch/Conv"]
    floats, int8 = kernel_times([calibrated.proto, calibrated.quantise(names)], 1)
    assert {"/depthwise/Conv", "/branch/Conv"} <= {kernel.node for kernel in floats}
    assert [kernel.op for kernel in int8 if kernel.node == "/branch/Conv"] == ["QLinearConv"]
    (entry,) = (kernel for kernel in int8 if kernel.op == "QuantizeLinear")
    assert entry.elements == 8 * 16 * 16


def test_a_conversion_has_a_launch_and_a_time_for_each_element() -> None:
    times = [KernelTime("", "QuantizeLinear", 0.01 + 1e-6 * size, size) for size in (1000, 5000, 20_000)]
    other = [KernelTime("", "Conv", 5.0, 100)]
    assert _conversion([*times, *other], ("QuantizeLinear", "ReorderOutput")) == pytest.approx([0.01, 1e-6])
    own = sum(kernel.ms for kernel in times)
    reordered = [*times, KernelTime("", "ReorderOutput", own / 2, 1000)]
    assert _conversion(reordered, ("QuantizeLinear", "ReorderOutput")) == pytest.approx([0.015, 1.5e-6])
    assert not _conversion(other, ("QuantizeLinear", "ReorderOutput")).any()
