"""A network with calibrated activation ranges, of which any nodes are quantised to INT8 with Q/DQ pairs.

ONNX Runtime calibrates and inserts the pairs. Runtimes want them in different places (`FORMS`):

- TensorRT 8.5 to 11: symmetric int8 with zero point 0, because nothing else is accepted. Pairs stand on the inputs of
  convolutions, matrix products and residual sums only, and none on outputs, so that activation functions are fused.
  One that is left out reads the value before its pair, even if others read it in INT8: between a dequantised input
  and float weights it would be slower than in FP16.
  Without pairs on the sums, INT8 can be slower than FP16. Biases are floats, because TensorRT refuses int32 biases
  after a DQ, and scales FP32, because 8.6 misreads FP16 scales.
- ONNX Runtime's CPU kernels: a kernel computes in INT8 only between pairs on all inputs and on the output. Activations
  are uint8 with a zero point, so that the range of an output replaces the activation function after it, and poolings
  and reshapes go on in INT8.

Both store weights as floats followed by a pair, because TensorRT 8.x does not accept int8 weights, with one scale for
each output channel. Where ONNX Runtime's sums on this machine's CPU saturate, weights have 7 bits (`weight_levels`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.half import FUSED
from export.convert.onnx_header import OnnxHeader
from export.convert.ort import first_line, ort_errors, saturates
from export.convert.tidy import module_path
from export.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PERCENTILE = 99.99
TENSORRT, ONNXRUNTIME = "tensorrt", "onnxruntime"
_CHUNK = 16  # batches at a time, which bounds the memory of the network's activations
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BINS = 512  # histogram bins of "entropy": the time grows with their square
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMax", {}),
    "entropy": ("Entropy", {"num_bins": _BINS, "num_quantized_bins": 128}),
    "percentile": ("Percentile", {"num_bins": 2048}),
}
"""Calibration methods: ONNX Runtime's name and its options."""


@dataclass(frozen=True)
class Form:
    """Where a runtime wants Q/DQ pairs, and of which type.

    Attributes:
        symmetric: Whether activations are int8 with zero point 0; else uint8 with a zero point.
        followers: Kinds of nodes that get pairs, and compute in INT8, if the node before them does.
        fused: Kinds of nodes without pairs that are computed in the kernel of the node before them.
        options: Options of ONNX Runtime's quantiser.
    """

    symmetric: bool
    followers: tuple[str, ...]
    fused: tuple[str, ...]
    options: dict[str, Any]


_KINDS = (*_WEIGHTED, "Add")
_ACTIVATIONS = ("Relu", "Clip")
_SAME_VALUES = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_PRODUCTS = ("Gemm", "MatMul")  # ONNX Runtime's kernels for them write floats
FORMS = {
    TENSORRT: Form(
        symmetric=True,
        followers=(),
        fused=FUSED,
        options={"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": list(_KINDS)},
    ),
    ONNXRUNTIME: Form(
        symmetric=False,
        followers=(
            *_ACTIVATIONS, "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Slice", "Pad",
        ),
        fused=(),
        options={"QuantizeBias": True, "OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
    ),
}  # fmt: skip
"""Runtime -> form of its INT8 networks."""

LEVELS, REDUCED_LEVELS = 127, 64
"""Largest whole number of a weight of 8 and of 7 bits, as ONNX Runtime's quantiser has them."""


def weight_levels(runtime: str) -> int:
    """Return the largest whole number of a weight in INT8 files for a runtime; ONNX Runtime is taken to run here."""
    return REDUCED_LEVELS if runtime == ONNXRUNTIME and saturates() else LEVELS


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


def following(proto: Any, nodes: Collection[str], kinds: Collection[str]) -> list[str]:
    """Names of the nodes of these kinds whose activations come from `nodes`, or from other such nodes."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    made: set[str] = set()
    found = []
    for node in proto.graph.node:
        values = {name for name in node.input if name and name not in stored}
        follows = node.op_type in kinds and bool(values) and values <= made
        if follows:
            found.append(node.name)
        if follows or node.name in nodes:
            made.update(node.output)
    return found


def enclosed(proto: Any, nodes: Collection[str], runtime: str) -> list[str]:
    """Names of the nodes that compute in INT8 if these are quantised: they, and those that cannot stay in floats.

    A value has a pair for all its users if its maker or one of its users is quantised. ONNX Runtime computes everything
    in INT8 that stands between pairs, and rounds float weights there with one scale for a whole tensor. A node whose
    values all have pairs is therefore quantised as well.
    """
    form, chosen = FORMS[runtime], set(nodes)
    able = quantisable(proto)
    if form.symmetric:
        return [name for name in able if name in chosen]
    stored = {tensor.name for tensor in proto.graph.initializer}
    by_name = {node.name: node for node in proto.graph.node}
    users: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def result(node: Any) -> str:
        """The value that a kernel writes: after the activation function, if there is one."""
        after = users.get(node.output[0], [])
        fused = len(after) == 1 and after[0].op_type in _ACTIVATIONS
        return str(after[0].output[0] if fused else node.output[0])

    while True:
        paired: set[str] = set()
        for name in (*chosen, *following(proto, chosen, form.followers)):
            node = by_name[name]
            paired.update(value for value in node.input if value not in stored)
            if node.op_type not in _PRODUCTS:
                paired.add(result(node))
        more = {
            name
            for name in able
            if name not in chosen
            and result(by_name[name]) in paired
            and all(value in paired for value in by_name[name].input if value not in stored)
        }
        if not more:
            return [name for name in able if name in chosen]
        chosen |= more


def trained_ranges(
    proto: Any, trained: Mapping[str, tuple[float, float]], *, symmetric: bool
) -> dict[str, tuple[float, float]]:
    """Return the ranges of activations by the ranges of modules' inputs.

    Modules that read one activation have seen the same numbers; their widest range counts. What was only reshaped, or
    the largest of some values, has the range before that too, because the quantiser takes it from there.

    Args:
        proto: The FP32 network, whose nodes are named after its modules.
        trained: Qualified name of a module -> least and largest input.
        symmetric: Whether ranges have zero in the middle.
    """
    found: dict[str, tuple[float, float]] = {}
    able = set(quantisable(proto))
    made_by = {name: node for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        low, high = trained.get(module_path(node.name), (0.0, 0.0))
        if node.name in able and node.op_type in _WEIGHTED and low < high:
            if symmetric:
                low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
            name = node.input[0]
            while name:
                before = found.get(name, (low, high))
                found[name] = min(low, before[0]), max(high, before[1])
                maker = made_by.get(name)
                name = maker.input[0] if maker is not None and maker.op_type in _SAME_VALUES else ""
    return found


class Calibrated:
    """A network with calibrated activation ranges, of which any subset of nodes can be quantised.

    `quantize_static` of ONNX Runtime gives the same nodes and weights for these settings, but calibrates for each call:
    ranking the 29 nodes of a ResNet-18 would calibrate 29 times. It also has no setting for the bins of "entropy".

    Args:
        proto: The FP32 network.
        name: Name of its input.
        inputs: Checked calibration inputs (N, C, H, W).
        method, percentile, runtime, trained: As in `quantize_onnx`.

    Attributes:
        trained: Activations whose ranges are those of a training.
        levels: Largest whole number of a weight.

    Raises:
        ExportError: there are fewer inputs than the network's batch size, or ONNX Runtime cannot run the network.
    """

    def __init__(
        self,
        proto: Any,
        name: str,
        inputs: npt.NDArray[Any],
        method: str,
        percentile: float = PERCENTILE,
        runtime: str = TENSORRT,
        trained: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        import numpy as np
        import onnx
        from onnxruntime.quantization import CalibrationMethod, create_calibrator
        from onnxruntime.quantization.calibrate import TensorData

        batch = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
        if len(inputs) < batch:
            raise ExportError(f"The network takes {batch} inputs at a time, got {len(inputs)} in all.")
        self.proto, self.inputs, self.method, self.runtime = proto, inputs, method, runtime
        self.form, self.levels = FORMS[runtime], weight_levels(runtime)
        self._kinds = [*_KINDS, *self.form.followers]
        kind, options = METHODS[method]
        if method == "percentile":
            options = {**options, "percentile": percentile}
        with tempfile.TemporaryDirectory(prefix="quantise.") as folder, _silenced():
            given = Path(folder) / "given.onnx"
            onnx.save(proto, given)
            try:
                calibrator = create_calibrator(
                    given,
                    self._kinds,
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=CalibrationMethod[kind],
                    extra_options={**options, "symmetric": self.form.symmetric},
                )
                for start in range(0, len(inputs) - batch + 1, batch * _CHUNK):
                    calibrator.collect_data(_Reader(name, inputs[start : start + batch * _CHUNK], batch))
                self.ranges = calibrator.compute_data()
            except ort_errors() as error:
                raise ExportError(f"ONNX Runtime cannot calibrate: {first_line(error)}.") from error
        known = trained_ranges(proto, trained or {}, symmetric=self.form.symmetric)
        self.trained = tuple(name for name in known if name in self.ranges)
        for activation in self.trained:
            low, high = (np.array(value, dtype=np.float32) for value in known[activation])
            self.ranges[activation] = TensorData(lowest=low, highest=high)

    def with_weights(self, proto: Any) -> Calibrated:
        """Return the network with the weights of another one of its structure, and the same ranges."""
        found = copy.copy(self)
        found.proto = proto
        return found

    def quantise(self, nodes: Sequence[str], *, float_biases: bool = False) -> Any:
        """Quantise these nodes, and those that go on in INT8 after them: a copy of the network with Q/DQ pairs.

        Args:
            nodes: Their names.
            float_biases: Whether biases stay floats, whatever the runtime wants.
        """
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        copied = onnx.shape_inference.infer_shapes(self.proto)
        form = self.form
        quantiser = QDQQuantizer(
            copied,
            True,  # per channel
            self.levels < LEVELS,
            QuantType.QInt8,
            QuantType.QInt8 if form.symmetric else QuantType.QUInt8,
            self.ranges,
            [*nodes, *following(self.proto, set(nodes), form.followers)],
            [],
            self._kinds,
            {
                "ActivationSymmetric": form.symmetric,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                **form.options,
                **({"QuantizeBias": False} if float_biases else {}),
            },
        )
        try:
            with _silenced():
                quantiser.quantize_model()
                quantiser.model.topological_sort()
        except ort_errors() as error:
            raise ExportError(f"ONNX Runtime cannot quantise the network: {first_line(error)}.") from error
        made = quantiser.model.model
        if form.symmetric:
            _unpaired(made.graph, set(quantisable(self.proto)) - set(nodes))
        del made.graph.value_info[:]
        return made


def _unpaired(graph: Any, names: Collection[str]) -> None:
    """Let these nodes read values as they are before their pairs, which the quantiser puts before all users."""
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.name in names:
            for place, name in enumerate(node.input):
                if name in made_by and made_by[name].op_type == "DequantizeLinear":
                    node.input[place] = made_by[made_by[name].input[0]].input[0]


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
