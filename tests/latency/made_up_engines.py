"""Engines of a made-up GPU: layers and times follow from the nodes of an ONNX file and its Q/DQ pairs.

A layer is named as TensorRT names it, after all nodes that it computes. A product with many weights is faster in INT8
and one with few in FP16. A value is quantised by a layer of its own unless an INT8 product writes it, and what an INT8
product writes for others is cast.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from export.convert.half import FUSED

if TYPE_CHECKING:
    from compressor.latency.networks import NetworkTimes, TaggedNetwork
    from compressor.latency.schema import Precision

HALF, INT8 = (0.010, 4e-6), (0.016, 1e-6)
"""Milliseconds of a product in either precision: a launch, and each of its weights."""

SUM_HALF, SUM_INT8, POOL = 0.004, 0.003, 0.005
QUANTISE, CAST = (0.002, 1e-7), 0.0015
"""Milliseconds of a value's conversion: to INT8 a launch and each element, to FP16 a launch."""

WEIGHTED = ("Conv", "Gemm")


_LAYERS: dict[Any, list[tuple[str, float]]] = {}


def engine_layers(content: bytes) -> list[tuple[str, float]]:
    """Name and milliseconds of each layer, in order."""
    times = (HALF, INT8, SUM_HALF, SUM_INT8, POOL, QUANTISE, CAST)  # a test may replace them
    key = hashlib.sha256(content).digest(), times
    if key not in _LAYERS:
        _LAYERS[key] = _layers(content)
    return list(_LAYERS[key])


def _layers(content: bytes) -> list[tuple[str, float]]:
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(content)).graph
    stored = {item.name: int(np.prod(item.dims)) for item in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sizes = {
        value.name: math.prod(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }

    def behind(name: str, kinds: tuple[str, ...]) -> Any:
        """What made a value, before nodes of these kinds."""
        while name in maker and maker[name].op_type in kinds:
            name = maker[name].input[0]
        return maker.get(name)

    def weights_of(node: Any) -> tuple[int, list[str]]:
        """Number of weights, and the names of the weights and of the nodes that quantise them."""
        name, names = node.input[1], []
        while name not in stored:
            names.insert(0, maker[name].name)
            name = maker[name].input[0]
        return stored[name], [name, *names]

    def in_int8(node: Any) -> bool:
        dequantised = node is not None and behind(node.input[0], ("Identity",))
        return bool(dequantised) and dequantised.op_type == "DequantizeLinear" and node.op_type in (*WEIGHTED, "Add")

    found = []
    for node in graph.node:
        after = [each for each in readers.get(node.output[0], []) if each.op_type in FUSED][:1]
        if node.op_type in WEIGHTED:
            count, names = weights_of(node)
            once, each = INT8 if in_int8(node) else HALF
            found.append((" + ".join([*names, node.name, *(each.name for each in after)]), once + each * count))
        elif node.op_type == "Add":
            time = SUM_INT8 if in_int8(node) else SUM_HALF
            found.append((" + ".join([node.name, *(each.name for each in after)]), time))
        elif node.op_type in ("GlobalAveragePool", "MaxPool"):
            found.append((node.name, POOL))
        elif node.op_type == "QuantizeLinear" and node.input[0] not in stored:
            before, first = maker.get(node.input[0]), [node.name]
            if before is not None and before.op_type == "Cast":
                first.insert(0, before.name)
            if not in_int8(behind(node.input[0], ("Cast", *FUSED))):
                found.append((" + ".join(first), QUANTISE[0] + QUANTISE[1] * sizes[node.output[0]]))
        elif node.op_type == "Cast" and in_int8(behind(node.input[0], FUSED)):
            found.append((node.name, CAST))
    return found


def whole_ms(content: bytes) -> float:
    """Milliseconds of a run."""
    return sum(ms for _, ms in engine_layers(content))


class MadeUpEngines:
    """Stands for `backends.gpu.TensorRt`.

    Args:
        precision: In which networks run; they are given in FP32, and in another one if this is FP32.
        named: Whether layers are named after nodes.
    """

    def __init__(self, precision: Precision = "fp32", *, named: bool = True) -> None:
        self.precision, self.named = precision, named

    def layers(self, network: TaggedNetwork) -> list[tuple[str, float]]:
        found = engine_layers(network.model)
        return found if self.named else [(f"__myl_Fc_{place}", ms) for place, (_, ms) in enumerate(found)]

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        # imported here, as the stand-in for trtexec imports this file in a process for each engine
        from compressor.latency.backends.gpu import _operators
        from compressor.latency.converted import in_precision
        from compressor.latency.networks import NetworkTimes

        layers = engine_layers(in_precision(network.model, self.precision))
        return NetworkTimes(np.full(40, sum(ms for _, ms in layers)), _operators(layers, network))
