"""Runs ONNX files with ONNX Runtime: sessions with fixed thread counts, outputs, and top-1 accuracy."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union

from export.convert.batches import open_file
from export.errors import ExportError
from export.files import read_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ModelSource = Union[str, Path, bytes]
"""The path or the bytes of an ONNX file."""

CPU = ("CPUExecutionProvider",)
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
_MOST = 64  # largest batch of `accuracy_onnx`
_VALUES = 1 << 20  # input values of its largest batch: more than the CPU caches hold are slower per input
_CHECKED_ON = 8
_SAME = 1e-4  # of the largest output: rounding, which depends on the blocking of matrix products


def runtime() -> ModuleType:
    """Import the `onnxruntime` module.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ExportError("ONNX Runtime is not installed.", "Install it with: pip install onnxruntime") from None
    return onnxruntime  # type: ignore[no-any-return]


@functools.cache
def saturates() -> bool:
    """Whether INT8 is inexact on this machine's CPU: sums of two products of uint8 and int8 are cut off at 16 bits.

    x86 CPUs without VNNI do so. Whether this one does is tried with the largest values, whose product is known.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    values, weights = np.full((16, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["values", "weights"], ["sums"])],
        "largest",
        [helper.make_tensor_value_info("values", TensorProto.UINT8, values.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [16, 16])],
        [numpy_helper.from_array(weights, "weights")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (found,) = run_session(open_session(proto.SerializeToString()), {"values": values})
    return bool((found != 64 * 255 * 127).any())


def ort_errors() -> tuple[type[Exception], ...]:
    """All exception classes of ONNX Runtime; they have no common base class."""
    runtime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = [getattr(state, name) for name in dir(state)]
    own = [item for item in classes if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, ValueError)


def describe(model: ModelSource) -> str:
    """The model's name in messages."""
    return f"the network ({len(model)} bytes in memory)" if isinstance(model, bytes) else str(model)


def available_cores() -> int:
    """Number of cores that this process may run on, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int) -> None:
    """Refuse more threads than cores: they wait for one another, and take the cores of all other processes.

    Raises:
        ExportError: This process has fewer cores.
    """
    cores = available_cores()
    if threads > cores:
        raise ExportError(
            f"{threads} threads were requested, and the number of cores available to this process is {cores}.",
            f"Use --threads {cores}{' or fewer' if cores > 1 else ''}, or a machine with more cores.",
        )


def open_session(
    model: ModelSource, *, threads: int = 1, providers: Sequence[str] = CPU, optimise: bool = True
) -> Any:
    """Open an `onnxruntime.InferenceSession` with `threads` threads and all graph optimisations.

    Args:
        model: The file or its bytes.
        threads: Intra-op threads; operators run sequentially.
        providers: Execution providers in order of preference.
        optimise: Whether to enable all graph optimisations; False runs the graph unchanged.

    Raises:
        ExportError: the file does not exist, or ONNX Runtime cannot load it.
    """
    if threads < 1:
        raise ExportError(f"ONNX Runtime needs at least one thread, got {threads}.")
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ExportError(f"There is no ONNX file {model}.")
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4  # fatal ones only: errors are raised, and warnings are about its fallbacks
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=list(providers))
    except ort_errors() as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {describe(model)}: {first_line(error)}.",
            "Export the network again, or install a newer onnxruntime.",
        ) from error


def run_session(session: Any, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Run once; return the outputs in the file's order.

    Raises:
        ExportError: an input has the wrong name, type or shape, or an operator fails.
    """
    try:
        return list(session.run(None, dict(feeds)))
    except ort_errors() as error:
        wanted = ", ".join(f"{item.name} {item.shape} {item.type}" for item in session.get_inputs())
        given = ", ".join(f"{name} {list(value.shape)} {value.dtype}" for name, value in feeds.items())
        raise ExportError(f"The network takes {wanted}, got {given}: {first_line(error)}.") from error


def input_types(session: Any) -> dict[str, str]:
    """Return the numpy type of each of the network's inputs, in order.

    Raises:
        ExportError: an input is not a tensor of numbers.
    """
    found = {}
    for item in session.get_inputs():
        if item.type not in _TYPES:
            raise ExportError(f"Input {item.name} has type {item.type}; a tensor of numbers was expected.")
        found[item.name] = _TYPES[item.type]
    return found


def random_feeds(session: Any, *, seed: int = 0, batch: int = 1) -> dict[str, npt.NDArray[Any]]:
    """Random inputs of the network's shapes and types: normally distributed floats, integers 0 and 1.

    Dynamic dimensions are `batch`.

    Raises:
        ExportError: an input is not a tensor of numbers.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    feeds: dict[str, npt.NDArray[Any]] = {}
    types = input_types(session)
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) and size > 0 else batch for size in item.shape]
        dtype: np.dtype[Any] = np.dtype(types[item.name])
        if dtype.kind == "f":
            feeds[item.name] = generator.standard_normal(shape).astype(dtype)
        else:
            feeds[item.name] = generator.integers(0, 2, shape).astype(dtype)
    return feeds


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, without the final dot."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def portions(count: int, fixed: int | None) -> list[tuple[int, int]]:
    """Split `count` inputs into runs: the first input and the number of inputs of each run.

    Args:
        count: Number of all inputs.
        fixed: Batch size of a run; None for a dynamic batch: 1, then 3, then up to 64, so that a graph that is right
            for only one batch size is detected.

    >>> portions(5, 2), portions(70, None)
    ([(0, 2), (2, 2), (4, 2)], [(0, 1), (1, 3), (4, 64), (68, 2)])
    """
    if fixed is not None:
        return [(start, fixed) for start in range(0, count, fixed)]
    starts = [0, 1, *range(4, count, 64)]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], count]) if start < count]


def padded(chunk: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Repeat the last input until there are `size` inputs."""
    import numpy as np

    return np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])


def onnx_outputs(path: str | Path | bytes, inputs: Any, *, threads: int = 1) -> list[npt.NDArray[np.float32]]:
    """Compute the outputs of an ONNX file for `inputs` (N, ...) with ONNX Runtime: one array for each output.

    A file with a fixed batch runs in batches of that size, the last one padded with its last input; a file with a
    dynamic batch runs as `portions` splits the inputs.

    Args:
        path: The file or its bytes.
        inputs: An array, or a list with one for each input of the file.
        threads: Threads of ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime cannot load the file, or the inputs have the wrong number or shape.
    """
    import numpy as np

    session = open_session(path, threads=threads)
    types, arrays = input_types(session), list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if len(types) != len(arrays):
        raise ExportError(f"{describe(path)} has {len(types)} inputs, expected {len(arrays)}.")
    count = len(arrays[0])
    if count == 0:
        raise ExportError("Outputs need at least one input, got none.")
    declared = session.get_inputs()[0].shape
    fixed = declared[0] if declared and isinstance(declared[0], int) else None
    parts: list[list[npt.NDArray[Any]]] = []
    for start, size in portions(count, fixed):
        chunks = [array[start : start + size] if len(array) == count else array for array in arrays]
        length = len(chunks[0])
        feeds = {
            name: np.ascontiguousarray(padded(chunk, size) if length < size else chunk, dtype=kind)
            for (name, kind), chunk in zip(types.items(), chunks)
        }
        parts.append([np.atleast_1d(value)[:length] for value in run_session(session, feeds)])
    return [np.concatenate(column) for column in zip(*parts)]


def accuracy_onnx(path: str | Path, batches: Iterable[tuple[Any, Any]], *, threads: int = 1) -> float:
    """Measure the top-1 accuracy of a file, 0 to 1; arguments and errors as for `answers_onnx`."""
    answers, labels = answers_onnx(path, batches, threads=threads)
    return float((answers == labels).mean())


def answers_onnx(
    path: str | Path, batches: Iterable[tuple[Any, Any]], *, threads: int = 1
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the classes that a file answers with, and the labels, (N,) each.

    Args:
        path: The file.
        batches: Inputs (N, C, H, W) and labels (N,), as arrays or tensors, in batches of any size.
        threads: Threads of ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime cannot load the file, an input has the wrong shape, or there are no inputs.
    """
    import numpy as np

    session = open_session(path, threads=threads)
    runs = False  # whether `session` was selected
    found: list[Any] = []
    truth: list[Any] = []
    for inputs, labels in batches:
        images, classes = np.asarray(inputs, dtype=np.float32), np.asarray(labels)
        if not runs and len(images):
            session, runs = _for_many(path, session, images[:_CHECKED_ON], threads), True
        wanted = session.get_inputs()[0]
        fixed = isinstance(wanted.shape[0], int)
        size = wanted.shape[0] if fixed else max(1, min(_MOST, _VALUES // max(1, images[:1].size)))
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            given = padded(chunk, size) if fixed else chunk
            scores = run_session(session, {wanted.name: given})[0][: len(chunk)]
            found.append(scores.argmax(axis=1))
        truth.append(classes)
    if not found:
        raise ExportError("Accuracy needs at least one input, got none.")
    return np.concatenate(found), np.concatenate(truth)


def _for_many(path: str | Path, session: Any, images: Any, threads: int) -> Any:
    """A session of the file with a dynamic batch and the same outputs; `session` if there is none.

    The batch of a file with batch size 1 is made dynamic in memory, with the reshapes that depend on it. The result is
    used only if its outputs for a batch of real inputs equal those for each input alone.
    """
    import numpy as np

    wanted = session.get_inputs()[0]
    if wanted.shape[0] != 1 or len(images) < 2:
        return session
    try:
        many = open_session(open_file(read_bytes(Path(path), "ONNX file")), threads=threads)
        together = run_session(many, {wanted.name: images})[0]
    except ExportError:
        return session
    alone = np.concatenate([run_session(session, {wanted.name: image[None]})[0] for image in images])
    if together.shape != alone.shape:
        return session
    largest = max(float(np.abs(alone).max()), 1.0)
    return many if float(np.abs(together - alone).max()) <= _SAME * largest else session
