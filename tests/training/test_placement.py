"""Devices, and several processes that train one network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.training.placement import place

SCRIPT = """
import json, sys
import torch
from compressor.data import DataBundle, load_data
from compressor.training.scoring import accuracy
from compressor.training.loop import Trainer
from compressor.training.settings import TrainSettings
from compressor.training.classification import Classification

torch.set_num_threads(1)
data = load_data("digits", seed=0, image_size=8)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)
)
trainer = Trainer(
    model, Classification.of(data), TrainSettings(batch_size=64, learning_rate=0.05), epochs=2, seed=0,
    join=lambda *_: None,
)
stats = [trainer.run_epoch() for _ in range(2)]
result = {
    "world": trainer._place.world,
    "losses": [each.loss for each in stats],
    "accuracy": accuracy(model, data.test),
    "sums": [float(tensor.double().sum()) for tensor in model.state_dict().values()],
}
with open(f"{sys.argv[1]}/{trainer._place.rank}.json", "w") as file:
    json.dump(result, file)
"""


def test_one_process_has_the_device_to_itself() -> None:
    placed = place("cpu")
    assert (placed.device.type, placed.rank, placed.world) == ("cpu", 0, 1)
    module = torch.nn.Linear(2, 2)
    assert placed.wrap(module) is module
    assert place("auto").device.type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(CompressorError, match="Use cpu or auto"):
        place("nonsense")


def test_two_processes_end_with_the_same_network(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, str(script), str(tmp_path)], check=True, env=environment, capture_output=True, timeout=300
    )
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["world"] == 2
    assert one["losses"][1] < 0.7 * one["losses"][0]
    assert one["accuracy"] > 0.7
