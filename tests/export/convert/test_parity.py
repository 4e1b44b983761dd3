"""Differences by hand, thresholds, and the check of a file against its network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.convert.ort import onnx_outputs
from export.convert.parity import compare_outputs, require
from export.convert.to_onnx import check_parity, export_onnx
from export.errors import ExportError
from tests.export.nets import SmallNet

RIGHT = np.array([[0.0, 1.0, 0.5], [2.0, 0.0, 1.0]])


def inputs(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 16, 16)).astype(np.float32)


def test_differences_by_hand() -> None:
    judged = np.array([[0.0, 1.0, 1.1], [2.0, 0.3, 1.0]])
    parity = compare_outputs(RIGHT, judged, tolerance=0.5)
    assert parity.max_abs == pytest.approx(0.6)
    assert parity.mean_abs == pytest.approx(0.9 / 6)
    assert parity.scale == 2.0
    assert parity.allowed == 1.0  # 0.5 for outputs of up to 1, twice that for outputs of up to 2
    assert parity.top1_agreement == 0.5  # the first row's 1.1 now beats its 1.0
    assert parity.samples == 2


def test_equal_outputs_agree_whatever_the_order_of_ties() -> None:
    reference = np.array([[1.0, 1.0 - 1e-9, 0.0]])
    parity = compare_outputs(reference, np.array([[1.0 - 1e-9, 1.0, 0.0]]))
    assert parity.top1_agreement == 1.0


def test_thresholds() -> None:
    parity = compare_outputs(RIGHT, RIGHT + 1e-3)
    with pytest.raises(ExportError, match=r"slim\.onnx differs .* by 0\.001 .* at most 0\.0002"):
        require(parity, "slim.onnx")
    swapped = compare_outputs(RIGHT, RIGHT[:, ::-1], tolerance=10)
    with pytest.raises(ExportError, match=r"for 50\.00% of 2 inputs; at least 90\.00%"):
        require(swapped, "slim.onnx", min_agreement=0.9)


@pytest.mark.parametrize("bad", [np.full((2, 3), np.nan), np.zeros((2, 4))])
def test_outputs_that_cannot_be_compared(bad: np.ndarray) -> None:
    with pytest.raises(ExportError, match=r"6 of 6 outputs of the exported network|shape \[2, 4\]"):
        compare_outputs(RIGHT, bad)
    with pytest.raises(ExportError, match="at least one input"):
        compare_outputs(RIGHT[:0], RIGHT[:0])


@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (4, False), (1, True)])
def test_a_file_equals_its_network(tmp_path: Path, batch: int, dynamic: bool) -> None:
    model = SmallNet().train()
    path = tmp_path / "net.onnx"
    export_onnx(model, torch.zeros(batch, 3, 16, 16), path, dynamic_batch=dynamic)
    parity = check_parity(model, path, torch.from_numpy(inputs(6)))  # 6 does not divide by 4
    assert parity.samples == 6
    assert 0 < parity.max_abs < 1e-4
    assert parity.top1_agreement == 1.0
    assert len(onnx_outputs(path, inputs(6))[0]) == 6


def test_a_file_of_other_weights_is_caught(tmp_path: Path) -> None:
    model, path = SmallNet(), tmp_path / "net.onnx"
    export_onnx(model, torch.zeros(1, 3, 16, 16), path)
    proto = onnx.load(path)
    stored = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.bias")
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) + np.float32(0.01), "head.bias"))
    onnx.save(proto, path)
    with pytest.raises(ExportError, match=r"differs from the network by 0\.01"):
        check_parity(model, path, inputs(3))


def test_inputs_of_another_shape(tmp_path: Path) -> None:
    model, path = SmallNet(), tmp_path / "net.onnx"
    export_onnx(model, torch.zeros(1, 3, 16, 16), path)
    with pytest.raises(ExportError, match=r"takes input \[1, 3, 16, 16\].*got input \[1, 3, 8, 8\]"):
        check_parity(model, path, np.zeros((1, 3, 8, 8), np.float32))
