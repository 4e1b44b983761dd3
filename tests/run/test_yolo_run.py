"""The whole job, without labels, with detectors that are built like YOLO networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor import CompressorError
from tests.pruning.networks import filled
from tests.yolo import Yolo

FAST: dict[str, Any] = {
    "flops": "50%", "agent": "uniform", "search": {"max_evaluations": 2}, "export": {"engine": False},
    "contract": {"repeats": 1, "seconds": 5.0}, "pruning": {"compensation_images": 16},
}  # fmt: skip


def pictures(number: int, size: int) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def assert_file_computes_what_the_network_does(result: Any, image: torch.Tensor) -> None:
    import onnxruntime

    from export.convert.trees import tensors_in

    session = onnxruntime.InferenceSession(result.onnx, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = [each.numpy() for each in tensors_in(result.model(image))]
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("raw", [False, True])
def test_a_detector_is_halved_without_labels(tmp_path: Path, raw: bool) -> None:
    network, images = filled(Yolo(raw=raw)), pictures(24, 32)
    network(images[:1])
    result = compressor.compress(
        network, images[:1], calibration=images.split(8), epochs=0, out=tmp_path / "run", **FAST
    )
    assert result.exit_code == 0
    (budget,) = result.manifest["budgets"]
    assert budget["measured"] <= 0.5 * budget["dense"]
    assert result.manifest["checks"]["fvcore"]["confirmed"] is True
    assert_file_computes_what_the_network_does(result, images[:1])


def test_training_without_labels_needs_the_same_outputs(tmp_path: Path) -> None:
    class Trained(Yolo):
        def forward(self, x: torch.Tensor) -> Any:
            out: Any = super().forward(x)
            return out[:, 4:] if self.training else out

    images = pictures(24, 32)
    with pytest.raises(CompressorError, match="in training mode it returns others") as caught:
        compressor.compress(Trained(), images[:1], calibration=images.split(8), out=tmp_path / "run", **FAST)
    assert "epochs=0" in caught.value.hint


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_a_module_of_ultralytics_is_halved_without_labels(tmp_path: Path, name: str) -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    torch.manual_seed(0)
    network, images = filled(tasks.DetectionModel(f"{name}.yaml", verbose=False)), pictures(24, 64)
    network.model[-1].export = True  # its output is that of an exported network: one tensor
    result = compressor.compress(
        network, images[:1], calibration=images.split(8), epochs=0, out=tmp_path / "run", **FAST
    )
    assert result.exit_code == 0
    (budget,) = result.manifest["budgets"]
    assert budget["measured"] <= 0.5 * budget["dense"]
    assert_file_computes_what_the_network_does(result, images[:1])
