"""Networks of several inputs and outputs as ONNX files, and the files as modules again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export.convert.module import OnnxModule
from export.convert.to_onnx import check_parity, export_onnx
from export.errors import ExportError


class TwoInputs(nn.Module):
    """Takes a picture and a dictionary with a number and an index; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.table = nn.Embedding(5, 4)

    def forward(self, image: torch.Tensor, other: dict[str, torch.Tensor]) -> dict[str, Any]:
        x = self.conv(image).mean((2, 3)) + self.table(other["index"])
        return {"sum": x.sum(1), "parts": (x, other["gain"] * x)}


@pytest.fixture(scope="module")
def example() -> tuple[Any, ...]:
    torch.manual_seed(0)
    return torch.rand(1, 3, 8, 9), {"gain": torch.rand(1, 1), "index": torch.tensor([3])}


def several(number: int) -> tuple[Any, ...]:
    other = {"gain": torch.rand(number, 1), "index": torch.arange(number) % 5}
    return torch.rand(number, 3, 8, 9), other


@pytest.mark.parametrize("open_batch", [False, True])
def test_inputs_and_outputs_have_names_and_equal_values(
    tmp_path: Path, example: tuple[Any, ...], open_batch: bool
) -> None:
    network = TwoInputs().eval()
    info = export_onnx(network, example, tmp_path / "net.onnx", dynamic_batch=open_batch)
    first = "batch" if open_batch else 1
    assert info.inputs == {
        "input_0": (first, 3, 8, 9), "input_1_gain": (first, 1), "input_1_index": (first,)
    }  # fmt: skip
    assert list(info.outputs) == ["output_sum", "output_parts_0", "output_parts_1"]
    assert check_parity(network, tmp_path / "net.onnx", several(6)).max_abs < 1e-5


def test_a_file_is_scored_as_its_network(tmp_path: Path, example: tuple[Any, ...]) -> None:
    network = TwoInputs().eval()
    export_onnx(network, example, tmp_path / "net.onnx")
    module, inputs = OnnxModule(tmp_path / "net.onnx", network, example), several(3)
    assert next(module.parameters()).device.type == "cpu"
    found, right = module(*inputs), network(*inputs)
    assert found.keys() == right.keys()
    torch.testing.assert_close(found["sum"], right["sum"])
    torch.testing.assert_close(found["parts"][1], right["parts"][1])
    with pytest.raises(ExportError, match="takes 3 tensors, got 1"):
        module(inputs[0])


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_last_batch_that_is_too_short_is_padded(tmp_path: Path, number: int) -> None:
    network = TwoInputs().eval()
    export_onnx(network, several(4), tmp_path / "net.onnx")
    module, inputs = OnnxModule(tmp_path / "net.onnx", network, several(1)), several(number)
    found, right = module(*inputs), network(*inputs)
    assert found["sum"].shape == (number,)
    torch.testing.assert_close(found["sum"], right["sum"])
    torch.testing.assert_close(found["parts"][1], right["parts"][1])
