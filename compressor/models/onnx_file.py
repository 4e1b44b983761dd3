"""ONNX files as networks: refused with reasons where they cannot be read, simplified, and compared with ONNX Runtime.

A file is first simplified by ONNX Runtime, for a batch of one if its batch is open: shapes become constants, and what
depends on constants alone is computed. The simplified file is what a network is read from, now and later: it is kept in
the cache folder by its checksum, and in the folder of a run, so that a network is rebuilt from data and no code that a
file names.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, write_atomic
from export.convert.onnx_header import NEWEST_OPSET, OnnxHeader, parse_header
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes

if TYPE_CHECKING:
    from torch import nn

NETWORK = "network.onnx"
"""Name of a simplified file in the folder of a run, beside the pruned network that is rebuilt with it."""

SUFFIX = ".onnx"
PREFIX = "onnx:"
"""Begins the name of a simplified file's network; its checksum follows."""

TRIED = 4
"""Random inputs on which a network is compared with its file."""

TOLERANCE = 1e-4
"""Largest difference, in proportion to outputs above 1."""

_QUANTISED = (
    "QuantizeLinear", "DequantizeLinear", "QLinear", "DynamicQuantize", "ConvInteger", "MatMulInteger", "QGemm"
)  # fmt: skip
_MARK = "compressor_simplified"
"""Key in the metadata of a simplified file, which is not simplified again: the name of the original file."""

_NETWORK = "Give the network itself: a name with --weights FILE, or package.module:factory."


def is_file(name: str) -> bool:
    """Whether a network's name is that of an ONNX file, or of one that was read."""
    return name.endswith(SUFFIX) or name.startswith(PREFIX)


@dataclass(frozen=True)
class OnnxSource:
    """A simplified ONNX file.

    Attributes:
        content: Its bytes.
        shape: Channels, height and width of an input.
        outputs: Shape of the output for one input, without the batch.
        metadata: The original file's key-value pairs.
    """

    content: bytes
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    metadata: dict[str, str]

    @property
    def name(self) -> str:
        """The name by which it is found in the cache."""
        return _name_of(self.content)

    @property
    def title(self) -> str:
        """The name of the original file."""
        return self.metadata.get(_MARK, "the ONNX file")

    @property
    def image_size(self) -> int | str:
        """Height and width of an input, as a recipe has them."""
        _, high, wide = self.shape
        return high if high == wide else f"{high}x{wide}"

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """The preprocessing that the file states, as `data.Preprocessing.to_dict` writes it; None if it states none."""
        try:
            found = json.loads(self.metadata.get("preprocessing", ""))
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def network(self) -> nn.Module:
        """Read the network.

        Raises:
            CompressorError: An operator is not read.
        """
        from compressor.models.onnx_network import read_network

        return read_network(self.content, self.title)


def open_onnx(name: str) -> OnnxSource:
    """Return a file by its path, simplified and kept in the cache, or a simplified one by its name.

    Raises:
        CompressorError: It cannot be read; the message says why.
    """
    if name.startswith(PREFIX):
        return open_kept(_place(name), name)
    try:
        content = read_bytes(Path(name), "ONNX file")
        header = parse_header(content, name)
        _require_readable(header, name)
        source = _of(content if _MARK in header.metadata else _simplified(content, header, name))
    except ExportError as error:
        raise CompressorError(error.message, error.hint) from None
    write_atomic(_place(source.name), source.content)
    return source


def open_kept(path: Path, name: str) -> OnnxSource:
    """Return a simplified file that was kept in a folder.

    Args:
        path: The file.
        name: Its name, with the checksum.

    Raises:
        CompressorError: It is missing, or not the file of this name.
    """
    try:
        content = read_bytes(path, "ONNX file")
    except ExportError as error:
        raise CompressorError(
            f"{error.message.rstrip('.')}: the network was read from it.",
            "Start with --model FILE.onnx, or load the folder of its run.",
        ) from None
    if _name_of(content) != name:
        raise CompressorError(
            f"{path} is not the file that the network was read from: its checksum differs.",
            "Use the original, unmodified files.",
        )
    return _of(content)


def require_equal(network: nn.Module, source: OnnxSource, name: str) -> float:
    """Compare a network with the file that it was read from, in ONNX Runtime on random inputs.

    Returns:
        The largest difference.

    Raises:
        CompressorError: Their outputs differ; the message has the numbers.
    """
    import torch

    from compressor.models.computed import evaluated
    from export.convert.ort import onnx_outputs

    inputs = np.random.default_rng(0).standard_normal((TRIED, *source.shape)).astype(np.float32)
    right = onnx_outputs(source.content, inputs)[0]
    with evaluated(network), torch.no_grad():
        found = network(torch.from_numpy(inputs)).numpy()
    if found.shape != right.shape:
        raise CompressorError(
            f"{name} was read as a network whose outputs have the shape {list(found.shape)}, in ONNX Runtime "
            f"{list(right.shape)}.",
            _NETWORK,
        )
    largest, allowed = float(np.abs(found - right).max()), TOLERANCE * max(1.0, float(np.abs(right).max()))
    if not largest <= allowed:
        raise CompressorError(
            f"{name} was read as a network whose outputs differ from ONNX Runtime's by up to {largest:.2g}, on "
            f"{TRIED} random inputs; {allowed:.2g} is allowed.",
            _NETWORK,
        )
    return largest


def _of(content: bytes) -> OnnxSource:
    import onnx

    header = parse_header(content, "the ONNX file")
    (result,) = onnx.load_model_from_string(content).graph.output
    return OnnxSource(content, header.shapes[header.inputs[0]][1:], _sizes(result)[1:], header.metadata)


def _sizes(value: Any) -> tuple[int, ...]:
    """Return the shape of a graph's value; 0 for sizes that are not fixed."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _require_readable(header: OnnxHeader, name: str) -> None:
    """Refuse a file that is not a network of one image in FP32.

    Raises:
        CompressorError: Says why.
    """
    quantised = sorted({node.kind for node in header.nodes if node.kind.startswith(_QUANTISED)})
    foreign = sorted({f"{node.domain}:{node.kind}" for node in header.nodes if node.domain not in ("", "ai.onnx")})
    float_file = "Give the FP32 file that it was made from."
    shape = header.shapes[header.inputs[0]] if len(header.inputs) == 1 else ()
    for wrong, problem, hint in (
        (quantised, f"has quantised operators ({', '.join(quantised[:4])})", float_file),
        (header.half_weights, "has weights in half precision", float_file),
        (foreign, f"has operators that ONNX does not define ({', '.join(foreign[:4])})", _NETWORK),
        (header.external_data, "has its weights in other files", "Save it as one: onnx.save(onnx.load(FILE), NEW)."),
        (header.opset > NEWEST_OPSET, f"has opset {header.opset}; up to {NEWEST_OPSET} are read", "Export opset 17."),
        (
            len(header.inputs) != 1 or len(header.outputs) != 1,
            f"has {len(header.inputs)} inputs and {len(header.outputs)} outputs; one image and one output are read",
            _NETWORK,
        ),
        (
            len(shape) != 4 or min(shape[1:], default=0) < 1 or shape[1] not in (1, 3),
            f"takes {list(shape)}; images [N, 3, HEIGHT, WIDTH] of fixed size, or of 1 channel, are read",
            "Export it for one image size; the batch may be open.",
        ),
    ):
        if wrong:
            raise CompressorError(f"{name} {problem}.", hint)


def _simplified(content: bytes, header: OnnxHeader, name: str) -> bytes:
    """Return a file of a fixed batch in which ONNX Runtime has computed what does not depend on the input.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """
    import onnx

    from export.convert.ort import CPU, first_line, ort_errors, runtime

    proto = onnx.load_model_from_string(content)
    batch = max(1, header.shapes[header.inputs[0]][0])  # an open one is -1
    constants = {item.name for item in proto.graph.initializer}
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name not in constants and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    for item in [value for value in proto.graph.input if value.name in constants]:  # as of ONNX before 1.4
        proto.graph.input.remove(item)
    del proto.graph.value_info[:]
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="compressor-onnx-") as folder:
        path = Path(folder) / "simple.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=list(CPU))
        except ort_errors() as error:
            raise ExportError(f"ONNX Runtime cannot load {name}: {first_line(error)}.") from error
        simple = onnx.load(str(path))
    (known,) = onnx.shape_inference.infer_shapes(simple).graph.output
    simple.graph.output[0].CopyFrom(known)
    if (shape := _sizes(known))[:1] != (batch,) or len(shape) < 2 or min(shape) < 1:
        raise ExportError(
            f"{name} gives an output of shape {list(shape)} for a batch of {batch}; [{batch}, ...] of fixed size is "
            "read.",
            _NETWORK,
        )
    del simple.metadata_props[:]
    for key, value in sorted({**header.metadata, _MARK: Path(name).name}.items()):
        simple.metadata_props.add(key=key, value=value)
    return bytes(simple.SerializeToString(deterministic=True))


def _name_of(content: bytes) -> str:
    return f"{PREFIX}{sha256_bytes(content)}"


def _place(name: str) -> Path:
    checksum = name.removeprefix(PREFIX)
    if not re.fullmatch("[0-9a-f]{64}", checksum):
        raise CompressorError(f"{name[:200]!r} is not the name of an ONNX file that was read.")
    return cache_folder() / "onnx" / f"{checksum}{SUFFIX}"
