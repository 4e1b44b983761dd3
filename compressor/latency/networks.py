"""Networks as ONNX files: the operators that their nodes belong to, their nodes' costs, and their measured times."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compressor.latency.machine import Floats, middles

if TYPE_CHECKING:
    from torch import nn


WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

SLOWDOWN_TOLERANCE = 0.08
"""Largest slowdown against the processor's best speed at which a measurement counts as undisturbed."""

TAG = re.compile(r"@(\d+)\.")
"""Pattern of the node names that `tag` gives."""


@dataclass(frozen=True)
class TaggedNetwork:
    """An ONNX network whose nodes and tensors are renamed so that fused nodes can be traced back.

    Attributes:
        model: The ONNX file's bytes.
        owner: Index of the weight-bearing operator to which each node's time is assigned.
        epilogues: ONNX operators that are assigned to each weight-bearing operator, joined by `+`.
    """

    model: bytes
    owner: tuple[int, ...]
    epilogues: tuple[str, ...]

    @property
    def operators(self) -> int:
        """Number of weight-bearing operators."""
        return len(self.epilogues)


@dataclass(frozen=True)
class NetworkTimes:
    """Measured times of one network.

    Attributes:
        whole_ms: End-to-end times without the profiler, (runs,).
        operators_ms: Operator times under the profiler, (runs, operators).
        slowdown: Slowdown of the processor against its best speed, as a share; 0 where it is unknown.
    """

    whole_ms: Floats
    operators_ms: Floats
    slowdown: float = 0.0

    @property
    def median_ms(self) -> float:
        """Median end-to-end time."""
        return float(np.median(self.whole_ms))

    @cached_property
    def by_operator_ms(self) -> Floats:
        """Statistics of each operator, (3, operators): mean of the middle half, 90th percentile, deviation."""
        times = self.operators_ms
        return np.stack([middles(times), np.quantile(times, 0.9, axis=0), times.std(axis=0)])

    @property
    def undisturbed(self) -> bool:
        """Whether the processor ran at about its best speed."""
        return self.slowdown <= SLOWDOWN_TOLERANCE


class Device(Protocol):
    """Protocol of devices that run ONNX networks; tests substitute a simulated one."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Measure one network for about `seconds`."""


def tag(path: Path, weights: Sequence[int] | None = None) -> TaggedNetwork:
    """Read an ONNX file and rename its nodes and their outputs to `@INDEX.`, with the index of the node.

    ONNX Runtime names a fused node after one of the tensors or nodes that it replaces, so the tag survives
    optimisation. A node without weights is assigned to the latest weight-bearing operator that it depends on.

    Args:
        path: The ONNX file.
        weights: Number of weight elements of each operator to identify, in execution order.
            Other products with constants (such as an adaptive pooling) are assigned to the preceding operator. Without
            this argument every product with a constant is an operator.
    """
    import onnx

    proto = onnx.load(str(path))
    graph = proto.graph
    constants = {name: int(np.prod(shape)) for name, shape in _constants(graph).items()}
    names: dict[str, str] = {}
    owner_of: dict[str, int] = {}
    owner: list[int] = []
    epilogues: list[list[str]] = []
    for index, node in enumerate(graph.node):
        if node.op_type in WEIGHTED and _is_next(node, constants, weights, len(epilogues)):
            owner.append(len(epilogues))
            epilogues.append([])
        else:
            owner.append(max((owner_of[name] for name in node.input if name in owner_of), default=0))
            if epilogues:
                epilogues[owner[-1]].append(node.op_type)
        node.name = f"@{index}."
        for place, name in enumerate(node.output):
            owner_of[name] = owner[-1]
            names[name] = f"@{index}.{place}"
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                values[place] = names.get(name, name)
    for item in graph.output:
        item.name = names.get(item.name, item.name)
    del graph.value_info[:]
    return TaggedNetwork(proto.SerializeToString(), tuple(owner), tuple("+".join(each) for each in epilogues))


def _constants(graph: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a graph's constants, and of those that Q/DQ pairs quantise."""
    found = {item.name: tuple(item.dims) for item in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _is_next(
    node: Any, constants: Mapping[str, int], weights: Sequence[int] | None, place: int
) -> bool:
    """Whether a node's constant is the weight of operator `place`."""
    found = [constants[name] for name in node.input[:2] if name in constants]
    if weights is None or not found:
        return bool(found)
    return place < len(weights) and weights[place] in found


@dataclass(frozen=True)
class FileNode:
    """Costs of one node of the file, for one run of its batch.

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
    constants = _constants(graph)
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
    """Return an operator's multiply-adds for a batch from the shapes of its weight, input and output."""
    from compressor.pruning.counts import (
        positions_of,  # it imports torch, which a process that times networks must not
    )

    kind = "conv_transpose" if "Transpose" in op else "conv"
    if len(weight) == 2:  # a matrix product has one position for each row, those of the batch included
        return math.prod(weight) * max(positions_of(kind, data[2:], output[:-1]), 1)
    batch = max(output[0], 1) if output else 1
    return batch * math.prod(weight) * max(positions_of(kind, data[2:], output[2:]), 1)


def _channels(node: Any, weight: tuple[int, ...]) -> tuple[int, int]:
    if len(weight) == 2:
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        return (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    if node.op_type == "ConvTranspose":
        return weight[0], weight[1] * groups
    return weight[1] * groups, weight[0]


def with_distinct_weights(model: nn.Module) -> nn.Module:
    """Return the network itself, or a copy with values in place of all-zero weights and biases.

    A residual network usually starts with zeros in its last normalisations, and all networks start with zero biases.
    Folded into convolutions these become tensors of zeros, and an ONNX file stores equal tensors once. An untrained
    network would be timed with part of its weights only, and would take longer after training.
    """
    import torch

    if not _all_zero(model):
        return model
    filled, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in _all_zero(filled):
            values = torch.rand(weight.shape, generator=generator)
            weight.copy_(0.1 * (values - 0.5))
    return filled


def _all_zero(model: nn.Module) -> list[nn.Parameter]:
    named = (
        (name, parameter)
        for each in model.modules()
        for name, parameter in each.named_parameters(recurse=False)
    )
    return [
        parameter for name, parameter in named if name in ("weight", "bias") and not bool(parameter.any())
    ]
