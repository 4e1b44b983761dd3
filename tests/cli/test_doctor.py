"""What `compress doctor` and `--dry-run` say of this machine, and that they read no images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.latency import machine
from tests.runs import recipe

TINY = ["--model", "tests.nets:tiny", "--epochs", "2", "--image-size", "16", "--dry-run"]


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Observe the noise for a moment only."""
    noise = machine.noise
    monkeypatch.setattr(machine, "noise", lambda: noise(0.01))


@pytest.mark.usefixtures("quick")
def test_the_machine_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(recipe(budgets={"flops": "60%"}).to_yaml())
    found = json.loads(command("doctor", "--recipe", tmp_path / "mine.yaml", "--json"))
    parts = {each["part"]: each for each in found["machine"]}
    assert {"CPU", "GPU", "ONNX Runtime", "TensorRT", "TensorRT-RTX", "latency here", "noise", "disk"} <= set(parts)
    assert parts["decoded images"]["found"].startswith("0 B of at most 4.29 GB in ")
    assert "CPUExecutionProvider" in parts["ONNX Runtime"]["found"]
    assert all(each["advice"] for each in found["machine"] if each["state"] != "ok")
    assert "Estimated time on this machine" in found["lines"]
    lines = command("doctor").splitlines()
    assert lines[0].split() == ["state", "part", "found"]


def test_noise_is_a_spread_and_a_share() -> None:
    found = machine.noise(0.01)
    assert 0 <= found.spread < 10
    assert 0 <= found.interrupted <= 1


def test_a_dry_run_decodes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in (("train", 30), ("test", 10)):
        for place in range(count):
            path = tmp_path / "photos" / part / f"class{place % 2}" / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 24, 3), place, np.uint8)).save(path)

    def decoded(*_: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("compressor.data.images.decode", decoded)
    monkeypatch.setattr("compressor.data.folder.decode", decoded)
    monkeypatch.setattr("compressor.data.files.decode", decoded)
    found = json.loads(command(*TINY, "--data", f"folder:{tmp_path / 'photos'}", "--params", "60%", "--json"))
    assert {each["group"] for each in found["groups"]} >= {"conv1"}
    times = {each["time of"]: each for each in found["times"]}
    assert times["fine-tune"]["for"] == "1 epoch of 26 inputs"
    assert all(0 <= each["at least"] <= each["at most"] for each in found["times"])


def test_a_budget_that_the_dense_network_keeps_is_said_to_be_kept() -> None:
    found = json.loads(command(*TINY, "--params", "100%", "--flops", "60%", "--json"))
    budgets = [line for line in found["lines"] if line.startswith("Budget ")]
    kept = {line.split()[1].rstrip(":"): line.endswith("; already kept by the dense network.") for line in budgets}
    assert kept == {"params": True, "macs": False}
    assert any(line.startswith("Estimated time on this machine: ") for line in found["lines"])
