"""Weights from files that fit, do not fit, or bite."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.models import create_model, read_weights


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module.", "safetensors"])
def test_weights_in_all_their_wrappings(wrap: str, tmp_path: Path) -> None:
    source = create_model("cifar_resnet20", 10)
    state: dict[str, Any] = dict(source.state_dict())
    file = tmp_path / "weights.pt"
    if wrap == "safetensors":
        from safetensors.torch import save_file

        file = tmp_path / "weights.safetensors"
        save_file(state, file)
    elif wrap == "module.":
        torch.save({f"module.{key}": value for key, value in state.items()}, file)
    else:
        torch.save(state if wrap == "plain" else {wrap: state, "epoch": 3}, file)
    loaded = create_model("cifar_resnet20", 10, file).state_dict()
    assert all(torch.equal(loaded[key], source.state_dict()[key]) for key in loaded)


def test_head_of_other_weights_starts_fresh(tmp_path: Path, said: list[str]) -> None:
    source = create_model("cifar_resnet20", 100)
    file = tmp_path / "weights.pt"
    torch.save(source.state_dict(), file)
    model = create_model("cifar_resnet20", 10, file)
    assert model.get_parameter("linear.weight").shape == (10, 64)
    assert torch.equal(
        model.get_parameter("layer3.2.conv2.weight"), source.get_parameter("layer3.2.conv2.weight")
    )
    assert said == [f"{file} is for 100 classes: linear starts fresh with 10."]


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = create_model("cifar_resnet20", 10).state_dict()
    missing = {key: value for key, value in state.items() if not key.startswith("layer2.0.")}
    odd = {**state, "extra.weight": torch.zeros(2), "conv1.weight": torch.zeros(16, 1, 3, 3)}
    for wrong, words in (
        (missing, ["10 of 116 keys are missing (layer2.0.conv1.weight, ", "and 7 more"]),
        (
            odd,
            ["1 keys are unexpected (extra.weight)", "conv1.weight is (16, 1, 3, 3), expected (16, 3, "],
        ),
        ({**state, "linear.weight": state["linear.weight"] * float("nan")}, ["NaN", "linear.weight"]),
        ({**state, "epoch": 3}, ["epoch"]),
        ([1, 2], ["a list, expected a dict"]),
    ):
        file = tmp_path / "wrong.pt"
        torch.save(wrong, file)
        with pytest.raises(CompressorError) as caught:
            create_model("cifar_resnet20", 10, file)
        for word in words:
            assert word in str(caught.value)


class _Bite:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_malicious_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "bitten"
    torch.save({"state_dict": _Bite(marker)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Bite(marker)))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CompressorError, match="rejected"):
            read_weights(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.zeros(1000)}, whole)
    for content in (b"", b"no weights at all", whole.read_bytes()[:700]):
        file = tmp_path / f"broken{suffix}"
        file.write_bytes(content)
        with pytest.raises(CompressorError):
            read_weights(file)
    with pytest.raises(CompressorError, match="does not exist"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(CompressorError, match="is a folder"):
        read_weights(tmp_path)
