"""Devices, and several processes that train one network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.data import load_data
from compressor.training.classification import Classification
from compressor.training.loop import Trainer
from compressor.training.placement import place
from compressor.training.scoring import accuracy
from compressor.training.settings import TrainSettings
from tests.forked import forked, launch_variables


def train(folder: str, variables: dict[str, str]) -> None:
    """Train a small network as one of several processes, and leave in a file what became of it."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    data = load_data("digits", seed=0, image_size=8)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)
    )
    settings = TrainSettings(batch_size=64, learning_rate=0.05)
    trainer = Trainer(
        model, Classification.of(data), settings, epochs=2, seed=0, join=lambda _, middle: middle
    )
    stats = [trainer.run_epoch() for _ in range(2)]
    result = {
        "world": trainer._place.world,
        "losses": [each.loss for each in stats],
        "accuracy": accuracy(model, data.test),
        "sums": [float(tensor.double().sum()) for tensor in model.state_dict().values()],
    }
    Path(folder, f"{trainer._place.rank}.json").write_text(json.dumps(result))


def test_one_process_has_the_device_to_itself() -> None:
    placed = place("cpu")
    assert (placed.device.type, placed.rank, placed.world) == ("cpu", 0, 1)
    module = torch.nn.Linear(2, 2)
    assert placed.wrap(module) is module
    assert place("auto").device.type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(CompressorError, match="Use cpu or auto"):
        place("nonsense")


def test_two_processes_end_with_the_same_network(tmp_path: Path) -> None:
    pair = [forked(train, str(tmp_path), variables) for variables in launch_variables(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
        assert process.exitcode == 0
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["world"] == 2
    assert one["losses"][1] < 0.7 * one["losses"][0]
    assert one["accuracy"] > 0.7
