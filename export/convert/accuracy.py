"""Accuracy of an ONNX file with ONNX Runtime, and INT8 quantisation within an accuracy drop.

    dense = accuracy_onnx("model.onnx", batches())
    kept = quantize_within("model.onnx", "model.int8.onnx", images, score, max_drop=0.005)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from export.convert.onnx_header import parse_header
from export.convert.ort import open_session, run_session
from export.convert.parity import onnx_outputs
from export.convert.quantize import (
    PERCENTILE,
    Calibrated,
    QuantInfo,
    check_calibration,
    quantisable,
    quantize_onnx,
)
from export.errors import ExportError
from export.files import read_bytes, write_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

_JUDGED_ON = 16
_MOST = 64  # largest batch
_VALUES = 1 << 20  # input values of the largest batch: more than the CPU caches hold are slower per input
_CHECKED_ON = 8
_SAME = 1e-4  # of the largest output: rounding, which depends on the blocking of matrix products


def accuracy_onnx(path: str | Path, batches: Iterable[tuple[Any, Any]], *, threads: int = 1) -> float:
    """Measure the top-1 accuracy of a file, 0 to 1.

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
    right = total = 0
    for inputs, labels in batches:
        images, classes = np.asarray(inputs, dtype=np.float32), np.asarray(labels)
        if not runs and len(images):
            session, runs = _for_many(path, session, images[:_CHECKED_ON], threads), True
        wanted = session.get_inputs()[0]
        fixed = isinstance(wanted.shape[0], int)
        size = wanted.shape[0] if fixed else max(1, min(_MOST, _VALUES // max(1, images[:1].size)))
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            missing = size - len(chunk) if fixed else 0
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
            scores = run_session(session, {wanted.name: filled})[0][: len(chunk)]
            right += int((scores.argmax(axis=1) == classes[start : start + size]).sum())
        total += len(images)
    if total == 0:
        raise ExportError("Accuracy needs at least one input, got none.")
    return right / total


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
        many = open_session(_opened(read_bytes(Path(path), "ONNX file")), threads=threads)
        together = run_session(many, {wanted.name: images})[0]
    except ExportError:
        return session
    alone = np.concatenate([run_session(session, {wanted.name: image[None]})[0] for image in images])
    if together.shape != alone.shape:
        return session
    largest = max(float(np.abs(alone).max()), 1.0)
    return many if float(np.abs(together - alone).max()) <= _SAME * largest else session


def _opened(content: bytes) -> bytes:
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


@dataclass(frozen=True)
class WithinInfo:
    """The result of `quantize_within`.

    Attributes:
        quant: The INT8 file.
        before, after: Scores of the FP32 file and of the INT8 file.
        all_int8: Score with all nodes in INT8.
    """

    quant: QuantInfo
    before: float
    after: float
    all_int8: float


def quantize_within(
    source: str | Path,
    target: str | Path,
    calibration: npt.NDArray[Any],
    score: Callable[[Path], float],
    *,
    max_drop: float,
    method: str = "minmax",
    percentile: float = PERCENTILE,
    rest: str = "fp32",
) -> WithinInfo:
    """Quantise to INT8 with at most `max_drop`, keeping as few of the most sensitive nodes in float as possible.

    Args:
        source, target, calibration, method, percentile, rest: As in `quantize_onnx`.
        score: Returns the accuracy of a file, 0 to 1, such as `accuracy_onnx` on the test split.
        max_drop: Maximum drop of the score against the FP32 file, 0 to 1.

    Raises:
        ExportError: as `quantize_onnx`, or no choice of nodes is within `max_drop`; `target` is then unchanged.
    """
    if not 0 <= max_drop < 1:
        raise ExportError(f"The maximum drop must be from 0 to below 1, got {max_drop}.")
    goal = Path(target)
    trial = goal.with_name(f".{goal.name}.trial")
    before = score(Path(source))

    def attempt(keep: list[str]) -> tuple[QuantInfo, float]:
        info = quantize_onnx(
            source, trial, calibration, method=method, percentile=percentile, keep=keep, rest=rest
        )
        return info, score(trial)

    try:
        info, all_int8 = attempt([])
        after = all_int8
        if before - after > max_drop:
            ranked = sensitivities(source, calibration, method=method, percentile=percentile)
            info, after = _fewest([name for name, _ in ranked], attempt, before - max_drop)
        write_bytes(goal, trial.read_bytes())
    finally:
        if trial.exists():
            trial.unlink()
    final = QuantInfo(**{**info.__dict__, "path": goal})
    return WithinInfo(quant=final, before=before, after=after, all_int8=all_int8)


def _fewest(
    ranked: list[str], attempt: Callable[[list[str]], tuple[QuantInfo, float]], least: float
) -> tuple[QuantInfo, float]:
    """Keep 1, 2, 4, ... of the most sensitive nodes until the score suffices, then bisect for the fewest."""
    low, high = 0, 1
    best, tried = 0.0, 0
    while True:
        count = min(high, len(ranked) - 1)
        if count <= tried:
            raise ExportError(
                f"INT8 reaches an accuracy of {best:.2%} at best, with {tried} of {len(ranked)} nodes in float; "
                f"at least {least:.2%} is required.",
                "Allow a larger drop, calibrate on more inputs or by percentile, or use FP16.",
            )
        info, after = attempt(ranked[:count])
        tried = count
        best = max(best, after)
        if after >= least:
            break
        low, high = count, high * 2
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        fewer, reached = attempt(ranked[:middle])
        if reached >= least:
            high, info, after = middle, fewer, reached
        else:
            low = middle
    return attempt(ranked[:high]) if len(info.kept) != high else (info, after)


def sensitivities(
    source: str | Path,
    calibration: npt.NDArray[Any],
    *,
    method: str = "minmax",
    percentile: float = PERCENTILE,
) -> list[tuple[str, float]]:
    """Rank nodes by the effect of quantising each alone: (node, mean absolute output difference), largest first.

    Raises:
        ExportError: as `quantize_onnx`.
    """
    import numpy as np
    import onnx

    content = read_bytes(Path(source), "ONNX file")
    header = parse_header(content, str(source))
    inputs = check_calibration(calibration, header)
    proto = onnx.load_model_from_string(content)
    calibrated = Calibrated(proto, header.inputs[0], inputs, method, percentile)
    judged = inputs[:_JUDGED_ON]
    exact = onnx_outputs(content, judged)[0]
    moved: list[tuple[str, float]] = []
    for name in quantisable(proto):
        single = calibrated.quantise([name]).SerializeToString()
        moved.append((name, float(np.abs(onnx_outputs(single, judged)[0] - exact).mean())))
    return sorted(moved, key=lambda entry: (-entry[1], entry[0]))
