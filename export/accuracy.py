"""Accuracy of an exported file, through ONNX Runtime, and INT8 that keeps it.

dense = accuracy_onnx("model.onnx", batches())
kept = quantize_within("model.onnx", "model.int8.onnx", images, score, max_drop=0.005)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from export.errors import ExportError
from export.files import read_bytes, write_bytes
from export.onnx_header import parse_header
from export.ort import open_session, run_session
from export.parity import onnx_outputs
from export.quantize import PERCENTILE, Calibrated, QuantInfo, check_calibration, quantisable, quantize_onnx

if TYPE_CHECKING:
    import numpy.typing as npt

_JUDGED_ON = 16


def accuracy_onnx(path: str | Path, batches: Iterable[tuple[Any, Any]], *, threads: int = 1) -> float:
    """The share of inputs that a file classifies right, 0 to 1.

    Args:
        path: The file.
        batches: Inputs (N, C, H, W) with labels (N,), as arrays or tensors, of any sizes.
        threads: Threads for ONNX Runtime.

    Raises:
        ExportError: the file is refused, an input does not fit, or there are no inputs.
    """
    import numpy as np

    session = open_session(path, threads=threads)
    wanted = session.get_inputs()[0]
    size = wanted.shape[0] if isinstance(wanted.shape[0], int) else 64
    right = total = 0
    for inputs, labels in batches:
        images, classes = np.asarray(inputs, dtype=np.float32), np.asarray(labels)
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            missing = size - len(chunk) if isinstance(wanted.shape[0], int) else 0
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
            scores = run_session(session, {wanted.name: filled})[0][: len(chunk)]
            right += int((scores.argmax(axis=1) == classes[start : start + size]).sum())
        total += len(images)
    if total == 0:
        raise ExportError("Accuracy can only be measured on at least one input, got none.")
    return right / total


@dataclass(frozen=True)
class WithinInfo:
    """An INT8 file that keeps its accuracy.

    Attributes:
        quant: The file.
        before, after: Score of the FP32 file and of the INT8 file.
        all_int8: Score with every node in INT8.
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
    """Quantise, and keep as few of the most sensitive nodes in floats as it takes to stay within `max_drop`.

    Args:
        source, target, calibration, method, percentile, rest: As in `quantize_onnx`.
        score: The accuracy of a file, 0 to 1, such as `accuracy_onnx` on the test split.
        max_drop: How much lower than the FP32 file's score is accepted, 0 to 1.

    Raises:
        ExportError: as `quantize_onnx`, or no choice of nodes keeps the accuracy; `target` is then left
            alone.
    """
    if not 0 <= max_drop < 1:
        raise ExportError(f"The accepted drop must be from 0 to below 1, got {max_drop}.")
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
    """Keep 1, 2, 4, ... of the most sensitive nodes until the score holds, then as few as hold."""
    low, high = 0, 1
    best, tried = 0.0, 0
    while True:
        count = min(high, len(ranked) - 1)
        if count <= tried:
            raise ExportError(
                f"INT8 keeps an accuracy of {best:.2%} at best, with {tried} of {len(ranked)} nodes in floats; "
                f"at least {least:.2%} was asked for.",
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
    """How much quantising each node alone moves the outputs: (node, mean absolute difference), largest first.

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
