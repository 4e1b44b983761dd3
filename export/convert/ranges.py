"""Value types and value ranges of an ONNX graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.convert.ort import open_session, run_session
from export.errors import ExportError

if TYPE_CHECKING:
    import numpy.typing as npt

FLOAT = 1  # TensorProto.FLOAT


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
