"""Networks whose head is not the last layer that was constructed, and what first runs say of those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.models import create_model, factory_of, load_weights
from compressor.models.weights import FRESH_HEAD


class Gated(nn.Module):
    """The head is `fc`; the last layer that is constructed is a gate of one output."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv, self.fc, self.gate = nn.Conv2d(3, 16, 3), nn.Linear(16, num_classes), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.conv(x)).mean((2, 3))
        return self.fc(f) * (1 + F.softplus(self.gate(f)))


def fixed() -> nn.Module:
    return Gated(9)


class Two(Gated):
    def __init__(self) -> None:
        super().__init__(9)
        self.other = nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.conv(x)).mean((2, 3))
        return self.fc(f) + self.other(f)


def maps(num_classes: int = 4) -> nn.Module:
    return nn.Conv2d(3, num_classes, 3)


def grey(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.LazyLinear(num_classes))


def of_28(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 26 * 26, num_classes))


def half(num_classes: int = 4) -> nn.Module:
    return Gated(num_classes).half()


class Pair(Gated):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class TwoInputs(Gated):
    def forward(self, x: Tensor, length: Tensor) -> Any:
        return super().forward(x) * length


def raising(num_classes: int = 4) -> nn.Module:
    raise KeyError("width")


def test_a_factory_that_takes_the_classes_keeps_its_layers(tmp_path: Path) -> None:
    own = Gated(7).eval()
    torch.save(own.state_dict(), tmp_path / "own.pt")
    model = create_model("tests.models.test_first_run:Gated", 7, tmp_path / "own.pt").eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), own(x))


def test_the_layer_that_makes_the_output_is_replaced(said: list[str]) -> None:
    model = create_model("tests.models.test_first_run:fixed", 7)
    assert model.get_parameter("fc.weight").shape == (7, 16)
    assert model.get_parameter("gate.weight").shape == (1, 16)
    factory = "tests.models.test_first_run:fixed"
    assert factory_of(model) == {"factory": factory, "kwargs": {"num_classes": 7}, "head": "fc"}
    assert said == ["tests.models.test_first_run:fixed has 9 outputs: its last layer fc is replaced by one of 7."]
    assert model.__dict__[FRESH_HEAD] == 9


def test_a_replaced_layer_with_given_weights_is_trained(tmp_path: Path) -> None:
    torch.save(Gated(7).state_dict(), tmp_path / "own.pt")
    assert not hasattr(create_model("tests.models.test_first_run:fixed", 7, tmp_path / "own.pt"), FRESH_HEAD)


def test_weights_for_other_classes_leave_the_head_fresh(tmp_path: Path, said: list[str]) -> None:
    own = Gated(9)
    torch.save(own.state_dict(), tmp_path / "own.pt")
    model = create_model("tests.models.test_first_run:Gated", 7, tmp_path / "own.pt")
    assert torch.equal(model.get_parameter("gate.weight"), own.gate.weight)
    assert model.get_parameter("fc.weight").shape == (7, 16)
    assert "fc starts fresh with 7" in said[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Two", ["several layers", "fc, other"]),
        ("maps", ["a map for each class"]),
        ("grey", ["4 channels"]),
        ("of_28", ["cannot take images of 3x32x32", "--image-size 28"]),
        ("half", ["weights in float16", "float()"]),
        ("Pair", ["gives a tuple of 2", "net(x)[0]"]),
        ("TwoInputs", ["takes 2 inputs (x, length)"]),
        ("raising", ["fails: KeyError: 'width'", "test_first_run.py"]),
    ],
)
def test_each_misfit_names_its_own_cause(name: str, words: list[str]) -> None:
    with pytest.raises(CompressorError) as caught:
        create_model(f"tests.models.test_first_run:{name}", 7)
    for word in words:
        assert word in str(caught.value)


def _plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(7200, 4))


@pytest.mark.parametrize("kind", ["state_dict_ema", "model_ema", "lightning", "compiled", "averaged", "thop", "args"])
def test_checkpoints_of_trainers(kind: str, tmp_path: Path) -> None:
    import argparse

    import numpy as np

    good = _plain().state_dict()
    raw = {key: value * 0 for key, value in good.items()}
    wrapped = {f"module.{key}": value for key, value in good.items()}
    content: Any = {
        "state_dict_ema": {"state_dict": raw, "state_dict_ema": good, "metric": np.float64(0.9)},
        "model_ema": {"model": raw, "model_ema": {"n_averaged": torch.tensor(3), **wrapped}},
        "lightning": {"state_dict": {f"net.model.{k}": v for k, v in good.items()}, "hyper_parameters": {"lr": 0.1}},
        "compiled": {f"module._orig_mod.{key}": value for key, value in good.items()},
        "averaged": {"n_averaged": torch.tensor(3), **wrapped},
        "thop": {**good, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
        "args": {"model": good, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    }[kind]
    torch.save(content, tmp_path / "file.pt")
    model, notes = _plain(), []
    load_weights(model, tmp_path / "file.pt", 4, say=notes.append)
    assert all(torch.equal(value, good[key]) for key, value in model.state_dict().items())
    assert any("averaged over training" in note for note in notes) == kind.endswith("ema")


class Foreign:
    pass


def test_what_cannot_be_read_safely_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    good = _plain().state_dict()
    for content, words in (
        ({"state_dict": good, "config": Foreign()}, "test_first_run.Foreign"),
        ({**good, "0.weight": torch.zeros(8, 3, 3, 3).to_sparse()}, "sparse"),
        ({**good, "0.weight": torch.zeros(8, 3, 3, 3, device="meta")}, "no values"),
        ({**good, "0.weight": torch.zeros(8, 3, 3, 3, dtype=torch.int8)}, "no real numbers"),
        ({"generator": good, "discriminator": good}, "several networks"),
        ({**{f"a.{k}": v for k, v in good.items()}, **{f"b.{k}": v for k, v in good.items()}}, "several such"),
    ):
        torch.save(content, file)
        with pytest.raises(CompressorError, match=words):
            load_weights(_plain(), file, 4)
    half = {key: value.half() for key, value in good.items()}
    torch.save(half, file)
    model = _plain()
    load_weights(model, file, 4)
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, half["0.weight"].float())
