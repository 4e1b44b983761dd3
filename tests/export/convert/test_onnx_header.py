"""The header read without any package says what the `onnx` package says; damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.convert.onnx_header import Node, parse_header, read_header
from export.errors import ExportError
from tests.export.nets import chain_of, matmul_chain


def test_fields() -> None:
    header = parse_header(chain_of(["Relu", "Own"], batch="n"))
    assert (header.ir_version, header.opset, header.domains) == (8, 17, {"own": 3})
    assert header.producer == "hand"
    assert header.metadata == {"classes": '["ä"]'}
    assert header.nodes == (Node("n0", "Relu", ""), Node("n1", "Own", "own"))
    assert header.inputs == ("t0",)
    assert header.shapes == {"t0": (-1, 3)}
    assert header.outputs == ("t2",)
    assert not header.external_data


def test_precision_is_what_the_weights_say() -> None:
    assert parse_header(chain_of(["Relu"])).precision == "fp32"
    assert parse_header(chain_of(["Relu"], dtype=np.float16)).precision == "fp16"
    assert parse_header(chain_of(["QuantizeLinear"])).precision == "int8"


def test_weights_in_other_files_are_seen(tmp_path: Path) -> None:
    proto = onnx.load_model_from_string(matmul_chain(64, 1))
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0)
    assert read_header(tmp_path / "net.onnx").external_data
    assert not parse_header(matmul_chain(64, 1)).external_data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello world, this is no network at all", "truncated or not an ONNX file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "truncated or not an ONNX file"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "has no version"),
        (chain_of([]), "has no operators"),
    ],
)
def test_files_that_are_no_network(content: bytes, message: str) -> None:
    with pytest.raises(ExportError, match=rf"net\.onnx.*{message}"):
        parse_header(content, "net.onnx")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="There is no ONNX file"):
        read_header(tmp_path / "none.onnx")


WHOLE = matmul_chain(16, 3)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_every_cut_is_refused_or_leaves_the_same_graph(length: int) -> None:
    """A cut between two fields leaves a valid message; it must then lack its opset, which is written last."""
    with pytest.raises(ExportError):
        parse_header(WHOLE[:length])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_never_escapes_as_another_error(noise: bytes) -> None:
    refusals = ("net.onnx is empty", "net.onnx is truncated", "net.onnx is not an ONNX network")
    try:
        header = parse_header(noise, "net.onnx")
        sound = bool(
            header.ir_version and header.opset and header.nodes
        )  # noise that happens to spell a network
    except ExportError as error:
        sound = error.message.startswith(refusals)
    assert sound
