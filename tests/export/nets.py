"""Small networks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn


def write_reference(path: Path, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """Inputs and the outputs that are right for them, as `export.convert.parity.read_reference` reads them."""
    np.savez(path, inputs=inputs, outputs=outputs)


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


def chain_of(kinds: list[str], *, opset: int = 17, dtype: type = np.float32, batch: int | str = 1) -> bytes:
    """Operators one after the other, named n0, n1, ..., with a stored constant of `dtype`; unchecked."""
    nodes = [
        helper.make_node(kind, [f"t{i}"], [f"t{i + 1}"], name=f"n{i}", domain="own" if kind == "Own" else "")
        for i, kind in enumerate(kinds)
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("t0", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info(f"t{len(kinds)}", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(np.ones(3, dtype), "w")],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 3)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, producer_name="hand")
    helper.set_model_props(model, {"classes": '["ä"]'})
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


class Within(nn.Module):
    """A convolution, something between, and a linear head for images of 3x16x16."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        with torch.no_grad():
            width = between(torch.zeros(2, 8, 16, 16)).flatten(1).shape[1]
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(torch.relu(self.conv(x))).flatten(1))
