"""Shapes on the meta device that need no pass of torch: they are those of torch, and nothing else is answered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressor.pruning.shapes import shape_only


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [(2, 3), [-1, -2], 1, -4, (0, 1, 2, 3)])
def test_a_mean_has_the_shape_that_torch_gives_it(dims: Any, keepdim: bool) -> None:
    x = torch.empty(2, 3, 4, 5, device="meta")
    found = shape_only("mean", False, (x, dims), {"keepdim": keepdim} if keepdim else {})
    assert found is not None
    assert (found.shape, found.dtype) == (x.mean(dims, keepdim=keepdim).shape, x.dtype)


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_has_the_shape_that_torch_gives_it(shape: tuple[int, ...], bias: bool) -> None:
    x, weight = torch.empty(shape, device="meta"), torch.empty(4, 6, device="meta")
    added = torch.empty(4, device="meta") if bias else None
    expected = functional.linear(x, weight, added).shape
    for args, kwargs in (((x, weight, added), {}), ((x, weight), {"bias": added})):
        found = shape_only("linear", False, args, kwargs)
        assert found is not None
        assert found.shape == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [((1, 1), (0, 0), (1, 1), 1), ((2, 3), (1, 2), (1, 1), 2), ((1, 2), (0, 3), (2, 3), 1), (2, 1, 2, 4)],
)
def test_a_convolution_has_the_shape_that_torch_gives_it(
    bias: bool, stride: Any, padding: Any, dilation: Any, groups: int
) -> None:
    x = torch.empty(2, 8, 13, 16, device="meta", dtype=torch.float64)
    weight = torch.empty(12, 8 // groups, 3, 5, device="meta", dtype=torch.float64)
    added = torch.empty(12, device="meta", dtype=torch.float64) if bias else None
    args = (x, weight, added, stride, padding, dilation, groups)
    found = shape_only("conv2d", False, args, {})
    assert found is not None
    assert (found.shape, found.dtype) == (functional.conv2d(*args).shape, x.dtype)


def _convolution(**changed: Any) -> tuple[Any, ...]:
    usual = {
        "x": torch.empty(2, 8, 5, 5, device="meta"), "weight": torch.empty(4, 4, 3, 3, device="meta"), "bias": None,
        "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2,
    }  # fmt: skip
    return (*{**usual, **changed}.values(),)


X, ROWS = torch.empty(2, 6, device="meta"), torch.empty(4, 6, device="meta")


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("mean", (X,), {}),
        ("mean", (X, ()), {}),
        ("mean", (X, 2), {}),
        ("mean", (X, (1, -1)), {}),
        ("mean", (X, 1), {"dtype": torch.float64}),
        ("linear", (X, ROWS[:, :5]), {}),
        ("linear", (X, ROWS[0]), {}),
        ("linear", (X, ROWS, X[0]), {}),
        ("linear", (X, ROWS.double()), {}),
        ("linear", (X, torch.empty(4, 6)), {}),
        ("conv2d", _convolution(x=torch.empty(2, 7, 5, 5, device="meta")), {}),
        ("conv2d", _convolution(x=torch.empty(2, 8, 2, 5, device="meta")), {}),
        ("conv2d", _convolution(x=torch.empty(8, 5, 5, device="meta")), {}),
        ("conv2d", _convolution(x=X), {}),
        ("conv2d", _convolution(x=torch.empty(2, 8, 5, 5, device="meta").to(memory_format=torch.channels_last)), {}),
        ("conv2d", _convolution(weight=torch.empty(5, 4, 3, 3, device="meta")), {}),
        ("conv2d", _convolution(weight=torch.empty(4, 4, 3, 3)), {}),
        ("conv2d", _convolution(bias=torch.empty(3, device="meta")), {}),
        ("conv2d", _convolution(padding="same"), {}),
    ],
)
def test_what_is_wrong_or_unusual_is_left_to_torch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert shape_only(name, False, args, kwargs) is None


def test_a_plain_network_is_traced_without_torchs_compiler() -> None:
    script = (
        "import sys, torch\nfrom compressor.pruning.space import PruningSpace\nfrom tests.nets import tiny\n"
        "PruningSpace(tiny().eval(), torch.zeros(1, 3, 16, 16))\nprint({'torch._dynamo', 'sympy'} & {*sys.modules})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert ended.stdout == "set()\n"
