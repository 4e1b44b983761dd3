"""INT8 in the file: where the pairs stand, what their scales are, and accuracy that is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from export.convert.calibrated import (
    METHODS,
    ONNXRUNTIME,
    TENSORRT,
    Calibrated,
    enclosed,
    following,
    quantisable,
    trained_ranges,
)
from export.convert.half import convert_half, int8_region, open_fp32, value_types
from export.convert.onnx_header import read_header
from export.convert.ort import accuracy_onnx, onnx_outputs, saturates
from export.convert.parity import compare_outputs
from export.convert.quantize import held_out, noise, quantize_onnx, quantize_within, sensitivities
from export.convert.to_onnx import export_onnx
from export.engine.engine import build_engine
from export.engine.trt import RTX
from export.errors import ExportError
from export.files import remove_temporaries
from tests.export.nets import SmallNet, chain_of

IMAGES = np.random.default_rng(3).standard_normal((32, 3, 16, 16)).astype(np.float32)
ALL = ("/body/body.0/Conv", "/depthwise/Conv", "/branch/Conv", "/Add", "/head/Gemm")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), path, metadata={"model": "small"})
    return path


def test_pairs_stand_on_inputs_and_weights_only(tmp_path: Path, net: Path) -> None:
    target = tmp_path / "int8.onnx"
    info = quantize_onnx(net, target, IMAGES)
    assert info.quantised == ALL
    assert (info.kept, info.method, info.samples) == ((), "minmax", 32)
    graph = onnx.load(target).graph
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.name in ALL:
            activations = node.input if node.op_type == "Add" else node.input[:2]
            assert [made_by[name].op_type for name in activations] == ["DequantizeLinear"] * 2, node.name
        elif node.op_type in ("Clip", "Relu", "ReduceMean"):
            assert made_by[node.input[0]].op_type != "DequantizeLinear"  # fused with what comes before
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantisers) == sum(node.op_type == "DequantizeLinear" for node in graph.node)
    for node in quantisers:
        scale, zero = stored[node.input[1]], stored[node.input[2]]
        assert (scale.dtype, zero.dtype) == (np.float32, np.int8)
        assert not zero.any()
        if node.input[0] in stored:  # a weight: stored as floats, one scale for each output channel
            weight = stored[node.input[0]]
            assert weight.dtype == np.float32
            largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)))
            assert scale == pytest.approx(largest / 127, rel=0.01)
    biases = [stored[node.input[2]] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert all(bias.dtype == np.float32 for bias in biases)


def test_ranges_are_those_of_the_inputs(tmp_path: Path, net: Path) -> None:
    quantize_onnx(net, tmp_path / "int8.onnx", IMAGES)
    stored = {entry.name: entry for entry in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    scale = float(numpy_helper.to_array(stored["input_scale"]))
    assert scale == pytest.approx(float(np.abs(IMAGES).max()) / 127, rel=0.01)


def test_metadata(tmp_path: Path, net: Path) -> None:
    quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, method="percentile", keep=["/head/Gemm"])
    header = read_header(tmp_path / "int8.onnx")
    assert header.precision == "int8"
    assert header.metadata["model"] == "small"
    assert json.loads(header.metadata["calibration"]) == {"method": "percentile", "samples": 32}
    assert json.loads(header.metadata["float_nodes"]) == ["/head/Gemm"]
    assert header.producer == read_header(net).producer


@pytest.mark.parametrize("method", METHODS)
def test_outputs_stay_close_and_repeat(
    tmp_path: Path, net: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = quantize_onnx(net, tmp_path / "1.onnx", IMAGES, method=method)
    second = quantize_onnx(net, tmp_path / "2.onnx", IMAGES, method=method)
    assert first.sha256 == second.sha256
    exact, int8 = onnx_outputs(net, IMAGES)[0], onnx_outputs(first.path, IMAGES)[0]
    parity = compare_outputs(exact, int8, tolerance=1.0)
    assert 1e-4 < parity.max_abs < 0.15 * parity.scale
    assert capsys.readouterr() == ("", "")  # the calibrators would print


def test_methods_differ(tmp_path: Path, net: Path) -> None:
    images = IMAGES.copy()
    images[0, 0, 0, 0] = 100.0  # a rare large value, which min-max must cover and a percentile need not
    scales = {}
    for method in ("minmax", "percentile"):
        quantize_onnx(net, tmp_path / "int8.onnx", images, method=method)
        stored = {entry.name: entry for entry in onnx.load(tmp_path / "int8.onnx").graph.initializer}
        scales[method] = float(numpy_helper.to_array(stored["input_scale"]))
    assert scales["minmax"] == pytest.approx(100 / 127, rel=0.01)
    assert scales["percentile"] < 0.1 * scales["minmax"]


def test_choice_of_nodes(tmp_path: Path, net: Path) -> None:
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, only=["/branch/Conv"])
    assert info.quantised == ("/branch/Conv",)
    assert [node.kind for node in read_header(info.path).nodes].count("QuantizeLinear") == 2
    with pytest.raises(ExportError, match="has no node /nowhere"):
        quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, keep=["/nowhere"])
    with pytest.raises(ExportError, match="all nodes stay in float"):
        quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, keep=ALL)


def test_what_is_left_out_reads_values_before_their_pairs(tmp_path: Path, net: Path) -> None:
    """The convolution and the sum read the same value: one with a pair, the other without."""
    floats = onnx.load(net).graph
    shared = next(node for node in floats.node if node.name == "/Add").input
    readers = [node.name for node in floats.node if node.name in ALL and set(node.input) & set(shared)]
    chosen = next(name for name in readers if name != "/Add")
    graph = onnx.load(quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, only=[chosen]).path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    nodes = {node.name: node for node in graph.node}
    assert [made_by[name] for name in nodes[chosen].input[:2]] == ["DequantizeLinear"] * 2
    assert list(nodes["/Add"].input) == list(shared)


def test_sums_with_a_constant_are_no_residuals() -> None:
    from tests.export.nets import matmul_chain

    assert quantisable(onnx.load_model_from_string(matmul_chain(4, 2))) == ["step0", "step1"]
    assert quantisable(onnx.load_model_from_string(chain_of(["Relu"]))) == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:0], "needs real inputs .* got none"),
        (np.full((2, 3, 16, 16), 0.5, np.float32), "All calibration inputs are 0.5"),
        (IMAGES[:, :, :8], r"have the shape \[32, 3, 8, 16\]; the network takes \[1, 3, 16, 16\]"),
        (IMAGES[0], r"have the shape \[3, 16, 16\]"),
        (IMAGES * np.float32("inf"), "not finite"),
    ],
)
def test_calibration_inputs_that_mean_nothing(
    tmp_path: Path, net: Path, images: np.ndarray, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        quantize_onnx(net, tmp_path / "int8.onnx", images)
    assert not (tmp_path / "int8.onnx").exists()


def test_other_refusals(tmp_path: Path, net: Path) -> None:
    with pytest.raises(ExportError, match="'best' is unknown: expected one of minmax, entropy, percentile"):
        quantize_onnx(net, tmp_path / "q.onnx", IMAGES, method="best")
    convert_half(net, tmp_path / "half.onnx")
    with pytest.raises(ExportError, match="is fp16; an FP32 file was expected"):
        quantize_onnx(tmp_path / "half.onnx", tmp_path / "q.onnx", IMAGES)
    (tmp_path / "relu.onnx").write_bytes(chain_of(["Relu"]))
    with pytest.raises(ExportError, match="no convolution, product or residual sum"):
        quantize_onnx(tmp_path / "relu.onnx", tmp_path / "q.onnx", np.eye(3, dtype=np.float32))
    large = tmp_path / "batch.onnx"
    export_onnx(SmallNet(), torch.zeros(64, 3, 16, 16), large)
    with pytest.raises(ExportError, match="takes 64 inputs at a time, got 32"):
        quantize_onnx(large, tmp_path / "q.onnx", IMAGES)


def test_builds_with_tensorrt_rtx(tmp_path: Path, net: Path) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES)
    built = build_engine(info.path, tmp_path / "int8.engine", module=RTX, compute_capability="8.6")
    assert built.precision == "int8"


def test_this_cpu_computes_what_the_int8_file_says(tmp_path: Path, net: Path) -> None:
    """Without optimizations the pairs round floats, exactly; in INT8 the sums of 8 bits saturate on some CPUs."""
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, runtime=ONNXRUNTIME)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(info.path), options, providers=["CPUExecutionProvider"])
    said = [session.run(None, {"input": image[None]})[0] for image in IMAGES]
    found = onnx_outputs(info.path, IMAGES)[0]
    assert noise([np.concatenate(said)], [found]) < 0.01
    assert info.levels == (64 if saturates() else 127)


@pytest.mark.parametrize(("saturating", "levels"), [(False, 127), (True, 64)])
def test_weights_have_seven_bits_where_sums_saturate(
    saturating: bool, levels: int, tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.convert.calibrated.saturates", lambda: saturating)
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, runtime=ONNXRUNTIME)
    assert info.levels == levels
    assert read_header(info.path).metadata.get("weight_levels") == ("64" if saturating else None)
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(info.path).graph.initializer}
    read = [node for node in onnx.load(info.path).graph.node if node.op_type == "QuantizeLinear"]
    weights = [node for node in read if node.input[0] in stored and stored[node.input[0]].ndim > 1]
    assert weights
    for node in weights:
        largest = np.abs(stored[node.input[0]]).max()
        assert largest / stored[node.input[1]].max() == pytest.approx(levels, rel=0.01)
    assert quantize_onnx(net, tmp_path / "trt.onnx", IMAGES).levels == 127  # TensorRT's sums have 32 bits


def test_onnx_runtime_computes_its_own_form_in_int8(tmp_path: Path, net: Path) -> None:
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, runtime=ONNXRUNTIME)
    assert read_header(info.path).metadata["runtime"] == ONNXRUNTIME
    exact = onnx_outputs(net, IMAGES)
    assert 0 < noise(exact, onnx_outputs(info.path, IMAGES)) < 0.05
    kinds = kernels_of(info.path)
    assert [kinds.count(kind) for kind in ("QLinearConv", "QLinearAdd", "QGemm")] == [3, 1, 1]
    assert not {"Conv", "FusedConv", "Add", "Gemm", "Relu", "Clip"} & set(kinds)  # ranges cut like activations
    quantize_onnx(net, tmp_path / "other.onnx", IMAGES)
    assert "runtime" not in read_header(tmp_path / "other.onnx").metadata
    with pytest.raises(ExportError, match="compute in fp32 where INT8 is for"):
        quantize_onnx(net, tmp_path / "q.onnx", IMAGES, runtime=ONNXRUNTIME, rest="fp16")
    with pytest.raises(ExportError, match="not for 'snpe'"):
        quantize_onnx(net, tmp_path / "q.onnx", IMAGES, runtime="snpe")


@pytest.mark.parametrize(("runtime", "step"), [(TENSORRT, 3 / 127), (ONNXRUNTIME, 4 / 255)])
def test_ranges_of_a_training_take_the_place_of_calibrated_ones(
    tmp_path: Path, net: Path, runtime: str, step: float
) -> None:
    ranges = {"head": (-1.0, 3.0), "nowhere": (0.0, 1.0), "branch": (2.0, 1.0)}
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, runtime=runtime, trained=ranges)
    assert info.trained == 1
    assert read_header(info.path).metadata["trained_ranges"] == "1"
    graph = onnx.load(info.path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    (head,) = (node for node in graph.node if node.name == "/head/Gemm")
    assert stored[made_by[head.input[0]].input[1]] == pytest.approx(step)


def test_modules_that_read_one_activation_share_the_widest_range(net: Path) -> None:
    proto = onnx.load(net)
    (shared,) = {node.input[0] for node in proto.graph.node if node.name == "/depthwise/Conv"}
    seen = {"depthwise": (0.0, 2.0), "branch": (-1.0, 1.0)}
    by_name = {node.name: node for node in proto.graph.node}
    by_name["/branch/Conv"].input[0] = shared
    assert trained_ranges(proto, seen, symmetric=False) == {shared: (-1.0, 2.0)}
    assert trained_ranges(proto, seen, symmetric=True) == {shared: (-2.0, 2.0)}


def test_what_follows_a_node_in_int8(net: Path) -> None:
    proto = onnx.load(net)
    kinds = {node.name: node.op_type for node in proto.graph.node}
    assert [kinds[name] for name in following(proto, ["/body/body.0/Conv"], ("Clip", "Relu"))] == ["Clip"]
    after = following(proto, ["/Add"], ("Clip", "Relu", "ReduceMean"))
    assert [kinds[name] for name in after] == ["Relu", "ReduceMean"]
    assert following(proto, ["/branch/Conv"], ("Clip", "Relu", "Add")) == []  # a sum has two activations


def test_what_stands_between_pairs_is_in_int8(tmp_path: Path, net: Path) -> None:
    proto = onnx.load(net)
    others = ["/body/body.0/Conv", "/branch/Conv"]
    assert enclosed(proto, others, ONNXRUNTIME) == ["/body/body.0/Conv", "/depthwise/Conv", "/branch/Conv"]
    assert enclosed(proto, others, TENSORRT) == others
    assert enclosed(proto, ["/branch/Conv", "/head/Gemm"], ONNXRUNTIME) == ["/branch/Conv", "/head/Gemm"]
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, only=others, runtime=ONNXRUNTIME)
    assert info.kept == ("/Add", "/head/Gemm")
    assert kernels_of(info.path).count("QLinearConv") == 3  # of ONNX Runtime: all that the record says, and no other
    info = quantize_onnx(net, tmp_path / "int8.onnx", IMAGES, only=["/branch/Conv"], runtime=ONNXRUNTIME)
    assert kernels_of(info.path).count("QLinearConv") == 1


def kernels_of(path: Path) -> list[str]:
    """Operators that ONNX Runtime runs for a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".run"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_suffix(".run")).graph.node]


def test_noise_is_a_share_of_the_variance() -> None:
    exact = np.array([[0.0], [2.0]])  # variance 1
    assert noise([exact], [exact + 0.1]) == pytest.approx(0.01)
    assert noise([exact, exact], [exact + 0.1, exact]) == pytest.approx(0.005)
    assert noise([exact[:1] + 2], [exact[:1] + 1]) == pytest.approx(0.25)  # one input: of the square


def labels(path: Path) -> np.ndarray:
    return onnx_outputs(path, IMAGES)[0].argmax(axis=1)


def test_accuracy(net: Path) -> None:
    right = labels(net)
    wrong = right.copy()
    wrong[:8] = (right[:8] + 1) % 10
    assert accuracy_onnx(net, [(IMAGES, right)]) == 1.0
    assert (
        accuracy_onnx(net, [(IMAGES[:20], wrong[:20]), (torch.from_numpy(IMAGES[20:]), wrong[20:])]) == 0.75
    )
    with pytest.raises(ExportError, match="at least one input"):
        accuracy_onnx(net, [])


def spoil(net: Path) -> None:
    """One channel far larger than the others, with the next layer undoing it: INT8 loses the others."""
    proto = onnx.load(net)
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name == "depthwise.weight":
            values[0] *= 3000
        elif tensor.name == "branch.weight":
            values[:, 0] /= 3000
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, net)


def test_sensitive_nodes_are_found_and_kept(tmp_path: Path, net: Path) -> None:
    spoil(net)
    proto, header = open_fp32(net)
    fitted, judged = held_out(IMAGES)
    assert (len(fitted), len(judged)) == (24, 8)
    calibrated = Calibrated(proto, header.inputs[0], fitted, "minmax")
    found = dict(zip(ALL, sensitivities(calibrated, [[name] for name in ALL], judged), strict=True))
    assert max(found, key=lambda name: found[name]) == "/branch/Conv"  # its input has the spoilt range
    assert min(found.values()) > 0
    exact = onnx_outputs(net, IMAGES)[0]

    def score(path: Path) -> float:
        return float(1 - np.abs(onnx_outputs(path, IMAGES)[0] - exact).mean() / np.abs(exact).mean())

    found = quantize_within(net, tmp_path / "int8.onnx", IMAGES, score, max_drop=0.05)
    assert found.before == 1.0
    assert found.all_int8 < 0.95 <= found.after
    assert found.after == score(tmp_path / "int8.onnx")
    assert found.quant.kept == ("/branch/Conv",)
    assert found.quant.path == tmp_path / "int8.onnx"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "net.onnx"]


def test_what_a_kill_leaves_of_an_attempt_is_removed(net: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def killed(path: Path) -> float:
        if path != net:
            shutil.copytree(folder, tmp_path / "left")  # what lies there when the process is killed now
        return 0.9

    quantize_within(net, folder / "int8.onnx", IMAGES, killed, max_drop=0.0)
    assert list((tmp_path / "left").iterdir())
    remove_temporaries(tmp_path / "left")
    assert not list((tmp_path / "left").iterdir())
    assert [path.name for path in folder.iterdir()] == ["int8.onnx"]


def test_nothing_is_kept_where_nothing_need_be(tmp_path: Path, net: Path) -> None:
    found = quantize_within(net, tmp_path / "int8.onnx", IMAGES, lambda path: 0.9, max_drop=0.0)
    assert (found.before, found.after, found.quant.kept) == (0.9, 0.9, ())


def test_a_drop_that_cannot_be_helped(tmp_path: Path, net: Path) -> None:
    def score(path: Path) -> float:
        return 1.0 if path == net else 0.25

    with pytest.raises(ExportError, match=r"25\.00% at best, with 4 of 5 nodes in float; at least 99\.50%"):
        quantize_within(net, tmp_path / "int8.onnx", IMAGES, score, max_drop=0.005)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    with pytest.raises(ExportError, match="must be from 0 to below 1, got 50"):
        quantize_within(net, tmp_path / "int8.onnx", IMAGES, score, max_drop=50)


def test_what_is_not_in_int8_computes_in_halves(tmp_path: Path, net: Path) -> None:
    plain, halves = tmp_path / "plain.onnx", tmp_path / "halves.onnx"
    quantize_onnx(net, plain, IMAGES)
    quantize_onnx(net, halves, IMAGES, rest="fp16")
    proto = onnx.load(halves)
    types = value_types(proto)
    inside = set(int8_region(proto))
    for node in proto.graph.node:
        if node.op_type == "ReduceMean":
            assert types[node.output[0]] == 10  # half: the mean is no INT8 kernel's
            assert node.name not in inside
        elif node.op_type in ("Conv", "Gemm", "Relu", "Add"):
            assert types[node.output[0]] == 1
            assert node.name in inside
    scales = {
        node.input[1] for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    assert all(types[name] == 1 for name in scales)  # 8.6 misreads half scales
    outputs = [onnx_outputs(path, IMAGES)[0] for path in (plain, halves)]
    assert float(np.abs(outputs[0] - outputs[1]).max()) < 0.05  # often 0: the head rounds to int8 anyway
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert (facts["rest"], facts["precision"]) == ("fp16", "int8")
    with pytest.raises(ExportError, match="other nodes compute in fp32 or fp16, not in 'bf16'"):
        quantize_onnx(net, halves, IMAGES, rest="bf16")


def test_int8_with_halves_builds(tmp_path: Path, net: Path) -> None:
    pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    quantize_onnx(net, tmp_path / "q.onnx", IMAGES, rest="fp16")
    info = build_engine(tmp_path / "q.onnx", tmp_path / "q.engine", module=RTX, compute_capability="8.6")
    assert info.precision == "int8"
    assert info.metadata["rest"] == "fp16"


def test_a_newer_opset_is_said_before_anything_is_run(tmp_path: Path) -> None:
    path = tmp_path / "new.onnx"
    path.write_bytes(chain_of(["Relu"], opset=99))
    inputs = np.ones((2, 3), np.float32)
    for convert in (
        lambda: quantize_onnx(path, tmp_path / "q.onnx", inputs),
        lambda: convert_half(path, tmp_path / "h.onnx", inputs=inputs),
    ):
        with pytest.raises(ExportError, match=r"opset 99; the newest that TensorRT reads is 20"):
            convert()
