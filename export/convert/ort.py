"""ONNX Runtime sessions with fixed thread counts, and ONNX Runtime's errors as `ExportError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union

from export.errors import ExportError

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
    options.log_severity_level = 3  # errors only: warnings are about fallbacks of ONNX Runtime
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


def random_feeds(session: Any, *, seed: int = 0, batch: int = 1) -> dict[str, npt.NDArray[Any]]:
    """Random inputs of the network's shapes and types: normally distributed floats, integers 0 and 1.

    Dynamic dimensions are `batch`.

    Raises:
        ExportError: an input is not a tensor of numbers.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for item in session.get_inputs():
        if item.type not in _TYPES:
            raise ExportError(f"Input {item.name} has type {item.type}; a tensor of numbers was expected.")
        shape = [size if isinstance(size, int) and size > 0 else batch for size in item.shape]
        dtype: np.dtype[Any] = np.dtype(_TYPES[item.type])
        if dtype.kind == "f":
            feeds[item.name] = generator.standard_normal(shape).astype(dtype)
        else:
            feeds[item.name] = generator.integers(0, 2, shape).astype(dtype)
    return feeds


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, without the final dot."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
