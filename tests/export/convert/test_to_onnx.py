"""Export: what the file holds, that it repeats byte for byte, and that the model is left as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from torch import nn

from export.convert.onnx_header import read_header
from export.convert.ort import open_session, run_session
from export.convert.tidy import module_path
from export.convert.to_onnx import check_parity, export_onnx, reference_outputs
from export.errors import ExportError
from tests.export.nets import SmallNet


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize("opset", [13, 17])
def test_file_says_what_it_is(tmp_path: Path, example: torch.Tensor, opset: int) -> None:
    path = tmp_path / "net.onnx"
    facts = {"model": "small", "classes": ["cat", "dog"], "mean": [0.5, 0.25]}
    info = export_onnx(SmallNet(), example, path, opset=opset, metadata=facts)
    header = read_header(path)
    assert (info.opset, header.opset, header.domains) == (opset, opset, {})
    assert info.inputs == {"input": (1, 3, 16, 16)}
    assert info.outputs == {"output": (1, 10)}
    assert info.size == path.stat().st_size
    assert [item.name for item in tmp_path.iterdir()] == ["net.onnx"]  # no external data, no temporaries
    assert not header.external_data
    assert header.metadata["model"] == "small"
    assert json.loads(header.metadata["classes"]) == ["cat", "dog"]
    assert json.loads(header.metadata["mean"]) == [0.5, 0.25]


def test_the_documented_name() -> None:
    from export.to_onnx import export_onnx as documented

    assert documented is export_onnx


def test_two_exports_are_the_same_bytes(tmp_path: Path, example: torch.Tensor) -> None:
    model = SmallNet()
    facts = {"b": 1, "a": "x"}
    first = export_onnx(model, example, tmp_path / "1.onnx", metadata=facts)
    export_onnx(SmallNet(width=12), example, tmp_path / "other.onnx")
    second = export_onnx(
        model, torch.rand_like(example), tmp_path / "2.onnx", metadata=dict(reversed(facts.items()))
    )
    assert first.sha256 == second.sha256
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_model_is_left_as_it_was(tmp_path: Path, example: torch.Tensor) -> None:
    model = SmallNet().train()
    model.body[0].eval()  # a frozen part must stay frozen
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, example, tmp_path / "net.onnx")
    reference_outputs(model, np.random.default_rng(0).random((3, 3, 16, 16), dtype=np.float32))
    assert model.training
    assert not model.body[0].training
    assert model.body[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_norms_are_folded_and_weights_named_after_modules(
    tmp_path: Path, example: torch.Tensor
) -> None:
    export_onnx(SmallNet(), example, tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert "BatchNormalization" not in kinds
    assert not kinds & {"Identity", "Constant"}
    names = {tensor.name for tensor in graph.initializer}
    assert {"body.0.weight", "body.0.bias", "head.weight", "head.bias"} <= names
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_open_batch(tmp_path: Path, example: torch.Tensor) -> None:
    info = export_onnx(SmallNet(), example, tmp_path / "net.onnx", dynamic_batch=True)
    assert info.inputs == {"input": ("batch", 3, 16, 16)}
    assert info.outputs == {"output": ("batch", 10)}
    assert read_header(info.path).shapes == {"input": (-1, 3, 16, 16)}


def test_several_outputs_are_numbered(tmp_path: Path, example: torch.Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallNet()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.net(x)
            return y, y.softmax(1)

    info = export_onnx(Two(), example, tmp_path / "net.onnx", output_name="scores")
    assert list(info.outputs) == ["scores_0", "scores_1"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121"])
def test_torchvision_networks(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=7)
    info = export_onnx(model, torch.zeros(1, 3, 32, 32), tmp_path / "net.onnx")
    assert info.outputs == {"output": (1, 7)}
    parameters = sum(value.numel() for value in model.parameters())
    assert parameters * 4 * 0.95 < info.size < parameters * 4 * 1.05 + 200_000  # weights once, as floats


@pytest.mark.parametrize(("given", "wanted"), [(1, 7), (3, 7), (5, 2), (7, 7), (6, 3)])
def test_pools_of_any_size(tmp_path: Path, given: int, wanted: int) -> None:
    """VGG on small images pools 1x1 to 7x7, which the exporter alone cannot write."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(wanted), nn.Flatten(), nn.LazyLinear(5))
    images = torch.rand(2, 3, given, given + 1)
    net(images)
    export_onnx(net, images[:1], tmp_path / "net.onnx")
    assert check_parity(net, tmp_path / "net.onnx", images).max_abs < 1e-6


class Kept(nn.Module):
    """The best of boxes that overlap, if their score is positive; the threshold is used in a branch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Parameter(torch.tensor([0, 0, 1]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        boxes, scores = x[0, :, :4], x[0, :, 4]
        sure = scores > 0
        boxes, scores, labels = boxes[sure], scores[sure], self.labels[sure]
        return boxes[torchvision.ops.batched_nms(boxes, scores, labels, 0.5)]


@pytest.mark.parametrize(("second", "kept"), [([0.0, 0, 4, 4, 0.5], [2, 0]), ([5.0, 5, 9, 9, 0.5], [2, 0, 1])])
def test_outputs_of_any_size_and_what_only_a_branch_uses(
    tmp_path: Path, second: list[float], kept: list[int]
) -> None:
    path, first, third = tmp_path / "a.onnx", [0.0, 0, 4, 4, 0.8], [0.0, 0, 4, 4, 0.9]
    boxes = np.array([[first, second, third]], dtype=np.float32)
    info = export_onnx(Kept(), torch.ones(1, 3, 5), path, open_outputs="kept")
    assert info.outputs == {"output": ("kept", 4)}
    (found,) = run_session(open_session(path), {"input": boxes})
    assert found.tolist() == boxes[0, kept, :4].tolist()


def test_module_paths() -> None:
    assert module_path("/conv1/Conv") == "conv1"
    assert module_path("/layer1/layer1.0/conv2/Conv") == "layer1.0.conv2"
    assert module_path("/features/features.1/conv/conv.0/conv.0.0/Conv") == "features.1.conv.0.0"
    assert module_path("/Flatten") == ""


def test_refusals(tmp_path: Path, example: torch.Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"an older file")
    with pytest.raises(ExportError, match="Opset 12 cannot be written: expected 13 to 20"):
        export_onnx(SmallNet(), example, path, opset=12)
    with pytest.raises(ExportError, match=r"does not run on an input of shape \(1, 4, 16, 16\)"):
        export_onnx(SmallNet(), torch.zeros(1, 4, 16, 16), path)
    broken = SmallNet()
    broken.head.weight.data.fill_(float("nan"))
    with pytest.raises(ExportError, match="not finite"):
        export_onnx(broken, example, path)
    with pytest.raises(ExportError, match="returns a str"):
        export_onnx(_Text(), example, path)
    with pytest.raises(ExportError, match="cannot be written as ONNX opset 17"):
        export_onnx(_NoOnnx(), example, path)
    assert capfd.readouterr() == ("", "")  # the exporter would print the graph
    with pytest.raises(ExportError, match="cannot be written"):
        export_onnx(SmallNet(), example, path / "below" / "a_file.onnx")
    assert path.read_bytes() == b"an older file"
    assert [item.name for item in tmp_path.iterdir()] == ["net.onnx"]


class _Text(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return str(x)


class _NoOnnx(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x)[0]
