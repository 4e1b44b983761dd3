"""Operations that the exporter refuses or writes wrongly: their files compute what torch computes, for any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from export.convert.to_onnx import check_parity, export_onnx
from export.errors import ExportError
from tests.export.nets import Within

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Operation = Callable[[torch.Tensor], torch.Tensor]


def _affine_grid(y: torch.Tensor) -> torch.Tensor:
    theta = torch.tensor([[[0.8, 0.1, 0.0], [0.0, 0.9, 0.1]]]).expand(y.shape[0], 2, 3)
    return F.affine_grid(theta, [y.shape[0], 8, 5, 6], align_corners=False)


def _attention(y: torch.Tensor) -> torch.Tensor:
    tokens = y.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens)


REWRITTEN: dict[str, Operation] = {
    "pool to 3": lambda y: F.adaptive_avg_pool2d(y, 3),
    "pool to (None, 5)": lambda y: F.adaptive_avg_pool2d(y, (None, 5)),  # type: ignore[arg-type]
    "pool behind a padding": lambda y: F.adaptive_avg_pool2d(F.pad(y, (0, 0, 0, 0, 2, 2)), 2),
    "pool in one dimension": lambda y: F.adaptive_avg_pool1d(y.flatten(2), 7),
    "largest of 5": nn.AdaptiveMaxPool2d(5),
    "largest behind a padding": lambda y: F.adaptive_max_pool2d(F.pad(y, (1, 1, 1, 1)), 2),
    "area": lambda y: F.interpolate(y, size=(5, 7), mode="area"),
    "nearest-exact": lambda y: F.interpolate(y, scale_factor=(0.7, 1.3), mode="nearest-exact"),
    "antialiased": lambda y: F.interpolate(y, size=(7, 9), mode="bilinear", antialias=True),
    "own divisor": nn.AvgPool2d(3, padding=1, divisor_override=4),
    "same, dilated": nn.Conv2d(8, 8, 3, padding="same", dilation=2),
    "same, even": nn.Conv2d(8, 8, (2, 4), padding="same"),
    "channel shuffle": nn.ChannelShuffle(2),
    "threshold": nn.Threshold(0.1, 20.0),
    "instance norm with statistics": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "RMS norm": lambda y: F.rms_norm(y, (16,)),
    "affine grid": _affine_grid,
    "attention": _attention,
}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_the_exporter_alone_gets_wrong(tmp_path: Path, name: str, opset: int) -> None:
    net = Within(REWRITTEN[name]).eval()
    export_onnx(net, IMAGES[:1], tmp_path / "net.onnx", opset=opset, dynamic_batch=True)
    parity = check_parity(net, tmp_path / "net.onnx", IMAGES)
    assert parity.max_abs < 1e-5 * max(1.0, parity.scale)


def _shuffled(y: torch.Tensor) -> torch.Tensor:
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


FAMILY: dict[str, Operation] = {
    "bicubic": lambda y: F.interpolate(y, scale_factor=1.7, mode="bicubic"),
    "bilinear": lambda y: F.interpolate(y, size=(11, 13), mode="bilinear", align_corners=True),
    "reflect": lambda y: F.pad(y, (1, 2, 1, 2), mode="reflect"),
    "circular": lambda y: F.pad(y, (1, 2, 1, 2), mode="circular"),
    "crop": lambda y: F.pad(y, (-1, -2, 1, 2)),
    "shuffle by view": _shuffled,
    "pixel shuffle": nn.PixelShuffle(2),
    "einsum": lambda y: torch.einsum("nchw,ncij->nhi", y, y),
    "roll": lambda y: torch.roll(y, (1, 2), (2, 3)),
    "unfold": lambda y: F.unfold(y, 3, padding=1, stride=2),
    "group norm": nn.GroupNorm(4, 8),
    "layer norm": nn.LayerNorm([8, 16, 16]),
    "mish, hardswish": nn.Sequential(nn.Mish(), nn.Hardswish(), nn.SiLU()),
    "transposed": nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
}


@pytest.mark.parametrize("name", FAMILY)
def test_what_the_exporter_gets_right(tmp_path: Path, name: str) -> None:
    net = Within(FAMILY[name]).eval()
    export_onnx(net, IMAGES[:1], tmp_path / "net.onnx", opset=13, dynamic_batch=True)
    parity = check_parity(net, tmp_path / "net.onnx", IMAGES)
    assert parity.max_abs < 1e-5 * max(1.0, parity.scale)


def test_a_wrong_file_is_refused_with_its_cause(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"an older file")
    with pytest.raises(ExportError, match=r"off by .* random even in evaluation mode"):
        export_onnx(Within(lambda y: F.dropout(y, 0.5)), IMAGES[:1], path)
    with pytest.raises(ExportError, match=r"see test_rewrites\.py:\d+ .*if float\(x\.abs"):
        export_onnx(_ByValues(), torch.zeros(1, 3, 16, 16), path)
    assert path.read_bytes() == b"an older file"


class _Live(nn.Module):
    """Writes values of the input into a computed weight, through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight * 2
        weight[1:3].copy_(x.mean((0, 2, 3)).expand(2, 3))
        return F.linear(x.mean((2, 3)), weight)


def test_a_weight_written_through_a_view_is_no_constant(tmp_path: Path) -> None:
    net = _Live().eval()
    export_onnx(net, IMAGES[:1], tmp_path / "net.onnx")
    parity = check_parity(net, tmp_path / "net.onnx", IMAGES)
    assert parity.max_abs < 1e-5 * max(1.0, parity.scale)


class _ByValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.abs().sum()) > 0:  # zeros go another way
            return -x.flatten(1)
        return x.flatten(1)
