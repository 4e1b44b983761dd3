"""Reads the header of an ONNX file without the `onnx` package.

A device with TensorRT and numpy does not have `onnx`. TensorRT's parser does not validate files: it accepts an empty
file as a network without layers, and unknown opsets. This module reads the needed fields directly from the protocol
buffer (onnx.proto: ModelProto, GraphProto, NodeProto).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from export.errors import ExportError
from export.files import read_bytes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT16 = 10
NEWEST_OPSET = 20
_HINT = "Export the network again, and copy all of the file."


@dataclass(frozen=True)
class Node:
    """One operator: its name, type and domain ("" is the ONNX domain)."""

    name: str
    kind: str
    domain: str


@dataclass(frozen=True)
class OnnxHeader:
    """The facts of an ONNX file.

    Attributes:
        ir_version: Version of the file format.
        opset: Version of the ONNX operators.
        domains: Versions of the operators of other domains.
        producer: Name and version of the program that wrote the file.
        metadata: The file's key-value pairs.
        nodes: Its operators, in order.
        inputs: Names of the inputs that are not initialisers.
        shapes: Shape of each input; a dynamic dimension is -1.
        outputs: Names of the outputs.
        half_weights: Whether some weights are stored in half precision.
        external_data: Whether weights are stored in other files.
    """

    ir_version: int
    opset: int
    domains: dict[str, int]
    producer: str
    metadata: dict[str, str]
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    half_weights: bool
    external_data: bool

    @property
    def precision(self) -> str:
        """The precision of its tensors: "int8" with Q/DQ nodes, "fp16" with some FP16 weights, else "fp32"."""
        if any(node.kind == "QuantizeLinear" for node in self.nodes):
            return "int8"
        return "fp16" if self.half_weights else "fp32"


def read_header(path: str | Path) -> OnnxHeader:
    """Read the header of an ONNX file.

    Raises:
        ExportError: the file is missing, empty, truncated, or not an ONNX file.
    """
    return parse_header(read_bytes(Path(path), "ONNX file"), str(path))


def require_known_opset(header: OnnxHeader, name: str) -> None:
    """Refuse a file with a newer opset than any TensorRT reads.

    Raises:
        ExportError: the message names the opset.
    """
    if header.opset > NEWEST_OPSET:
        raise ExportError(
            f"{name} has ONNX opset {header.opset}; the newest that TensorRT reads is {NEWEST_OPSET}.",
            "Export it again with opset 17.",
        )


def parse_header(content: bytes, name: str = "the ONNX file") -> OnnxHeader:
    """Parse the header from the bytes of an ONNX file; messages call the file `name`.

    Raises:
        ExportError: as `read_header`.
    """
    if not content:
        raise ExportError(f"{name} is empty.", _HINT)
    try:
        header = _model(memoryview(content))
    except (ValueError, IndexError) as error:
        raise ExportError(f"{name} is truncated or not an ONNX file: {error}.", _HINT) from error
    if not header.ir_version or not header.opset or not header.nodes:
        missing = "operators" if header.ir_version and header.opset else "version"
        raise ExportError(f"{name} is not an ONNX network: it has no {missing}.", _HINT)
    return header


Field = Union[int, memoryview]


def _fields(data: memoryview) -> Iterator[tuple[int, Field]]:
    """Iterate over the fields of a message: field number, and its integer value or its bytes."""
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field has the number 0")
        value: Field
        if kind == _VARINT:
            value, place = _varint(data, place)
        else:
            if kind == _BYTES:
                length, place = _varint(data, place)
            elif kind in (_FIXED32, _FIXED64):
                length = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"a field has the unknown wire type {kind}")
            if place + length > end:
                raise ValueError(f"a field of {length} bytes has only {end - place}")
            value, place = data[place : place + length], place + length
        yield number, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError("a number is too long")


def _text(value: Field) -> str:
    return bytes(_message(value)).decode("utf-8")


def _message(value: Field) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field is a number, expected a message")
    return value


def _number(value: Field) -> int:
    if not isinstance(value, int):
        raise ValueError("a field is a message, expected a number")
    return value


def _model(data: memoryview) -> OnnxHeader:
    ir_version, producer, graph = 0, ["", ""], memoryview(b"")
    domains: dict[str, int] = {}
    metadata: dict[str, str] = {}
    for number, value in _fields(data):
        if number == 1:
            ir_version = _number(value)
        elif number in (2, 3):
            producer[number - 2] = _text(value)
        elif number == 7:
            graph = _message(value)
        elif number == 8:
            domain, version = _pair(_message(value))
            domains[_text(domain) if domain else ""] = _number(version or 0)
        elif number == 14:
            key, text = _pair(_message(value))
            metadata[_text(key or memoryview(b""))] = _text(text or memoryview(b""))
    nodes: list[Node] = []
    given: dict[str, tuple[int, ...]] = {}
    outputs: list[str] = []
    stored: set[str] = set()
    half = external = False
    for number, value in _fields(graph):
        if number == 1:
            nodes.append(_node(_message(value)))
        elif number == 5:
            name, kind, elsewhere = _initialiser(_message(value))
            stored.add(name)
            half = half or kind == _FLOAT16
            external = external or elsewhere
        elif number == 11:
            name, shape = _value_info(_message(value))
            given[name] = shape
        elif number == 12:
            outputs.append(_value_info(_message(value))[0])
    opset = domains.pop("", domains.pop("ai.onnx", 0))
    inputs = tuple(name for name in given if name not in stored)
    return OnnxHeader(
        ir_version=ir_version,
        opset=opset,
        domains=domains,
        producer=" ".join(part for part in producer if part),
        metadata=metadata,
        nodes=tuple(nodes),
        inputs=inputs,
        shapes={name: given[name] for name in inputs},
        outputs=tuple(outputs),
        half_weights=half,
        external_data=external,
    )


def _pair(data: memoryview) -> tuple[Field | None, Field | None]:
    fields = dict(_fields(data))
    return fields.get(1), fields.get(2)


def _node(data: memoryview) -> Node:
    fields = {number: value for number, value in _fields(data) if number in (3, 4, 7)}
    empty = memoryview(b"")
    return Node(*(_text(fields.get(number, empty)) for number in (3, 4, 7)))


def _initialiser(data: memoryview) -> tuple[str, int, bool]:
    """Name, element type, and whether the values are in another file: TensorProto."""
    name, kind, elsewhere = "", 0, False
    for number, value in _fields(data):
        if number == 2:
            kind = _number(value)
        elif number == 8:
            name = _text(value)
        elif number == 13 or (number == 14 and value == 1):
            elsewhere = True
    return name, kind, elsewhere


def _value_info(data: memoryview) -> tuple[str, tuple[int, ...]]:
    """Name and shape: ValueInfoProto.type.tensor_type.shape.dim.dim_value."""
    name, shape = "", []
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind in (item for field, item in _fields(_message(value)) if field == 1):
                for layout in (item for field, item in _fields(_message(kind)) if field == 2):
                    for dim in (item for field, item in _fields(_message(layout)) if field == 1):
                        sizes = [item for field, item in _fields(_message(dim)) if field == 1]
                        shape.append(_number(sizes[0]) if sizes else -1)
    return name, tuple(shape)
