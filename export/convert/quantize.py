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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from export.convert.half import half_rest, open_fp32
from export.convert.onnx_header import OnnxHeader
from export.convert.ort import first_line, onnx_outputs, ort_errors
from export.convert.tidy import write_metadata
from export.errors import ExportError
from export.files import replacing, sha256_bytes, write_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RESTS = ("fp32", "fp16")
PERCENTILE = 99.99
_CHUNK = 16  # batches at a time, which bounds the memory of the network's activations
_JUDGED_ON = 16  # inputs on which the effect of single nodes is measured
_OVERFLOW_INPUTS = 32  # for the detection of FP16 overflow
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_KINDS = [*_WEIGHTED, "Add"]
_BINS = 512  # histogram bins of "entropy": the time grows with their square
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMax", {}),
    "entropy": ("Entropy", {"num_bins": _BINS, "num_quantized_bins": 128}),
    "percentile": ("Percentile", {"num_bins": 2048}),
}
"""Calibration methods: ONNX Runtime's name and its options."""


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
    proto, header = open_fp32(source)
    inputs = check_calibration(calibration, header)
    able = quantisable(proto)
    if not able:
        raise ExportError(f"{source} has no convolution, product or residual sum to quantise.")
    unknown = sorted({*keep, *(only or ())} - {node.name for node in header.nodes})
    if unknown:
        raise ExportError(f"{source} has no node {unknown[0]}.")
    wanted = set(able if only is None else only) - set(keep)
    chosen = [name for name in able if name in wanted]
    if not chosen:
        raise ExportError(f"{source} has no node left to quantise: all nodes stay in float.")
    made = Calibrated(proto, header.inputs[0], inputs, method, percentile).quantise(chosen)
    if rest == "fp16":
        half_rest(made, inputs[:_OVERFLOW_INPUTS])
    kept = [name for name in able if name not in chosen]
    facts: dict[str, Any] = {
        **header.metadata, "precision": "int8", "rest": rest,
        "calibration": {"method": method, "samples": len(inputs)},
    }  # fmt: skip
    write_metadata(made, {**facts, "float_nodes": kept} if kept else facts)
    made.producer_name, _, made.producer_version = header.producer.partition(" ")
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
        kept=tuple(kept),
    )


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


class Calibrated:
    """A network with calibrated activation ranges, of which any subset of nodes can be quantised.

    `quantize_static` of ONNX Runtime gives the same nodes and weights for these settings, but calibrates for each call:
    ranking the 29 nodes of a ResNet-18 would calibrate 29 times. It also has no setting for the bins of "entropy".

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
        from onnxruntime.quantization import CalibrationMethod, create_calibrator

        batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
        if len(inputs) < batch:
            raise ExportError(f"The network takes {batch} inputs at a time, got {len(inputs)} in all.")
        self.proto = proto
        kind, options = METHODS[method]
        if method == "percentile":
            options = {**options, "percentile": percentile}
        with tempfile.TemporaryDirectory(prefix="quantise.") as folder, _silenced():
            given = Path(folder) / "given.onnx"
            onnx.save(proto, given)
            try:
                calibrator = create_calibrator(
                    given,
                    _KINDS,
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=CalibrationMethod[kind],
                    extra_options={**options, "symmetric": True},
                )
                for start in range(0, len(inputs) - batch + 1, batch * _CHUNK):
                    calibrator.collect_data(_Reader(name, inputs[start : start + batch * _CHUNK], batch))
                self.ranges = calibrator.compute_data()
            except ort_errors() as error:
                raise ExportError(f"ONNX Runtime cannot calibrate: {first_line(error)}.") from error

    def quantise(self, nodes: list[str]) -> Any:
        """Quantise these nodes: a copy of the network with their Q/DQ pairs."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

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
    before = score(Path(source))
    with replacing(goal) as trial:

        def attempt(keep: list[str]) -> tuple[QuantInfo, float]:
            info = quantize_onnx(
                source, trial, calibration, method=method, percentile=percentile, keep=keep, rest=rest
            )
            return info, score(trial)

        info, all_int8 = attempt([])
        after = all_int8
        if before - after > max_drop:
            ranked = sensitivities(source, calibration, method=method, percentile=percentile)
            info, after = _fewest([name for name, _ in ranked], attempt, before - max_drop)
    return WithinInfo(quant=replace(info, path=goal), before=before, after=after, all_int8=all_int8)


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

    proto, header = open_fp32(source)
    inputs = check_calibration(calibration, header)
    calibrated = Calibrated(proto, header.inputs[0], inputs, method, percentile)
    judged = inputs[:_JUDGED_ON]
    exact = onnx_outputs(proto.SerializeToString(), judged)[0]
    moved: list[tuple[str, float]] = []
    for name in quantisable(proto):
        single = calibrated.quantise([name]).SerializeToString()
        moved.append((name, float(np.abs(onnx_outputs(single, judged)[0] - exact).mean())))
    return sorted(moved, key=lambda entry: (-entry[1], entry[0]))
