"""Rounded weights: on the grid of the file's scales, and closer to the FP32 layer's outputs than the nearest ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from export.convert.calibrated import ONNXRUNTIME, TENSORRT, Calibrated
from export.convert.half import open_fp32
from export.convert.onnx_header import read_header
from export.convert.ort import onnx_outputs
from export.convert.quantize import noise, quantize_onnx
from export.convert.rounding import _moved, round_weights
from export.convert.to_onnx import export_onnx
from export.errors import ExportError
from tests.export.nets import SmallNet


def pictures(count: int, seed: int) -> np.ndarray:
    """Images whose neighbouring pixels are alike, (count, 3, 16, 16)."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((count, 3, 4, 4)).repeat(4, axis=2).repeat(4, axis=3)
    return (coarse + 0.1 * random.standard_normal(coarse.shape)).astype(np.float32)


IMAGES = pictures(128, 3)


def test_errors_are_moved_to_inputs_that_vary_together() -> None:
    random = np.random.default_rng(0)
    hidden = random.normal(size=(1, 400, 3))
    x = hidden @ random.normal(size=(1, 3, 12)) + 0.05 * random.normal(size=(1, 400, 12))
    rows = random.uniform(-3, 3, size=(1, 5, 12))
    rows[0, np.arange(5), np.arange(5)] = 127.0

    def error(whole: np.ndarray) -> float:
        return float(np.square(x @ np.swapaxes(whole - rows, 1, 2)).sum())

    moved = _moved(rows, x, 127)
    assert np.array_equal(moved, np.rint(moved))
    assert np.abs(moved).max(axis=2) == pytest.approx(127)
    assert error(moved) < 0.5 * error(np.rint(rows))
    alone = _moved(rows, random.normal(size=(1, 100_000, 12)), 127)  # nothing varies together: hardly anything to move
    assert (alone != np.rint(rows)).mean() < 0.05


class Grouped(nn.Module):
    """Convolutions of every kind that has its own patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4, dilation=2), nn.ReLU(),
            nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x)
        return found


@pytest.mark.parametrize("runtime", [TENSORRT, ONNXRUNTIME])
@pytest.mark.parametrize("kind", [SmallNet, Grouped])
def test_rounded_weights_are_those_of_the_file(tmp_path: Path, runtime: str, kind: type[nn.Module]) -> None:
    export_onnx(kind(), torch.zeros(1, 3, 16, 16), tmp_path / "net.onnx")
    proto, _ = open_fp32(tmp_path / "net.onnx")
    info = quantize_onnx(
        tmp_path / "net.onnx", tmp_path / "int8.onnx", IMAGES, runtime=runtime, rounding="outputs"
    )
    again = quantize_onnx(tmp_path / "net.onnx", tmp_path / "2.onnx", IMAGES, runtime=runtime, rounding="outputs")
    assert info.sha256 == again.sha256
    assert read_header(info.path).metadata["rounding"] == "outputs"
    tensors = onnx.load(tmp_path / "int8.onnx").graph.initializer
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    weights = [node.input[1] for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    for name in weights:
        scale = stored[f"{name}_scale"].reshape(-1, *[1] * (stored[name].ndim - 1))
        whole = stored[name] / scale
        assert np.abs(whole - np.rint(whole)).max() < 1e-3, name
    unseen = pictures(64, 4)
    exact = onnx_outputs(tmp_path / "net.onnx", unseen)
    quantize_onnx(tmp_path / "net.onnx", tmp_path / "nearest.onnx", IMAGES, runtime=runtime)
    files = (tmp_path / "nearest.onnx", tmp_path / "int8.onnx")
    before, after = (noise(exact, onnx_outputs(file, unseen)) for file in files)
    assert after < before


def test_only_layers_in_int8_are_rounded(tmp_path: Path) -> None:
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), tmp_path / "net.onnx")
    proto, header = open_fp32(tmp_path / "net.onnx")
    calibrated = Calibrated(proto, header.inputs[0], IMAGES, "minmax")
    rounded = round_weights(calibrated, ["/branch/Conv"])
    pairs = zip(proto.graph.initializer, rounded.graph.initializer, strict=True)
    changed = [one.name for one, other in pairs if one.SerializeToString() != other.SerializeToString()]
    assert changed == ["branch.weight", "branch.bias"]


def test_other_roundings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nearest or outputs, not to 'up'"):
        quantize_onnx(tmp_path / "net.onnx", tmp_path / "int8.onnx", IMAGES, rounding="up")
