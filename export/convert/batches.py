"""Batch sizes of a file, and graphs with a dynamic batch.

A network whose forward converts the batch size to a Python number (`n = int(x.shape[0])`) is traced with that number as
a constant. Two traces with different batch sizes give two graphs that differ only in these constants. Each constant is
expressed as a linear function of the batch size, a * n + b, which is computed from the shape of the input. The caller
verifies the result by running the file with other batch sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Mapping, Sequence, Tuple

from export.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LARGEST = 4096
MOST_TRIED = 32
Shapes = Tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Batch:
    """The minimum, optimum and maximum batch size; all are equal for a fixed batch."""

    least: int
    usual: int
    most: int

    @property
    def open(self) -> bool:
        """Whether the batch is dynamic in the file."""
        return self.least != self.most

    @property
    def label(self) -> str:
        """The part of a file name: "" for batch size 1, "batch4", "batch1-8"."""
        if not self.open:
            return "" if self.most == 1 else f"batch{self.most}"
        return f"batch{self.least}-{self.most}"

    @property
    def tried(self) -> tuple[int, ...]:
        """Batch sizes with which a file is checked; for a dynamic batch also 1 and 3."""
        if not self.open:
            return (self.most,)
        return tuple(sorted({1, 3, *(min(size, MOST_TRIED) for size in (self.least, self.usual, self.most))}))

    def profile(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shapes]:
        """An optimisation profile for the inputs whose first dimension is dynamic; {} for a fixed batch.

        Raises:
            ExportError: an input has another dynamic dimension.
        """
        made: dict[str, Shapes] = {}
        for name, shape in shapes.items():
            if -1 in shape[1:]:
                raise ExportError(
                    f"Input {name} has the shape {list(shape)}: only its first dimension, the batch, may be dynamic.",
                    "Export the network with fixed heights and widths.",
                )
            if shape and shape[0] == -1:
                least, usual, most = ((size, *shape[1:]) for size in (self.least, self.usual, self.most))
                made[name] = (least, usual, most)
        return made


ONE = Batch(1, 1, 1)


def parse_batch(text: str) -> Batch:
    """Parse a batch: `8`, `1..8` (tuned for 8) or `1..4..8` (tuned for 4).

    Raises:
        ExportError: the text has another form, or the sizes are not ascending.
    """
    if not re.fullmatch(r"[0-9]{1,4}(\.\.[0-9]{1,4}){0,2}", text):
        raise ExportError(f"{text!r} is not a batch.", "Write 8, 1..8 or 1..4..8.")
    sizes = [int(part) for part in text.split("..")]
    least, usual, most = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    if not 1 <= least <= usual <= most <= LARGEST:
        raise ExportError(
            f"{text!r} is not a batch: sizes must ascend from at least 1 to at most {LARGEST}.",
            "Write 8, 1..8 or 1..4..8.",
        )
    return Batch(least, usual, most)


SIZES = (11, 13)
"""Batch sizes of the two traces: primes that layers rarely use, so that other constants are not mistaken for them."""

_SCOPE = "/batch"


class NotOpen(ValueError):
    """The reason why two graphs cannot be generalised: a clause that names the node."""


def generalise(first: Any, second: Any) -> Any:
    """Generalise the graph `first`, for batch size `SIZES[0]`, by comparison with `second`, for `SIZES[1]`.

    Changes and returns `first`.

    Raises:
        NotOpen: the graphs differ in more than constants, or in constants that are not linear in the batch size; the
            message names the node.
    """
    _require_alike(first, second)
    constants = [{tensor.name: tensor for tensor in proto.graph.initializer} for proto in (first, second)]
    made = _Made(first.graph)
    for node, other in zip(list(first.graph.node), second.graph.node):
        for place, names in enumerate(zip(node.input, other.input)):
            pair = [known.get(name) for known, name in zip(constants, names)]
            if pair[0] is None or pair[1] is None or _same(pair[0], pair[1]):
                continue
            node.input[place] = made.of(pair[0], pair[1], _described(node, pair[0]))
    made.put_first()
    del first.graph.value_info[:]
    return first


def _require_alike(first: Any, second: Any) -> None:
    nodes = [list(proto.graph.node) for proto in (first, second)]
    stored = [{tensor.name for tensor in proto.graph.initializer} for proto in (first, second)]
    for node, other in zip(*nodes):
        alike = node.op_type == other.op_type and len(node.input) == len(other.input)
        if alike and list(node.attribute) != list(other.attribute):
            alike = False
        for name, its in zip(node.input, other.input):
            alike = alike and (name == its or (name in stored[0] and its in stored[1]))
        if not alike:
            raise NotOpen(f"{node.name} ({node.op_type}) depends on the batch size")
    if len(nodes[0]) != len(nodes[1]):
        counts = " and ".join(f"{len(own)} nodes for {size} inputs" for own, size in zip(nodes, SIZES))
        raise NotOpen(f"the graph has {counts}")


def _same(one: Any, other: Any) -> bool:
    from onnx import numpy_helper

    if one.dims != other.dims or one.data_type != other.data_type:
        return False
    if one.raw_data or other.raw_data:
        return bool(one.raw_data == other.raw_data)
    return bool((numpy_helper.to_array(one) == numpy_helper.to_array(other)).all())


def _described(node: Any, tensor: Any) -> str:
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    said = str(values.tolist()) if values.size <= 8 else f"shape {list(values.shape)}"
    return f"{node.name} ({node.op_type}) has a constant that depends on the batch: {said} for {SIZES[0]} inputs"


class _Made:
    """Creates the nodes that compute values from the batch size, to insert before all others."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._nodes: list[Any] = []
        self._known: dict[tuple[Any, ...], str] = {}

    def of(self, one: Any, other: Any, what: str) -> str:
        """The name of a value that is `one` for the first batch size and `other` for the second."""
        from onnx import numpy_helper

        first, second = numpy_helper.to_array(one), numpy_helper.to_array(other)
        if first.shape == second.shape and first.dtype == second.dtype:
            return self._line(first, second, what)
        return self._repeated(first, second, what)

    def put_first(self) -> None:
        """Insert the created nodes before those of the graph."""
        rest = list(self._graph.node)
        del self._graph.node[:]
        self._graph.node.extend([*self._nodes, *rest])

    def _line(self, first: npt.NDArray[Any], second: npt.NDArray[Any], what: str) -> str:
        """Compute `slope * batch + start` for each element."""
        import numpy as np

        if first.dtype.kind not in "iuf":
            raise NotOpen(what)
        rise = second.astype(np.float64) - first.astype(np.float64)
        slope = rise / (SIZES[1] - SIZES[0])
        start = first - slope * SIZES[0]
        if first.dtype.kind != "f" and not (np.mod(slope, 1) == 0).all():
            raise NotOpen(what)
        value = self._batch(first.ndim, first.dtype)
        for kind, factor, nothing in (("Mul", slope, 1), ("Add", start, 0)):
            if first.size > 1 or factor != nothing:
                value = self._node(kind, [value, self._constant(factor.astype(first.dtype))])
        return value

    def _repeated(self, first: npt.NDArray[Any], second: npt.NDArray[Any], what: str) -> str:
        """Repeat a constant along one axis, by a factor that depends on the batch size."""
        import numpy as np

        shapes = np.array([first.shape, second.shape]) if first.ndim == second.ndim else np.zeros((2, 0))
        axes = np.flatnonzero(shapes[0] != shapes[1])
        if len(axes) != 1 or first.dtype != second.dtype:
            raise NotOpen(what)
        row = np.take(first, [0], axis=axes[0])
        if not all((values == row).all() for values in (first, second)):
            raise NotOpen(what)
        shape = self._line(shapes[0].astype(np.int64), shapes[1].astype(np.int64), what)
        return self._node("Expand", [self._constant(row), shape])

    def _batch(self, axes: int, dtype: np.dtype[Any]) -> str:
        """The batch size as a tensor with `axes` dimensions of size 1."""
        import numpy as np
        from onnx import helper

        shape = self._node("Shape", [self._graph.input[0].name])
        size = self._node("Gather", [shape, self._constant(np.zeros((1,) * axes, np.int64))], axis=0)
        return (
            size
            if dtype == np.int64
            else self._node("Cast", [size], to=helper.np_dtype_to_tensor_dtype(dtype))
        )

    def _constant(self, values: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        key = ("constant", str(values.dtype), values.shape, values.tobytes())
        if key not in self._known:
            self._known[key] = f"{_SCOPE}/constant_{len(self._known)}"
            self._graph.initializer.append(numpy_helper.from_array(values.copy(order="C"), self._known[key]))
        return self._known[key]

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        key = (kind, *inputs, *sorted(attributes.items()))
        if key not in self._known:
            name = f"{_SCOPE}/{kind}_{len(self._known)}"
            self._known[key] = f"{name}_output_0"
            self._nodes.append(helper.make_node(kind, inputs, [self._known[key]], name=name, **attributes))
        return self._known[key]


def open_file(content: bytes) -> bytes:
    """Make the batch of an ONNX file with batch size 1 dynamic in its inputs, outputs and reshapes."""
    import onnx

    proto = onnx.load_model_from_string(content)
    graph = proto.graph
    for value in (*graph.input, *graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if dimensions and dimensions[0].dim_value == 1:
            dimensions[0].dim_param = "batch"
    del graph.value_info[:]
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape" and len(node.input) > 1}
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor) if tensor.name in shapes else None
        if values is not None and values.ndim == 1 and len(values) > 1 and values[0] == 1:
            values = values.copy()
            values[0] = 0  # 0 in the shape of a Reshape copies the size of the input
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return bytes(proto.SerializeToString())
