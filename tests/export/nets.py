"""Small networks that the tests of this folder share."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


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
