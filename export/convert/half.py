"""Converts an ONNX file to FP16: half-precision weights and activations, FP32 inputs and outputs.

A file with FP16 tensors gives the same engine with every TensorRT from 8.5 to 11, strongly typed or not. ONNX's
operator definitions determine which tensors can be FP16. Nodes that would overflow on real inputs stay FP32 and are
reported. Casts connect the two, one for each value: `docs/guide/export.md` compares it with onnxconverter-common.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.onnx_header import OnnxHeader, parse_header, require_known_opset
from export.convert.ort import open_session, run_session
from export.convert.tidy import write_metadata
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

FLOAT, HALF = 1, 10  # TensorProto
LARGEST_HALF = 65504.0
HEADROOM = 2.0
"""A value above the largest half divided by this factor counts as overflow."""

_TYPED_BY_ATTRIBUTE = frozenset(
    ("Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "Bernoulli", "Multinomial")
)
FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mul")
"""Operators that TensorRT fuses into the preceding convolution."""


@dataclass(frozen=True)
class Kept:
    """A node that stays FP32, with the reason."""

    node: str
    reason: str


@dataclass(frozen=True)
class HalfInfo:
    """The facts of a written FP16 file.

    Attributes:
        path, sha256, size: The file, its checksum and size in bytes.
        converted: Number of nodes that compute in FP16.
        kept: Nodes that stay FP32 although they could be FP16, by name.
    """

    path: Path
    sha256: str
    size: int
    converted: int
    kept: tuple[Kept, ...]


def convert_half(
    source: str | Path,
    target: str | Path,
    *,
    inputs: npt.NDArray[Any] | None = None,
    keep: Iterable[str] = (),
    threads: int = 1,
) -> HalfInfo:
    """Convert an FP32 ONNX file to FP16.

    Args:
        source: The FP32 file.
        target: The FP16 file, written atomically.
        inputs: Real inputs (N, C, H, W) to find overflows on; None checks only the weights.
        keep: Names of nodes to keep in FP32.
        threads: Threads of ONNX Runtime.

    Raises:
        ExportError: the file is damaged or not FP32, a name in `keep` is unknown, or the inputs have the wrong shape.
    """
    import onnx

    proto, header = open_fp32(source)
    names = {node.name for node in proto.graph.node}
    unknown = sorted(set(keep) - names)
    if unknown:
        raise ExportError(f"{source} has no node {unknown[0]} to keep in FP32.")
    kept = {name: "requested" for name in keep}
    kept.update(overflowing(proto, inputs, threads=threads))
    converted = to_half(proto, kept)
    facts: dict[str, Any] = {**header.metadata, "precision": "fp16"}
    if kept:
        facts["fp32_nodes"] = sorted(kept)
    write_metadata(proto, facts)
    onnx.checker.check_model(proto, full_check=True)
    written = proto.SerializeToString(deterministic=True)
    write_bytes(Path(target), written)
    return HalfInfo(
        path=Path(target),
        sha256=sha256_bytes(written),
        size=len(written),
        converted=converted,
        kept=tuple(Kept(name, kept[name]) for name in sorted(kept)),
    )


def open_fp32(source: str | Path) -> tuple[Any, OnnxHeader]:
    """Load an FP32 ONNX file: its model and its header.

    Raises:
        ExportError: the file is missing or damaged, has a newer opset than any TensorRT reads, or is not FP32.
    """
    import onnx

    content = read_bytes(Path(source), "ONNX file")
    header = parse_header(content, str(source))
    require_known_opset(header, str(source))
    if header.precision != "fp32":
        raise ExportError(f"{source} is {header.precision}; an FP32 file was expected.")
    return onnx.load_model_from_string(content), header


def overflowing(proto: Any, inputs: npt.NDArray[Any] | None, *, threads: int = 1) -> dict[str, str]:
    """Find the nodes that read or write values too large for FP16: name -> reason."""
    import numpy as np
    from onnx import numpy_helper

    limit = LARGEST_HALF / HEADROOM
    largest = {
        tensor.name: float(np.abs(numpy_helper.to_array(tensor)).max())
        for tensor in proto.graph.initializer
        if tensor.data_type == FLOAT and 0 not in tensor.dims
    }
    if inputs is not None:
        largest.update(largest_values(proto, inputs, threads=threads))
    found: dict[str, str] = {}
    for node in proto.graph.node:
        worst = max((largest.get(name, 0.0), name) for name in (*node.input, *node.output, ""))
        if worst[0] > limit:
            found[node.name] = f"{worst[1]} reaches {worst[0]:.3g}, a half holds {LARGEST_HALF:g}"
    return found


def to_half(proto: Any, kept: Iterable[str]) -> int:
    """Convert a graph to FP16 except for the `kept` nodes; return the number of nodes that compute in FP16.

    Changes `proto`. Inputs and outputs keep their types.
    """
    return _Converter(proto, frozenset(kept)).convert()


def half_rest(proto: Any, inputs: npt.NDArray[Any], *, threads: int = 1) -> int:
    """Convert the nodes of a Q/DQ network that no INT8 kernel computes to FP16; return their number.

    A node that reads dequantised values and the activation function fused into it compute in INT8 with FP32 inputs and
    outputs; a cast between them would prevent the fusion. All other nodes become FP16, unless values overflow. Changes
    `proto`.
    """
    kept = {
        **dict.fromkeys(int8_region(proto), "computed in INT8"),
        **overflowing(proto, inputs, threads=threads),
    }
    return to_half(proto, kept)


def int8_region(proto: Any) -> list[str]:
    """Names of the Q/DQ nodes, the nodes between them, and the activation functions fused into those."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    pairs, computed = ("QuantizeLinear", "DequantizeLinear"), set()
    dequantised = {node.output[0] for node in proto.graph.node if node.op_type == pairs[1]}
    found = []
    for node in proto.graph.node:
        values = [name for name in node.input if name and name not in stored]
        fused = node.op_type in FUSED and bool(values) and all(name in computed for name in values)
        if node.op_type in pairs or fused or any(name in dequantised for name in values):
            found.append(node.name)
            if node.op_type not in pairs:
                computed.update(node.output)
    return found


class _Converter:
    def __init__(self, proto: Any, kept: frozenset[str]) -> None:
        self.graph, self.kept = proto.graph, kept
        self.opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
        self.before = value_types(proto)
        self.now = dict(self.before)
        self.stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.copies: dict[tuple[str, int], str] = {}
        self.tensors: list[Any] = []
        self.nodes: list[Any] = []
        self.renamed: dict[str, str] = {}

    def convert(self) -> int:
        """See `to_half`."""
        outputs = {value.name for value in self.graph.output}
        converted = 0
        for node in self.graph.node:
            halves = self._half_slots(node)
            converted += bool(halves)
            for index, name in enumerate(node.input):
                if name:
                    want = HALF if ("in", index) in halves else self.before[name]
                    node.input[index] = self._as(self.renamed.get(name, name), want)
            self.nodes.append(node)
            for index, name in enumerate(node.output):
                if ("out", index) in halves:
                    written = f"{name}_half" if name in outputs else name
                    self.renamed[name] = node.output[index] = written
                    self.now[written] = HALF
        for value in self.graph.output:
            inner = self.renamed.get(value.name, value.name)
            if self.now[inner] != self.before[value.name]:
                self._cast(inner, value.name, self.before[value.name])
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(self.tensors)
        return converted

    def _half_slots(self, node: Any) -> set[tuple[str, int]]:
        """The inputs and outputs of a node that become FP16: those whose type parameter allows float16."""
        import onnx

        inner_graphs = any(entry.type in (5, 10) for entry in node.attribute)  # GRAPH, GRAPHS
        if node.name in self.kept or node.domain or inner_graphs or node.op_type in _TYPED_BY_ATTRIBUTE:
            return set()
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        able = {
            entry.type_param_str
            for entry in schema.type_constraints
            if "tensor(float16)" in entry.allowed_type_strs
        }
        slots = set()
        for side, formals, names in (("in", schema.inputs, node.input), ("out", schema.outputs, node.output)):
            for index, name in enumerate(names):
                formal = formals[min(index, len(formals) - 1)]
                if name and formal.type_str in able and self.before.get(name) == FLOAT:
                    slots.add((side, index))
        return slots

    def _as(self, name: str, kind: int) -> str:
        """The name of the value in type `kind`, with a cast if needed."""
        key = (name, kind)
        if key not in self.copies:
            if name in self.stored:
                self.copies[key] = self._store(name, kind)
            elif self.now[name] == kind:
                self.copies[key] = name
            else:
                suffix = "half" if kind == HALF else "float"
                self.copies[key] = self._cast(name, f"{name}_as_{suffix}", kind)
        return self.copies[key]

    def _store(self, name: str, kind: int) -> str:
        import numpy as np
        from onnx import numpy_helper

        tensor = self.stored[name]
        used_before = any(stored == name for stored, _ in self.copies)
        label = f"{name}_half" if used_before and kind == HALF else f"{name}_float" if used_before else name
        copied = type(tensor)()
        if kind == tensor.data_type:
            copied.CopyFrom(tensor)
            copied.name = label
        else:
            copied = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), label)
        self.tensors.append(copied)
        return label

    def _cast(self, name: str, label: str, kind: int) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node("Cast", [name], [label], name=f"/Cast/{label}", to=kind))
        return label


def value_types(proto: Any) -> dict[str, int]:
    """Infer the element type of every value of the graph, including initialisers.

    Raises:
        ExportError: ONNX cannot infer the types.
    """
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"The types of the network's values cannot be inferred: {error}.") from error
    graph = inferred.graph
    types = {
        value.name: int(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    types.update({tensor.name: int(tensor.data_type) for tensor in graph.initializer})
    return types


def largest_values(proto: Any, inputs: npt.NDArray[Any], *, threads: int = 1) -> dict[str, float]:
    """Measure the maximum absolute value of each float value of the graph on `inputs` (N, C, H, W).

    Raises:
        ExportError: the network cannot be run on these inputs.
    """
    import numpy as np
    import onnx

    types = value_types(proto)
    watched = type(proto)()
    watched.CopyFrom(proto)
    given = {value.name for value in watched.graph.output}
    made = [name for node in watched.graph.node for name in node.output if name]
    for name in made:
        if name not in given and types.get(name) == FLOAT:
            watched.graph.output.append(onnx.helper.make_tensor_value_info(name, FLOAT, None))
    session = open_session(watched.SerializeToString(), threads=threads, optimise=False)
    names = [value.name for value in session.get_outputs()]
    wanted = session.get_inputs()[0]
    size = wanted.shape[0] if isinstance(wanted.shape[0], int) else 1
    largest = dict.fromkeys((wanted.name, *names), 0.0)
    for start in range(0, len(inputs) - len(inputs) % size, size):
        chunk = np.ascontiguousarray(inputs[start : start + size], dtype=np.float32)
        largest[wanted.name] = max(largest[wanted.name], float(np.abs(chunk).max()))
        for name, value in zip(names, run_session(session, {wanted.name: chunk})):
            if value.dtype == np.float32 and value.size:
                largest[name] = max(largest[name], float(np.abs(value).max()))
    return largest
