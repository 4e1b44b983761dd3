"""The whole job on networks of other inputs and outputs than one picture and the scores of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import CompressorError
from export.convert.onnx_header import read_header
from tests.run.test_own import FAST


class Signals(nn.Module):
    """A 1-d network that returns signals."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 16, 5, padding=2), nn.BatchNorm1d(16)
        self.second = nn.Conv1d(16, 3, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


class Volumes(nn.Module):
    """A 3-d network that returns a tuple of a map and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(1, 16, 3, padding=1), nn.BatchNorm3d(16)
        self.map, self.number = nn.Conv3d(16, 2, 1), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.norm(self.first(x)))
        return self.map(x), self.number(x.mean((2, 3, 4)))[:, 0]


class PictureAndFacts(nn.Module):
    """Takes a picture of four channels, not square, and a row of numbers; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU())
        self.facts = nn.Linear(5, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, picture: torch.Tensor, facts: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(self.stem(picture))
        both = x.mean((2, 3)) + self.facts(facts)
        return {"classes": self.head(both), "map": x[:, :1]}


class OneDictionary(nn.Module):
    """As `PictureAndFacts`, with a dictionary as its only argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PictureAndFacts()

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self.inner(batch["picture"], batch["facts"])
        return found


def both(number: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    return {
        "picture": torch.rand(number, 4, 8, 12, generator=random),
        "facts": torch.rand(number, 5, generator=random),
        "target": torch.arange(number) % 6,
    }


def without_target(number: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in both(number).items() if name != "target"}


def as_tuple(number: int) -> Any:
    batch = both(number)
    return (batch["picture"], batch["facts"]), batch["target"]


CASES: list[tuple[Any, Any, Any, dict[str, tuple[int, ...]]]] = [
    (Signals, torch.rand(1, 2, 40), [torch.rand(30, 2, 40)], {"input": (1, 2, 40)}),
    (Volumes, torch.rand(1, 1, 4, 6, 5), [(torch.rand(30, 1, 4, 6, 5), 0)], {"input": (1, 1, 4, 6, 5)}),
    (
        PictureAndFacts, (both(2)["picture"], both(2)["facts"]), [as_tuple(16), as_tuple(16)],
        {"input_0": (1, 4, 8, 12), "input_1": (1, 5)},
    ),
    (PictureAndFacts, without_target(1), [both(30)], {"input_0": (1, 4, 8, 12), "input_1": (1, 5)}),
    (OneDictionary, without_target(1), [both(30)], {"input_picture": (1, 4, 8, 12), "input_facts": (1, 5)}),
]  # fmt: skip
NAMES = ["1-d", "3-d", "tuple", "names", "dictionary"]


@pytest.mark.parametrize(("network", "example", "batches", "inputs"), CASES, ids=NAMES)
def test_inputs_of_other_kinds(tmp_path: Path, network: Any, example: Any, batches: Any, inputs: Any) -> None:
    torch.manual_seed(0)
    dense = network().eval()
    result = compressor.compress(
        dense, example, calibration=batches, epochs=1, out=tmp_path / "run", **{**FAST, "params": "80%"}
    )
    assert result.exit_code == 0
    manifest = result.manifest
    assert manifest["compensation"]["method"] == "layers"  # every layer was fitted to the inputs
    assert manifest["accuracy"]["finetuned"] > 0.2
    assert manifest["parity"]["max_abs"] < 1e-4
    assert read_header(result.onnx).shapes == inputs
    assert manifest["latency"]["measured_ms"] > 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"precision": "int8", "device": "jetson-orin-nano-8gb"}, "INT8"),
        ({"budgets": {"energy": "50%"}}, "An energy budget|energy"),
    ],
)
def test_what_takes_one_input_only_is_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(CompressorError, match=what):
        compressor.compress(
            PictureAndFacts(), without_target(1), calibration=[both(30)], epochs=0, out=tmp_path / "run", **options
        )
    assert not (tmp_path / "run").exists()


def test_fp16_of_several_inputs(tmp_path: Path) -> None:
    result = compressor.compress(
        PictureAndFacts().eval(), without_target(1), calibration=[both(30)], epochs=0, out=tmp_path / "run",
        precision="fp16", device="jetson-orin-nano-8gb", pruning={"granularity": 1}, **{**FAST, "params": "80%"},
    )  # fmt: skip
    assert result.manifest["exports"]["fp16"]["parity"]["max_abs"] > 0


def test_a_loss_on_several_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["picture"], batch["facts"])["classes"], batch["target"])

    result = compressor.compress(
        PictureAndFacts(), without_target(1), train=[both(16), both(20)], loss=loss, epochs=2,
        out=tmp_path / "run", **FAST,
    )  # fmt: skip
    assert len(result.manifest["training"]) == 2
    assert all(each["loss"] < 5 for each in result.manifest["training"])
