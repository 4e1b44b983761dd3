"""Small networks that the tests of this folder share."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn


def matmul_chain(width: int, depth: int, *, batch: int | str = 1) -> bytes:
    """`depth` square matrix products of `width`, as an ONNX file: work that grows with both."""
    generator = np.random.default_rng(width)
    weight = (generator.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
    nodes, name = [], "input"
    for index in range(depth):
        output = "output" if index == depth - 1 else f"x{index}"
        nodes.append(helper.make_node("MatMul", [name, "weight"], [output], name=f"step{index}"))
        name = output
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, width])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class SmallNet(nn.Module):
    """Convolutions with batch norms, a residual sum, a depthwise layer and a linear head."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()
        )
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.branch = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        x = torch.relu(self.branch(self.depthwise(x)) + x)
        return self.head(x.mean(dim=(2, 3)))
