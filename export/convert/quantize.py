"""Quantises an ONNX file to INT8 with Q/DQ pairs that TensorRT 8.5 to 11 support.

ONNX Runtime quantises; these settings make its file suitable for TensorRT:

- symmetric int8 with zero point 0 for activations and weights, per output channel for weights;
- weights stored as floats followed by a Q/DQ pair, because TensorRT 8.x does not accept int8 weights;
- float biases, because TensorRT refuses int32 biases after a DQ, and FP32 scales, because 8.6 misreads FP16 scales;
- pairs only on the inputs of convolutions, matrix products and residual sums, and none on outputs, so that activation
  functions are fused. Without pairs on the sums, INT8 can be slower than FP16.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.half import half_rest
from export.convert.onnx_header import OnnxHeader, parse_header, require_known_opset
from export.convert.ort import first_line, ort_errors
from export.convert.tidy import write_metadata
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

METHODS = ("minmax", "entropy", "percentile")
RESTS = ("fp32", "fp16")
PERCENTILE = 99.99
_CHUNK = 16
_OVERFLOW_INPUTS = 32  # for the detection of FP16 overflow
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_KINDS = [*_WEIGHTED, "Add"]
_BINS = 512  # histogram bins of "entropy": the time grows with their square


@dataclass(frozen=True)
class QuantInfo:
    """The facts of a written INT8 file.

    Attributes:
        path, sha256, size: The file, its checksum and size in bytes; weights are stored as floats.
        method: The calibration method.
        samples: Number of calibration inputs.
        quantised: Nodes that compute in INT8.
        kept: Nodes that could be quantised but stay in float.
    """

    path: Path
    sha256: str
    size: int
    method: str
    samples: int
    quantised: tuple[str, ...]
    kept: tuple[str, ...]


def quantize_onnx(
    source: str | Path,
    target: str | Path,
    calibration: npt.NDArray[Any],
    *,
    method: str = "minmax",
    percentile: float = PERCENTILE,
    keep: Iterable[str] = (),
    only: Iterable[str] | None = None,
    rest: str = "fp32",
) -> QuantInfo:
    """Quantise an FP32 ONNX file to INT8.

    Args:
        source: The FP32 file.
        target: The INT8 file, written atomically.
        calibration: Real inputs (N, C, H, W), preprocessed as for the network; 100 to 500 are usual.
        method: The calibration of activation ranges: "minmax" takes the full range, "entropy" and
            "percentile" clip rare large values.
        percentile: Percentile of the values that "percentile" keeps.
        keep: Names of nodes to keep in float.
        only: Names of the nodes to quantise; None is all that can be quantised.
        rest: Precision of the other nodes, "fp32" or "fp16". TensorRT 10 and newer follow it.

    Raises:
        ExportError: the file is damaged, not FP32 or has nothing to quantise, the calibration inputs are
            missing, constant, not finite or have the wrong shape, or a name is unknown.
    """
    import onnx

    if rest not in RESTS:
        raise ExportError(f"The other nodes compute in {' or '.join(RESTS)}, not in {rest!r}.")
    if method not in METHODS:
        raise ExportError(f"Calibration method {method!r} is unknown: expected one of {', '.join(METHODS)}.")
    content = read_bytes(Path(source), "ONNX file")
    header = parse_header(content, str(source))
    require_known_opset(header, str(source))
    if header.precision != "fp32":
        raise ExportError(f"{source} is {header.precision}; an FP32 file was expected.")
    inputs = check_calibration(calibration, header)
    proto = onnx.load_model_from_string(content)
    able = quantisable(proto)
    if not able:
        raise ExportError(f"{source} has no convolution, product or residual sum to quantise.")
    _check_names(str(source), (*keep, *(only or ())), {node.name for node in header.nodes})
    wanted = set(able if only is None else only) - set(keep)
    chosen = [name for name in able if name in wanted]
    if not chosen:
        raise ExportError(f"{source} has no node left to quantise: all nodes stay in float.")
    made = Calibrated(proto, header.inputs[0], inputs, method, percentile).quantise(chosen)
    if rest == "fp16":
        half_rest(made, inputs[:_OVERFLOW_INPUTS])
    _describe(made, header, method, len(inputs), [name for name in able if name not in chosen], rest)
    onnx.checker.check_model(made, full_check=True)
    written = made.SerializeToString(deterministic=True)
    write_bytes(Path(target), written)
    return QuantInfo(
        path=Path(target),
        sha256=sha256_bytes(written),
        size=len(written),
        method=method,
        samples=len(inputs),
        quantised=tuple(chosen),
        kept=tuple(name for name in able if name not in chosen),
    )


def _describe(made: Any, header: OnnxHeader, method: str, samples: int, kept: list[str], rest: str) -> None:
    """Add the facts of the quantisation to the metadata of the source file."""
    facts: dict[str, Any] = dict(header.metadata)
    facts.update(precision="int8", rest=rest, calibration={"method": method, "samples": samples})
    if kept:
        facts["float_nodes"] = kept
    write_metadata(made, facts)
    made.producer_name, _, made.producer_version = header.producer.partition(" ")


def quantisable(proto: Any) -> list[str]:
    """Names of the nodes to quantise: those with weights, and sums of two activations, in order."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    names = []
    for node in proto.graph.node:
        weighted = node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in stored
        residual = node.op_type == "Add" and not any(name in stored for name in node.input)
        if weighted or residual:
            names.append(node.name)
    return names


def check_calibration(calibration: Any, header: OnnxHeader) -> npt.NDArray[np.float32]:
    """Check the calibration inputs and convert them to float32.

    Raises:
        ExportError: there are none, or they are constant, not finite or do not have the network's input shape.
    """
    import numpy as np

    inputs = np.asarray(calibration, dtype=np.float32)
    wanted = header.shapes[header.inputs[0]]
    if len(header.inputs) != 1:
        raise ExportError(f"A network with one input was expected, got {len(header.inputs)} inputs.")
    if inputs.size == 0:
        raise ExportError("INT8 needs real inputs for calibration, got none.")
    fits = inputs.ndim == len(wanted) and all(
        size in (-1, given) for size, given in zip(wanted[1:], inputs.shape[1:])
    )
    if not fits:
        raise ExportError(
            f"Calibration inputs have the shape {list(inputs.shape)}; the network takes {list(wanted)}.",
            "Preprocess them as for the network: resized, normalised, channels first.",
        )
    if not np.isfinite(inputs).all():
        raise ExportError("Some calibration inputs are not finite.")
    if float(inputs.max()) == float(inputs.min()):
        raise ExportError(
            f"All calibration inputs are {float(inputs.max()):g}; they give no meaningful ranges.",
            "Calibrate on real images.",
        )
    return inputs


def _check_names(source: str, asked: Iterable[str], known: set[str]) -> None:
    unknown = sorted(set(asked) - known)
    if unknown:
        raise ExportError(f"{source} has no node {unknown[0]}.")


class Calibrated:
    """A network with calibrated activation ranges, of which any subset of nodes can be quantised.

    Args:
        proto: The FP32 network.
        name: Name of its input.
        inputs: Checked calibration inputs (N, C, H, W).
        method, percentile: As in `quantize_onnx`.

    Raises:
        ExportError: there are fewer inputs than the network's batch size, or ONNX Runtime cannot run the network.
    """

    def __init__(
        self, proto: Any, name: str, inputs: npt.NDArray[Any], method: str, percentile: float = PERCENTILE
    ) -> None:
        import onnx
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
        if len(inputs) < batch:
            raise ExportError(f"The network takes {batch} inputs at a time, got {len(inputs)} in all.")
        self.proto = proto
        options = {
            "minmax": {"symmetric": True},
            "entropy": {"num_bins": _BINS, "num_quantized_bins": 128, "symmetric": True},
            "percentile": {"num_bins": 2048, "percentile": percentile, "symmetric": True},
        }
        kinds = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        with tempfile.TemporaryDirectory(prefix="quantise.") as folder, _silenced():
            given = Path(folder) / "given.onnx"
            onnx.save(proto, given)
            try:
                calibrator = create_calibrator(
                    given,
                    _KINDS,
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=kinds[method],
                    extra_options=options[method],
                )
                # chunks bound the memory of the network's activations
                for start in range(0, len(inputs) - batch + 1, batch * _CHUNK):
                    calibrator.collect_data(_Reader(name, inputs[start : start + batch * _CHUNK], batch))
                self.ranges = calibrator.compute_data()
            except ort_errors() as error:
                raise ExportError(f"ONNX Runtime cannot calibrate: {first_line(error)}.") from error

    def quantise(self, nodes: list[str]) -> Any:
        """Quantise these nodes: a copy of the network with their Q/DQ pairs."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        copied = onnx.shape_inference.infer_shapes(self.proto)
        quantiser = QDQQuantizer(
            copied,
            True,  # per channel
            False,  # the full range of int8
            QuantType.QInt8,
            QuantType.QInt8,
            self.ranges,
            list(nodes),
            [],
            _KINDS,
            {
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": _KINDS,
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            },
        )
        try:
            with _silenced():
                quantiser.quantize_model()
                quantiser.model.topological_sort()
        except ort_errors() as error:
            raise ExportError(f"ONNX Runtime cannot quantise the network: {first_line(error)}.") from error
        made = quantiser.model.model
        del made.graph.value_info[:]
        return made


class _Reader:
    """Calibration inputs in the interface of ONNX Runtime's calibrators."""

    def __init__(self, name: str, inputs: npt.NDArray[Any], batch: int) -> None:
        whole = len(inputs) - len(inputs) % batch
        self._feeds = iter({name: inputs[place : place + batch]} for place in range(0, whole, batch))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, or None at the end."""
        return next(self._feeds, None)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress the progress output of the calibrators."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
