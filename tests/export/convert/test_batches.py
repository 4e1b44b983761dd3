"""Batch sizes as text, and files for any number of inputs, also of networks that fix it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.convert.batches import ONE, Batch, parse_batch
from export.convert.half import convert_half
from export.convert.ort import onnx_outputs, portions
from export.convert.program import (
    check_loaded,
    export_program,
    load_program,
)
from export.convert.to_onnx import check_parity, export_onnx
from export.errors import ExportError
from tests.export.nets import SmallNet, Within


@pytest.mark.parametrize(
    ("text", "batch", "label"),
    [("1", ONE, ""), ("4", Batch(4, 4, 4), "batch4"), ("1..8", Batch(1, 8, 8), "batch1-8"),
     ("2..4..16", Batch(2, 4, 16), "batch2-16"), ("3..3", Batch(3, 3, 3), "batch3")],
)  # fmt: skip
def test_what_is_asked_for(text: str, batch: Batch, label: str) -> None:
    assert parse_batch(text) == batch
    assert batch.label == label


@pytest.mark.parametrize(
    "text", ["", "0", "8..1", "1..", "a", "1..9..4", "-1", "1...8", "4097", "1..2..3..4"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ExportError, match=r"Write 8, 1\.\.8 or 1\.\.4\.\.8"):
        parse_batch(text)


def test_profiles() -> None:
    batch = parse_batch("1..4..8")
    assert batch.profile({"x": (-1, 3, 32, 32), "y": (1, 3)}) == {
        "x": ((1, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32))
    }
    with pytest.raises(ExportError, match="only its first dimension"):
        batch.profile({"x": (-1, 3, -1, 32)})


IMAGES = np.random.default_rng(4).standard_normal((9, 3, 16, 16)).astype(np.float32)
EXAMPLE = torch.zeros(1, 3, 16, 16)
Operation = Callable[[torch.Tensor], torch.Tensor]


class Reshaped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = int(x.shape[0])
        return x.reshape(n, 8, -1).mean(-1)


class ByLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(8, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cells(x.flatten(2).transpose(1, 2), torch.zeros(1, len(x), 6))[0]


class WithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.expand(int(x.shape[0]), -1, -1), x.flatten(2)[:, :, :16]], 1)


RIGHT: dict[str, Operation] = {
    "reshape": Reshaped(),
    "len": ByLength(),
    "state": WithState(),
    "expand": WithToken(),
    "zeros": lambda y: torch.cat([y, torch.zeros(int(y.size(0)), 2, *y.shape[2:])], 1),
    "mixed": lambda y: y.reshape(-1, 4, 16, 16).relu().reshape(len(y), -1),
    "numpy": lambda y: y.reshape(int(np.prod(y.shape[:1])), -1),
    "share": lambda y: y / int(y.shape[0]),
}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("name", RIGHT)
def test_any_batch_is_right(tmp_path: Path, name: str, opset: int) -> None:
    net, path = Within(RIGHT[name]).eval(), tmp_path / "net.onnx"
    info = export_onnx(net, EXAMPLE, path, opset=opset, dynamic_batch=True)
    assert (info.inputs, info.outputs) == ({"input": ("batch", 3, 16, 16)}, {"output": ("batch", 4)})
    for count in (1, 2, 5, 9):
        with torch.no_grad():
            right = net(torch.from_numpy(IMAGES[:count]))
        found = export_outputs(path, count)
        np.testing.assert_allclose(found, right.numpy(), atol=1e-5)
    first = path.read_bytes()
    export_onnx(net, EXAMPLE, path, opset=opset, dynamic_batch=True)
    assert path.read_bytes() == first


def export_outputs(path: Path, count: int) -> np.ndarray:
    from export.convert.ort import open_session, run_session

    output: np.ndarray = run_session(open_session(path), {"input": IMAGES[:count]})[0]
    return output


REFUSED: dict[str, tuple[Operation, str]] = {
    "branch": (lambda y: y * 2 if y.shape[0] == 1 else y, r"for 1 inputs is off by .*if y\.shape\[0\] == 1"),
    "far branch": (lambda y: y * 2 if y.shape[0] > 6 else y, r"is off by .*if y\.shape\[0\] > 6"),
    "loop": (
        lambda y: torch.stack([y[i] * 2 for i in range(len(y))]),
        r"depends on the batch size",
    ),
    "count": (
        lambda y: y + torch.arange(int(y.shape[0]))[:, None, None, None],
        r"has a constant that depends on the batch: shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_open_file_can_be_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"an older file")
    operation, cause = REFUSED[name]
    with pytest.raises(ExportError, match=f"forward fixes the batch.*{cause}") as refused:
        export_onnx(Within(operation), EXAMPLE, path, dynamic_batch=True)
    assert "x.flatten(1)" in (refused.value.hint or "")
    assert "test_batches.py" in refused.value.message
    assert path.read_bytes() == b"an older file"
    fixed = export_onnx(Within(operation), torch.zeros(2, 3, 16, 16), path)  # one batch alone it can be
    assert fixed.inputs == {"input": (2, 3, 16, 16)}
    assert check_parity(Within(operation), path, IMAGES[:8]).max_abs < 1e-5


def test_axes_that_grow_with_the_batch_are_open(tmp_path: Path) -> None:
    class Three(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.mean((2, 3)), x.transpose(0, 1), x.reshape(-1, 16)

    info = export_onnx(Three(), EXAMPLE, tmp_path / "net.onnx", dynamic_batch=True)
    assert info.outputs == {
        "output_0": ("batch", 3), "output_1": (3, "batch", 16, 16), "output_2": ("output_2_0", 16),
    }  # fmt: skip


def test_half_precision_of_an_open_file_is_run_at_several_batches(tmp_path: Path) -> None:
    net = Within(RIGHT["reshape"])
    export_onnx(net, EXAMPLE, tmp_path / "net.onnx", dynamic_batch=True)
    convert_half(tmp_path / "net.onnx", tmp_path / "half.onnx", inputs=IMAGES)
    right, half = (onnx_outputs(tmp_path / name, IMAGES)[0] for name in ("net.onnx", "half.onnx"))
    assert 0 < np.abs(right - half).max() < 1e-2
    assert portions(9, None) == [(0, 1), (1, 3), (4, 5)]
    assert portions(3, None) == [(0, 1), (1, 2)]
    assert portions(3, 2) == [(0, 2), (2, 2)]


def test_parity_sees_a_batch_that_is_wrong_for_one_size_only(tmp_path: Path) -> None:
    plain, path = SmallNet(), tmp_path / "net.onnx"
    export_onnx(plain, EXAMPLE, path, dynamic_batch=True)

    class OtherForThree(SmallNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + float(len(x) == 3)

    assert check_parity(plain, path, IMAGES).max_abs < 1e-5
    with pytest.raises(ExportError, match="differs from the network by 1 "):
        check_parity(OtherForThree(), path, IMAGES)


@pytest.mark.parametrize("name", ["reshape", "len", "expand"])
def test_programs_take_any_batch(tmp_path: Path, name: str) -> None:
    net = Within(RIGHT[name])
    export_program(net, EXAMPLE, tmp_path / "net.pt2", batch=Batch(1, 4, 8))
    for batch in (1, 4, 8):
        assert check_loaded(load_program(tmp_path / "net.pt2"), net, IMAGES, "it", batch=batch).max_abs < 1e-5


def test_programs_refuse_what_they_would_get_wrong(tmp_path: Path) -> None:
    net = Within(REFUSED["branch"][0])
    with pytest.raises(ExportError, match=r"by torch\.export: its output for 1 inputs is off by"):
        export_program(net, EXAMPLE, tmp_path / "net.pt2", batch=Batch(1, 4, 8))
    assert list(tmp_path.iterdir()) == []
