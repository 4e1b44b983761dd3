"""Reads an ONNX file as a torch module: one module or function for each node, in the order of the file.

    network = read_network(content, "net.onnx")

Nothing in a file is executed: nodes select functions of `onnx_operators` by their type. Modules are named after the
weights in the file where these have names of modules ("layer1.0.conv1.weight").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.models.onnx_operators import READERS, Node, Unreadable, Work, linear_of

_WEIGHTS = re.compile(r"(.*)\.(?:weight|bias|scale|B|gamma|running_mean)")
_LEAST_NAMES = 40  # of operators that are listed


@dataclass(frozen=True)
class Step:
    """One node: what computes its outputs.

    Attributes:
        work: A function, or the path of a module of the network.
        inputs, outputs: Names of the values.
        ends: Values that nothing reads afterwards.
    """

    work: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ends: tuple[str, ...] = ()


class OnnxNetwork(nn.Module):
    """A network that was read from an ONNX file.

    Args:
        steps: Its nodes in order.
        modules: The modules of the steps by path.
        source, result: Names of its input and output.
    """

    def __init__(self, steps: Sequence[Step], modules: Mapping[str, nn.Module], source: str, result: str) -> None:
        super().__init__()
        self.source, self.result, self.steps = source, result, tuple(steps)
        for path, module in modules.items():
            *parents, leaf = path.split(".")
            place: nn.Module = self
            for name in parents:
                if name not in place._modules:
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            place.add_module(leaf, module)

    def forward(self, x: Tensor) -> Tensor:
        values = {self.source: x}
        for step in self.steps:
            work = self.get_submodule(step.work) if isinstance(step.work, str) else step.work
            found = work(*(values[name] for name in step.inputs))
            values.update(zip(step.outputs, found if len(step.outputs) > 1 else [found], strict=True))
            for name in step.ends:
                del values[name]
        return values[self.result]


def read_network(content: bytes, name: str) -> OnnxNetwork:
    """Read a network from an ONNX file with a fixed batch, whose constants are initialisers.

    Args:
        content: The file.
        name: Its name in messages.

    Raises:
        CompressorError: An operator is not read; the message names all of them with the reasons.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(content))
    graph = proto.graph
    opset = next((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), 0)
    constants = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    (source,) = [value.name for value in graph.input if value.name not in constants]
    reader = _Reader(opset, constants, shapes, Counter(each for node in graph.node for each in node.input))
    for node in graph.node:
        reader.add(node)
    if reader.refused:
        listed = "; ".join(f"{op}: {reason}" for op, reason in list(reader.refused.items())[:_LEAST_NAMES])
        raise CompressorError(
            f"{name} has operators that are not read ({listed}).",
            "Give the network itself: a name with --weights, or package.module:factory.",
        )
    result = reader.alias.get(graph.output[0].name, graph.output[0].name)
    return OnnxNetwork(_ended(reader.steps, result), reader.modules, source, result)


class _Reader:
    """Collects the steps and modules of a network."""

    def __init__(
        self,
        opset: int,
        constants: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        readers: Mapping[str, int],
    ) -> None:
        self.opset, self.constants, self.shapes, self.readers = opset, constants, shapes, readers
        self.steps: list[Step] = []
        self.modules: dict[str, nn.Module] = {}
        self.refused: dict[str, str] = {}
        self.alias: dict[str, str] = {}

    def add(self, proto: Any) -> None:
        from onnx import helper

        given = {item.name: _plain(helper.get_attribute_value(item)) for item in proto.attribute}
        inputs = [self.alias.get(name, name) for name in proto.input]
        outputs = [name for name in proto.output if name]
        node = Node(proto.op_type, self.opset, given, inputs, len(outputs), self.constants, self.shapes)
        if node.op == "Add" and self._biased(node, outputs[0]):
            return
        reader = READERS.get(node.op) if proto.domain in ("", "ai.onnx") else None
        try:
            if reader is None:
                raise Unreadable(f"no operator of {proto.domain or 'ONNX'} that is read")
            if not node.active:
                raise Unreadable("it is computed from constants alone")
            work = reader(node)
        except Unreadable as error:
            self.refused.setdefault(node.op, str(error))
            return
        self.steps.append(Step(self._placed(work, proto), tuple(node.active), tuple(outputs)))

    def _placed(self, work: Work, proto: Any) -> Any:
        """Register a module under a name of its own; a function is its own work."""
        if not isinstance(work, nn.Module):
            return work
        named = [match[1] for name in proto.input if name in self.constants and (match := _WEIGHTS.fullmatch(name))]
        parts = re.sub(r"[^A-Za-z0-9_.]+", "_", named[0]).strip(".").split(".") if named else []
        path = ".".join(part for part in parts if part) or f"{proto.op_type.lower()}{len(self.modules)}"
        while any(f"{known}.".startswith(f"{path}.") or path.startswith(f"{known}.") for known in self.modules):
            path += "_"
        self.modules[path] = work
        return path

    def _biased(self, node: Node, output: str) -> bool:
        """Add a constant to the linear layer without bias that computed the other summand; whether there is one."""
        if len(node.active) != 1 or len(node.inputs) != 2 or not self.steps or self.readers[node.active[0]] != 1:
            return False
        last = self.steps[-1]
        layer = self.modules.get(last.work) if isinstance(last.work, str) else None
        value = node.constant(1) if node.inputs[0] == node.active[0] else node.constant(0)
        if not isinstance(layer, nn.Linear) or layer.bias is not None or last.outputs != (node.active[0],):
            return False
        if value is None or tuple(value.shape) != (layer.out_features,):
            return False
        self.modules[last.work] = linear_of(layer.weight.detach(), value)
        self.alias[output] = node.active[0]
        return True


def _plain(value: Any) -> Any:
    """Return an attribute's value: text instead of bytes, lists instead of the library's sequences."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return list(value) if not isinstance(value, (str, int, float)) and hasattr(value, "__iter__") else value


def _ended(steps: Sequence[Step], result: str) -> list[Step]:
    """Return the steps with the values that end after each."""
    last: dict[str, int] = {}
    for place, step in enumerate(steps):
        for name in (*step.inputs, *step.outputs):
            last[name] = place
    ends: dict[int, list[str]] = {}
    for name, place in last.items():
        if name != result:
            ends.setdefault(place, []).append(name)
    return [replace(step, ends=tuple(ends.get(place, ()))) for place, step in enumerate(steps)]
