"""Nodes of ONNX files, their operators, and the profiler's events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from compressor.latency.assemble import export_candidate
from compressor.latency.backends.cpu import OrtCpu, _by_operator
from compressor.latency.networks import tag, with_distinct_weights
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from export.convert.to_onnx import export_onnx


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
