"""FP16 in the file: types by ONNX's own definitions, casts where needed, overflow found on real inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper

from export.convert.half import HALF, convert_half, largest_values
from export.convert.onnx_header import read_header
from export.convert.ort import onnx_outputs
from export.convert.parity import TOLERANCES, compare_outputs, require
from export.convert.to_onnx import export_onnx
from export.engine.engine import build_engine
from export.engine.trt import RTX
from export.errors import ExportError
from tests.export.nets import SmallNet

INPUTS = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), path, metadata={"model": "small"})
    return path


def scale_weight(path: Path, name: str, factor: float) -> None:
    proto = onnx.load(path)
    tensor = next(entry for entry in proto.graph.initializer if entry.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(proto, path)


def test_weights_are_halves_and_the_ends_are_floats(tmp_path: Path, net: Path) -> None:
    info = convert_half(net, tmp_path / "half.onnx", inputs=INPUTS)
    proto = onnx.load(tmp_path / "half.onnx")
    floats = [tensor.name for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    assert floats == []
    assert info.kept == ()
    assert info.converted == len(read_header(net).nodes)
    assert [node.op_type for node in proto.graph.node].count("Cast") == 2  # one at each end
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    header = read_header(tmp_path / "half.onnx")
    assert (header.precision, header.inputs, header.outputs) == ("fp16", ("input",), ("output",))
    assert header.metadata == {"model": "small", "precision": "fp16"}
    stored = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    assert 2 * stored - 400 < net.stat().st_size - info.size <= 2 * stored


def test_outputs_stay_close(tmp_path: Path, net: Path) -> None:
    convert_half(net, tmp_path / "half.onnx", inputs=INPUTS)
    exact, half = onnx_outputs(net, INPUTS)[0], onnx_outputs(tmp_path / "half.onnx", INPUTS)[0]
    parity = require(compare_outputs(exact, half, tolerance=TOLERANCES["fp16"]), "half.onnx", min_agreement=1)
    assert 1e-6 < parity.max_abs < 5e-3  # truly computed in halves, and well


def test_two_conversions_are_the_same_bytes(tmp_path: Path, net: Path) -> None:
    first = convert_half(net, tmp_path / "1.onnx", inputs=INPUTS)
    second = convert_half(net, tmp_path / "2.onnx", inputs=INPUTS)
    assert first.sha256 == second.sha256


def test_overflow_on_real_inputs_is_kept_in_fp32_and_named(tmp_path: Path, net: Path) -> None:
    scale_weight(net, "depthwise.weight", 1e6)
    scale_weight(net, "branch.weight", 1e-6)
    target = tmp_path / "half.onnx"
    info = convert_half(net, target, inputs=INPUTS)
    assert [entry.node for entry in info.kept] == ["/branch/Conv", "/depthwise/Conv"]
    assert "a half holds 65504" in info.kept[1].reason
    exact, half = onnx_outputs(net, INPUTS)[0], onnx_outputs(target, INPUTS)[0]
    require(compare_outputs(exact, half, tolerance=TOLERANCES["fp16"]), "half.onnx", min_agreement=1)
    assert '"/depthwise/Conv"' in read_header(target).metadata["fp32_nodes"]


def test_overflowing_weights_are_found_without_inputs(tmp_path: Path, net: Path) -> None:
    scale_weight(net, "depthwise.weight", 1e6)
    info = convert_half(net, tmp_path / "half.onnx")
    assert [entry.node for entry in info.kept] == ["/depthwise/Conv"]
    assert info.kept[0].reason.startswith("depthwise.weight reaches")


def test_nodes_asked_for_stay_fp32(tmp_path: Path, net: Path) -> None:
    info = convert_half(net, tmp_path / "half.onnx", keep=["/head/Gemm"])
    weights = {entry.name: entry.data_type for entry in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert weights["head.weight"] == TensorProto.FLOAT
    assert weights["branch.weight"] == HALF
    assert info.kept[0].reason == "requested"
    with pytest.raises(ExportError, match="has no node /nowhere"):
        convert_half(net, tmp_path / "half.onnx", keep=["/nowhere"])


def test_operators_that_want_floats_keep_them(tmp_path: Path) -> None:
    """Resize takes its scales as floats whatever it resizes, shapes are integers, one value has two users."""
    nodes = [
        helper.make_node("Mul", ["input", "two"], ["a"], name="mul"),
        helper.make_node("Resize", ["a", "", "scales"], ["b"], name="resize", mode="nearest"),
        helper.make_node("Shape", ["b"], ["shape"], name="shape"),
        helper.make_node("Cast", ["shape"], ["sizes"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sizes", "two"], ["c"], name="kept"),
        helper.make_node("ReduceSum", ["c"], ["d"], name="sum", keepdims=1),
        helper.make_node("Add", ["b", "d"], ["output"], name="add"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 1, 4, 4])],
        [
            numpy_helper.from_array(np.array([2.0], np.float32), "two"),
            numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
        ],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    convert_half(path, tmp_path / "half.onnx", keep=["kept"])
    stored = {entry.name: entry.data_type for entry in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert stored == {"two": HALF, "scales": TensorProto.FLOAT, "two_float": TensorProto.FLOAT}
    inputs = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    assert np.array_equal(onnx_outputs(path, inputs)[0], onnx_outputs(tmp_path / "half.onnx", inputs)[0])


def test_largest_values_by_hand(net: Path) -> None:
    largest = largest_values(onnx.load(net), INPUTS)
    assert largest["input"] == float(np.abs(INPUTS).max())
    assert largest["output"] == pytest.approx(float(np.abs(onnx_outputs(net, INPUTS)[0]).max()), rel=1e-4)
    assert len(largest) == len(read_header(net).nodes) + 1


def test_only_fp32_files_are_taken(tmp_path: Path, net: Path) -> None:
    convert_half(net, tmp_path / "half.onnx")
    with pytest.raises(ExportError, match="is fp16; an FP32 file was expected"):
        convert_half(tmp_path / "half.onnx", tmp_path / "again.onnx")


@pytest.mark.parametrize(("name", "opset"), [("mobilenet_v3_small", 17), ("shufflenet_v2_x0_5", 13)])
def test_torchvision_networks_build_in_halves(tmp_path: Path, name: str, opset: int) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    path, target = tmp_path / "net.onnx", tmp_path / "half.onnx"
    export_onnx(model, torch.zeros(1, 3, 32, 32), path, opset=opset)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    convert_half(path, target, inputs=images)
    parity = compare_outputs(onnx_outputs(path, images)[0], onnx_outputs(target, images)[0], tolerance=2e-2)
    require(parity, name)
    info = build_engine(target, tmp_path / "net.engine", module=RTX, compute_capability="8.6")
    assert info.precision == "fp16"
