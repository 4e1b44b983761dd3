"""ONNX files in the precision in which they are timed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.latency.request import Request
from compressor.latency.schema import Precision
from export.convert.calibrated import TENSORRT
from export.convert.half import convert_half
from export.convert.onnx_header import OnnxHeader, parse_header
from export.convert.quantize import quantize_onnx

if TYPE_CHECKING:
    import numpy.typing as npt

_CALIBRATION = 4
"""Fewest inputs from which the ranges of a network that is only timed come."""


def in_precision(content: bytes, precision: Precision, runtime: str = TENSORRT) -> bytes:
    """Convert an FP32 ONNX file to the precision to be timed on a runtime; INT8 ranges come from random inputs."""
    if precision == "fp32":
        return content
    with tempfile.TemporaryDirectory(prefix="compressor-bundle-") as folder:
        source, goal = Path(folder) / "network.onnx", Path(folder) / "converted.onnx"
        source.write_bytes(content)
        if precision == "fp16":
            convert_half(source, goal)
        else:
            rest = "fp16" if runtime == TENSORRT else "fp32"  # as it is delivered
            quantize_onnx(source, goal, any_inputs(parse_header(content, "the network")), runtime=runtime, rest=rest)
        return goal.read_bytes()


def any_inputs(header: OnnxHeader) -> npt.NDArray[np.float32]:
    """Return random inputs of a network, at least a batch, for the ranges of one that is only timed."""
    batch, *shape = header.shapes[header.inputs[0]]
    return np.random.default_rng(0).standard_normal((max(_CALIBRATION, batch), *shape)).astype(np.float32)


def in_precision_beside(dense: Path, slim: Path, request: Request, runtime: str) -> tuple[bytes, bytes]:
    """Return two FP32 files as a runtime runs them; a delivered file of the precision beside `slim` takes its place."""

    def converted(path: Path) -> bytes:
        return in_precision(path.read_bytes(), request.precision, runtime)

    delivered = delivered_beside(slim, request.precision)
    return converted(dense), delivered.read_bytes() if delivered.is_file() else converted(slim)


def delivered_beside(slim: Path, precision: str) -> Path:
    """Return where the delivered file of a precision lies beside an FP32 file."""
    return slim if precision == "fp32" else slim.with_name(f"{slim.stem}.{precision}.onnx")
