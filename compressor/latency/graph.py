"""Counts multiply-adds, weights and memory traffic of each node of an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class FileNode:
    """Costs of one node of the file, for one input.

    Attributes:
        name: Name in the file.
        op: ONNX operator.
        operator: Index among the weight-bearing operators, in file order; -1 for a node without weights.
        macs: Multiply-adds; 0 without weights.
        channels: Input and output channels; None without weights.
        weights: Number of weight elements.
        moved: Elements of inputs and outputs without weights; 0 where a shape is unknown.
    """

    name: str
    op: str
    operator: int
    macs: int
    channels: tuple[int, int] | None
    weights: int
    moved: int


def file_nodes(path: Path) -> list[FileNode]:
    """Return the nodes of an ONNX file in file order."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = model.graph
    constants = {item.name: tuple(item.dims) for item in graph.initializer}
    shapes: dict[str, tuple[int, ...]] = {
        value.name: tuple(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    found = []
    operators = 0
    for node in graph.node:
        weight = next((constants[name] for name in node.input[:2] if len(constants.get(name, ())) >= 2), None)
        weighted = node.op_type in WEIGHTED and weight is not None
        data = [name for name in (*node.input, *node.output) if name in shapes and name not in constants]
        output = shapes.get(node.output[0], ())
        first = next((shapes[name] for name in node.input if name in shapes and name not in constants), ())
        found.append(
            FileNode(
                name=node.name,
                op=node.op_type,
                operator=operators if weighted else -1,
                macs=macs_of(node.op_type, weight, first, output) if weighted and weight else 0,
                channels=_channels(node, weight) if weighted and weight else None,
                weights=sum(int(np.prod(constants[name])) for name in node.input if name in constants),
                moved=sum(int(np.prod(shapes[name])) for name in data),
            )
        )
        operators += weighted
    return found


def macs_of(op: str, weight: tuple[int, ...], data: tuple[int, ...], output: tuple[int, ...]) -> int:
    """Return an operator's multiply-adds from the shapes of its weight, input and output."""
    if "Transpose" in op:
        places = int(np.prod(data[2:]))
    elif len(weight) > 2:
        places = int(np.prod(output[2:]))
    else:
        places = int(np.prod(output[:-1]))  # matrix product: one position per row
    return int(np.prod(weight)) * max(places, 1)


def _channels(node: Any, weight: tuple[int, ...]) -> tuple[int, int]:
    if len(weight) == 2:
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        return (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    if node.op_type == "ConvTranspose":
        return weight[0], weight[1] * groups
    return weight[1] * groups, weight[0]
