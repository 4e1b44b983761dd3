"""Networks from ONNX files: equal to the file, pruned as the network that was exported, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compressor.core.errors import CompressorError
from compressor.models import create_model, onnx_operators, usual_classes
from compressor.models.create import published
from compressor.models.onnx_file import OnnxSource, open_kept, open_onnx, require_equal
from compressor.models.onnx_operators import blocks
from compressor.models.weights import FRESH_HEAD
from compressor.pruning.space import PruningSpace
from export.convert.half import convert_half
from export.convert.ort import onnx_outputs
from export.convert.quantize import quantize_onnx
from export.convert.to_onnx import export_onnx

IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def network_of(name: str) -> nn.Module:
    """A network whose batch norms do something."""
    torch.manual_seed(0)
    model = create_model(name, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    "name", ["cifar_resnet20", "mobilenet_v2", "shufflenet_v2_x0_5", "mobilenet_v3_small"]
)
def test_an_exported_network_is_read_and_pruned_as_it_was(name: str) -> None:
    model, path = network_of(name), Path("net.onnx")
    export_onnx(model, IMAGE, path)
    source = open_onnx(str(path))
    found = source.network().eval()
    assert require_equal(found, source, "net.onnx") < 1e-4
    before, after = (PruningSpace(each, IMAGE) for each in (model, found))
    assert sorted(group.width for group in after.groups) == sorted(group.width for group in before.groups)
    small, same = (space.apply(space.uniform(0.5)) for space in (after, before))
    count = sum(weight.numel() for weight in small.parameters() if weight.dim() > 1)
    assert count == sum(weight.numel() for weight in same.parameters() if weight.dim() > 1)
    export_onnx(small, IMAGE, "slim.onnx")  # which compares it with torch
    assert Path("slim.onnx").stat().st_size < path.stat().st_size


def test_layers_have_the_names_of_the_network() -> None:
    export_onnx(network_of("cifar_resnet20"), IMAGE, "net.onnx")
    names = dict(open_onnx("net.onnx").network().named_modules())
    assert isinstance(names["layer2.0.conv1"], nn.Conv2d)
    assert isinstance(names["linear"], nn.Linear)


def test_a_file_of_another_batch_is_read_for_any() -> None:
    model, images = network_of("shufflenet_v2_x0_5"), torch.randn(3, 3, 32, 32)
    export_onnx(model, torch.zeros(4, 3, 32, 32), "four.onnx")
    export_onnx(model, IMAGE, "open.onnx", dynamic_batch=True)
    for name in ("four.onnx", "open.onnx"):
        found = open_onnx(name).network().eval()
        with torch.no_grad():
            assert torch.allclose(found(images), model(images), atol=1e-4)


# ---------------------------------------------------------------- single operators
def file_of(
    nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...] = (1, 4, 6, 6), opset: int = 17
) -> bytes:
    """A file of some nodes from `x` to `y`, behind a convolution of an image of 3 channels to `shape`."""
    rng = np.random.default_rng(0)
    known = {"w0": rng.standard_normal((shape[1], 3, 1, 1)).astype(np.float32)}
    known.update({name: np.asarray(value) for name, value in constants.items()})
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w0"], ["x"]), *nodes],
        "one",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, *shape[2:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


def node(op: str, *inputs: str, out: str = "y", **given: Any) -> Any:
    return helper.make_node(op, ["x", *inputs], [out], **given)


def numbers(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.5, 1.5, shape).astype(np.float32)


CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "padding of another size behind": (
        [node("Conv", "w", strides=[2, 2], auto_pad="SAME_UPPER")], {"w": floats(5, 4, 3, 3)}
    ),
    "padding of another size before": (
        [node("Conv", "w", strides=[2, 2], auto_pad="SAME_LOWER")], {"w": floats(5, 4, 2, 2)}
    ),
    "groups and dilation": (
        [node("Conv", "w", "b", group=2, dilations=[2, 2], pads=[2, 2, 2, 2])],
        {"w": floats(6, 2, 3, 3), "b": floats(6)},
    ),
    "transposed": ([node("ConvTranspose", "w", strides=[2, 2], output_padding=[1, 1])], {"w": floats(4, 5, 3, 3)}),
    "batch norm alone": (
        [node("Relu", out="r"), helper.make_node("BatchNormalization", ["r", "s", "b", "m", "v"], ["y"])],
        {"s": floats(4), "b": floats(4), "m": floats(4), "v": floats(4)},
    ),
    "a product with a weight and a sum": (
        [
            node("Flatten", out="f"), helper.make_node("MatMul", ["f", "w"], ["p"]),
            helper.make_node("Add", ["p", "b"], ["y"]),
        ],
        {"w": floats(144, 5), "b": floats(5)},
    ),
    "gemm": (
        [node("Flatten", out="f"), helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1)],
        {"w": floats(5, 144), "b": floats(5)},
    ),
    "scale of each channel": ([node("Mul", "s")], {"s": floats(4, 1, 1)}),
    "constant first": ([helper.make_node("Sub", ["c", "x"], ["y"])], {"c": floats()}),
    "constant over": ([node("Exp", out="e"), helper.make_node("Div", ["c", "e"], ["y"])], {"c": floats()}),
    "largest of both": ([node("Max", "c")], {"c": np.float32(0.2)}),
    "slopes": ([node("PRelu", "s")], {"s": floats(4, 1, 1)}),
    "leaky": ([node("LeakyRelu", alpha=0.2)], {}),
    "elu": ([node("Elu", alpha=0.7)], {}),
    "hard sigmoid": ([node("HardSigmoid", alpha=0.1, beta=0.4)], {}),
    "hard swish": ([node("HardSwish")], {}),
    "clip": ([node("Clip", "lo", "hi")], {"lo": np.float32(-0.3), "hi": np.float32(0.4)}),
    "clip below": ([node("Clip", "lo")], {"lo": np.float32(-0.3)}),
    "softmax": ([node("Softmax", axis=1)], {}),
    "pool that rounds up": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}),
    "pool of uneven padding": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])], {}),
    "mean without padding": ([node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}),
    "mean with padding": ([node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)], {}),
    "means over pixels": ([node("ReduceMean", axes=[2, 3], keepdims=0)], {}),
    "largest over pixels": ([node("ReduceMax", axes=[-1, -2])], {}),
    "shuffle": (
        [
            node("Reshape", "a", out="r"), helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3, 4]),
            helper.make_node("Reshape", ["t", "b"], ["y"]),
        ],
        {"a": numbers(0, 2, 2, 6, 6), "b": numbers(-1, 4, 6, 6)},
    ),
    "parts": (
        [
            helper.make_node("Split", ["x", "s"], ["a", "b"], axis=1),
            helper.make_node("Concat", ["b", "a"], ["y"], axis=1),
        ],
        {"s": numbers(1, 3)},
    ),
    "halves": (
        [helper.make_node("Split", ["x"], ["a", "b"], axis=1), helper.make_node("Mul", ["b", "a"], ["y"])], {}
    ),
    "every second pixel": (
        [node("Slice", "from", "to", "axes", "steps")],
        {"from": numbers(0, 1), "to": numbers(9999, 5), "axes": numbers(2, 3), "steps": numbers(2, 1)},
    ),
    "some channels": (
        [node("Slice", "from", "to", "axes")],
        {"from": numbers(-3, 1), "to": numbers(-1, 5), "axes": numbers(1, 2)},
    ),
    "the last quarter": (
        [node("Slice", "from", "to", "axes")], {"from": numbers(3), "to": numbers(4), "axes": numbers(1)}
    ),
    "one place": ([node("Gather", "i", axis=2)], {"i": np.asarray(3)}),
    "zeros around": ([node("Pad", "p")], {"p": numbers(0, 0, 1, 2, 0, 0, 0, 1)}),
    "a mirror around": ([node("Pad", "p", mode="reflect")], {"p": numbers(0, 0, 1, 2, 0, 0, 0, 1)}),
    "more channels of zeros": ([node("Pad", "p")], {"p": numbers(0, 1, 0, 0, 0, 1, 0, 0)}),
    "nearest": (
        [node("Resize", "", "s", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {"s": np.asarray([1, 1, 2, 2], dtype=np.float32)},
    ),
    "bilinear": ([node("Resize", "", "", "z", mode="linear")], {"z": numbers(1, 4, 9, 9)}),
    "rows": ([node("Unsqueeze", "a", out="u"), helper.make_node("Squeeze", ["u", "a"], ["y"])], {"a": numbers(1)}),
    "shape computed from the input": (
        [
            helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "i"], ["n"]),
            helper.make_node("Concat", ["n", "m"], ["r"], axis=0), node("Reshape", "r"),
        ],
        {"i": numbers(0), "m": numbers(-1)},
    ),
    "a constant beside": (
        [
            node("Reshape", "r", out="t"), helper.make_node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
            helper.make_node("Concat", ["c", "u"], ["v"], axis=1), helper.make_node("Add", ["v", "p"], ["w"]),
            helper.make_node("LayerNormalization", ["w", "g", "b"], ["y"]),
        ],
        {"r": numbers(0, 4, -1), "c": floats(1, 1, 4), "p": floats(1, 37, 4), "g": floats(4), "b": floats(4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_that_of_onnx_runtime(case: str) -> None:
    nodes, constants = CASES[case]
    Path("one.onnx").write_bytes(file_of(nodes, constants))
    source = open_onnx("one.onnx")
    network = source.network().eval()
    assert require_equal(network, source, case) < 1e-4
    images = torch.randn(3, 3, 6, 6)  # and for other batches than one
    with torch.no_grad():
        found = network(images).numpy()
    assert np.allclose(found, onnx_outputs(source.content, images.numpy())[0], atol=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        (
            (1, 116, 28, 28),
            (1, 2, 58, 28, 28),
            [((0,), (-1,)), ((1,), (2, -1)), ((2,), (-1,)), ((3,), (-1,))],
        ),
        (
            (1, 2, 58, 28, 28),
            (1, 116, 28, 28),
            [((0,), (-1,)), ((1, 2), (-1,)), ((3,), (-1,)), ((4,), (-1,))],
        ),
        ((1, 512, 1, 1), (1, 512), [((0,), (-1,)), ((1, 2, 3), (-1,))]),
        ((1, 512), (1, 512, 1, 1), [((0,), (-1,)), ((1,), (-1, 1, 1))]),
        ((1, 192, 14, 14), (1, 192, 196), [((0,), (-1,)), ((1,), (-1,)), ((2, 3), (-1,))]),
    ],
)
def test_reshapes_follow_the_channels(before: Any, after: Any, parts: Any) -> None:
    assert blocks(before, after) == parts


# ---------------------------------------------------------------- refusals
def refused(name: str, message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        open_onnx(name).network()


def test_what_cannot_be_read_says_why() -> None:
    model = network_of("cifar_resnet20")
    export_onnx(model, IMAGE, "net.onnx")
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    quantize_onnx("net.onnx", "int8.onnx", images)
    convert_half("net.onnx", "half.onnx", inputs=images)
    refused("none.onnx", r"There is no ONNX file none\.onnx")
    Path("text.onnx").write_text("no network")
    refused("text.onnx", "text.onnx")
    refused("int8.onnx", r"int8\.onnx has quantised operators \(DequantizeLinear, QuantizeLinear\)")
    refused("half.onnx", r"half\.onnx has weights in half precision")
    Path("odd.onnx").write_bytes(
        file_of([node("Det", out="d"), helper.make_node("Unsqueeze", ["d", "a"], ["y"])], {"a": numbers(2)})
    )
    refused(
        "odd.onnx", r"odd\.onnx has operators that are not read \(Det: no operator of ONNX that is read\)"
    )
    Path("back.onnx").write_bytes(
        file_of(
            [node("Slice", "a", "b", "c", "d")],
            {"a": numbers(-1), "b": numbers(-99), "c": numbers(2), "d": numbers(-1)},
        )
    )
    refused("back.onnx", r"Slice: it goes backwards")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.graph.node[0].__setattr__("domain", "own"),
            r"operators that ONNX does not define \(own:Conv\)",
        ),
        (lambda m: m.opset_import[0].__setattr__("version", 99), "opset 99"),
        (lambda m: m.graph.output.append(m.graph.output[0]), "1 inputs and 2 outputs"),
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim[2].Clear(), r"takes \[-1, 3, -1, 6\]; images"),
    ],
)
def test_a_file_of_another_kind_is_refused(change: Callable[[Any], None], message: str) -> None:
    proto = onnx.load_model_from_string(file_of([node("Relu")], {}))
    change(proto)
    Path("odd.onnx").write_bytes(proto.SerializeToString())
    refused("odd.onnx", message)


def test_a_network_that_differs_from_its_file_is_refused_with_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("one.onnx").write_bytes(
        file_of(
            [node("Relu", out="r"), helper.make_node("ReduceMean", ["r"], ["y"], axes=[2, 3], keepdims=0)], {}
        )
    )
    monkeypatch.setitem(onnx_operators.READERS, "Relu", lambda _: torch.abs)
    with pytest.raises(
        CompressorError, match=r"one\.onnx was read as a network whose outputs differ .* by up to 0\.\d+"
    ):
        create_model("one.onnx", 4, input_shape=(3, 6, 6))


def test_only_the_file_of_this_checksum_is_taken(tmp_path: Path) -> None:
    Path("one.onnx").write_bytes(file_of([node("Relu")], {}))
    source = open_onnx("one.onnx")
    assert open_onnx(source.name).content == source.content
    Path("kept.onnx").write_bytes(source.content)
    assert open_onnx("kept.onnx").content == source.content  # it is not simplified again
    assert open_kept(Path("kept.onnx"), source.name).shape == (3, 6, 6)
    Path("kept.onnx").write_bytes(source.content + b" ")
    with pytest.raises(CompressorError, match="its checksum differs"):
        open_kept(Path("kept.onnx"), source.name)
    with pytest.raises(CompressorError, match="not the name of an ONNX file"):
        open_onnx("onnx:../../secret")


def test_other_weights_and_other_sizes_are_refused() -> None:
    export_onnx(network_of("cifar_resnet20"), IMAGE, "net.onnx")
    assert usual_classes("net.onnx") == 10
    with pytest.raises(CompressorError, match=r"net\.onnx has its own weights; other.pt cannot be loaded"):
        create_model("net.onnx", 10, "other.pt")
    with pytest.raises(CompressorError, match="takes images of 32 pixels, and these have 64x64") as told:
        create_model("net.onnx", 10, input_shape=(3, 64, 64))
    assert "--image-size 32" in told.value.hint


def test_the_head_is_replaced_for_other_classes() -> None:
    export_onnx(network_of("cifar_resnet20"), IMAGE, "net.onnx")
    model = create_model("net.onnx", 7, "default")
    assert model.eval()(IMAGE).shape == (1, 7)
    assert model.__dict__[FRESH_HEAD] == 10
    assert not hasattr(create_model("net.onnx", 10, "default"), FRESH_HEAD)


def test_the_preprocessing_of_the_file_is_known() -> None:
    model = network_of("cifar_resnet20")
    export_onnx(model, IMAGE, "bare.onnx")
    stated = {
        "size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "crop_share": 1.0, "interpolation": "bicubic",
        "resize": "short", "channel_order": "bgr", "range": 1, "resize_size": 32,
    }  # fmt: skip
    export_onnx(model, IMAGE, "full.onnx", metadata={"preprocessing": stated})
    full = published("full.onnx")
    assert published("bare.onnx") is None
    assert full is not None
    assert full.origin == "the metadata of full.onnx"
    assert full.preprocessing["mean"] == (0.5, 0.5, 0.5)
    assert full.preprocessing["channel_order"] == "bgr"
    assert isinstance(open_onnx("full.onnx"), OnnxSource)
