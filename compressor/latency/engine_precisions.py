"""Plans of precisions on a device with TensorRT: what its engines' layers say of a network's parts, and whole engines.

An engine's layer is named after the nodes that it computes. A layer with one weight-bearing node belongs to that node,
also where a residual sum or an activation function is fused into it. Layers of Q/DQ nodes and casts alone are
conversions, and a reformatting layer belongs to the node that it serves.

Newer versions compile whole regions into kernels with names of their own. Where most of the time cannot be assigned, no
time of a part is known, and plans are made by the noise of their parts alone (`export.convert.mixed.plans_by_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.latency.backends.gpu import UNSURE
from compressor.latency.networks import TAG, WEIGHTED
from compressor.latency.precisions import REFORMAT, TO_FLOAT, TO_INT8, KernelTime, tagged_nodes
from export.convert.calibrated import TENSORRT
from export.convert.half import HALF

if TYPE_CHECKING:
    from compressor.latency.paired import Ratio

Layers = Sequence[tuple[str, float]]
"""Name and milliseconds of each layer of an engine."""

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")


@dataclass(frozen=True)
class EngineTimer:
    """A device with TensorRT.

    Attributes:
        floats: Precision of the parts that are not in INT8.
        where: Description of the device and its runtime.
        profile: Returns the layers of the engines of some ONNX files, or why one has none.
        time: Returns milliseconds of ONNX files, or why one has none.
        compare: Times ONNX files in turns with a first one: shares of its time, or why there is none.
    """

    floats: Literal["fp32", "fp16"]
    where: str
    profile: Callable[[Sequence[bytes]], list[Layers | str]]
    time: Callable[[Sequence[bytes]], list[float | str]]
    compare: Callable[[Path, Sequence[Path]], Iterable[Ratio | str]]
    runtime: str = TENSORRT

    def kernels(self, protos: Sequence[Any]) -> list[list[KernelTime]] | str:
        """See `PrecisionTimer`."""
        found = []
        for proto, layers in zip(protos, self.profile([tagged_nodes(proto) for proto in protos]), strict=True):
            if isinstance(layers, str):
                return f"The parts are not timed one by one: {layers}"
            kernels, unsure = engine_kernels(proto, layers)
            if unsure > UNSURE:
                return f"TensorRT does not say which parts {unsure:.0%} of an engine's time belongs to."
            found.append(kernels)
        return found

    def whole_ms(self, networks: Sequence[bytes]) -> list[float]:
        """See `PrecisionTimer`."""
        return [math.inf if isinstance(found, str) else found for found in self.time(networks)]

    def ratios(self, floats: Path, plans: Sequence[Path]) -> Iterable[Ratio | str]:
        """See `PrecisionTimer`."""
        return self.compare(floats, plans)


def engine_kernels(proto: Any, layers: Layers) -> tuple[list[KernelTime], float]:
    """Assign the layers of an engine to the nodes of its network.

    Args:
        proto: The network. Its nodes were named `@INDEX.` when the engine was built.
        layers: The engine's layers, in order.

    Returns:
        The kernels, and the share of the time that belongs to no node, or to several weight-bearing ones.
    """
    nodes, elements = proto.graph.node, _elements(proto)
    kernels, unsure = [], 0.0
    for name, ms in layers:
        named = [nodes[int(index)] for index in TAG.findall(name) if int(index) < len(nodes)]
        if not named:
            unsure += ms
            continue
        computing = [node for node in named if node.op_type not in _CONVERSIONS]
        weighted = [node for node in computing if node.op_type in WEIGHTED]
        node = [*weighted, *(each for each in computing if each.op_type == "Add"), *computing, named[-1]][0]
        written = elements.get(node.output[0], 0)
        if name.startswith("Reformat"):
            kernels.append(KernelTime(node.name, REFORMAT, ms, elements.get(node.input[0], 0)))
        elif computing:
            unsure += ms if len(weighted) > 1 else 0.0
            kernels.append(KernelTime(node.name, node.op_type, ms, written))
        else:
            op = TO_INT8[0] if any(map(_enters_int8, named)) else TO_FLOAT[0]
            kernels.append(KernelTime(node.name, op, ms, written))
    total = sum(ms for _, ms in layers)
    return kernels, unsure / total if total > 0 else 1.0


def _enters_int8(node: Any) -> bool:
    """Whether a conversion is on the way to INT8: the cast before a pair is one to FP32."""
    if node.op_type == "Cast":
        return all(item.i != HALF for item in node.attribute if item.name == "to")
    return str(node.op_type) == "QuantizeLinear"


def _elements(proto: Any) -> dict[str, int]:
    """Return the number of elements of each value."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto).graph
    return {
        value.name: math.prod(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
