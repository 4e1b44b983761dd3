"""Known devices, their shipped tables, and what is recommended for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.latency.local import LocalCpu
from compressor.latency.machine import channel_block
from compressor.latency.provider import TableProvider, known_devices
from compressor.latency.table import LatencyTable, check_known, find_table
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from compressor.recipe import parse_recipe, shipped
from compressor.run.folder import RunFolder
from compressor.run.pipeline import resume
from compressor.run.stages import TABLE

JETSONS = [path.stem for path in sorted(shipped("latency_tables").glob("*.json"))]


@pytest.fixture(scope="module")
def resnet50() -> PruningSpace:
    model = create_model("resnet50", 1000, "none", (3, 224, 224)).eval()
    return PruningSpace(model, torch.zeros(1, 3, 224, 224), granularity=8)


def test_the_list_has_this_machine_and_every_table() -> None:
    known = {device.name: device for device in known_devices()}
    assert set(known) == {"local", *JETSONS}
    assert known["local"].runtime.startswith("onnxruntime-cpu")
    for name in JETSONS:
        assert known[name].how.startswith("estimated")
        assert known[name].runtime == "tensorrt"


def test_unknown_devices_get_the_nearest_names() -> None:
    check_known("local")
    with pytest.raises(CompressorError, match=r"no latency table.*jetson-orin-nano-8gb"):
        check_known("jetson-orin-nano")
    with pytest.raises(CompressorError, match="no latency table"):
        LatencyTable.load("pixel-9")
    with pytest.raises(CompressorError, match="measured for each network"):
        find_table("local")


def test_a_table_refuses_what_it_was_not_made_for() -> None:
    with pytest.raises(CompressorError, match="precision is fp32, fp16, not int8"):
        LatencyTable.load("jetson-nano", precision="int8")
    with pytest.raises(CompressorError, match="batch is 1, not 16"):
        LatencyTable.load("jetson-orin-nano-8gb", precision="fp16", batch=16)
    with pytest.raises(CompressorError, match="runtime is tensorrt, not onnxruntime-cpu"):
        LatencyTable.load("jetson-orin-nano-8gb", precision="fp16", runtime="onnxruntime-cpu")


def test_estimates_follow_the_modules_speed(resnet50: PruningSpace) -> None:
    times = {name: LatencyTable.load(name, precision="fp16").predict(resnet50) for name in JETSONS}
    assert (
        times["jetson-nano"]
        > times["jetson-tx2"]
        > times["jetson-agx-xavier"]
        > times["jetson-agx-orin-64gb"]
    )
    assert times["jetson-orin-nano-4gb"] > times["jetson-orin-nano-8gb"] > times["jetson-agx-orin-32gb"]
    assert 20 < times["jetson-nano"] < 45
    assert 3 < times["jetson-orin-nano-8gb"] < 7


def test_half_the_arithmetic_is_not_half_the_latency(resnet50: PruningSpace) -> None:
    table = LatencyTable.load("jetson-agx-orin-64gb", precision="fp16")
    half = resnet50.round(resnet50.dense_widths * 0.7)
    macs = resnet50.macs(half) / resnet50.macs(resnet50.dense_widths)
    latency = table.curve(resnet50)(half)[0] / table.predict(resnet50)
    assert 0.4 < macs < 0.6
    assert latency > macs + 0.1


def test_estimates_depend_on_input_size_and_precision(example: Tensor) -> None:
    small = PruningSpace(
        create_model("mobilenet_v2", 10, "none", (3, 96, 96)).eval(), torch.zeros(1, 3, 96, 96)
    )
    large = PruningSpace(
        create_model("mobilenet_v2", 10, "none", (3, 192, 192)).eval(), torch.zeros(1, 3, 192, 192)
    )
    fp16, fp32 = (LatencyTable.load("jetson-orin-nano-8gb", precision=each) for each in ("fp16", "fp32"))
    assert fp16.predict(small) < fp16.predict(large) < fp32.predict(large)


def test_estimates_never_fall_when_a_width_grows(resnet50: PruningSpace) -> None:
    curve = LatencyTable.load("jetson-xavier-nx", precision="fp16").curve(resnet50)
    rng = np.random.default_rng(0)
    widths = np.stack([resnet50.random_widths(rng) for _ in range(20)])
    for group in range(len(resnet50.groups)):
        wider = widths.copy()
        wider[:, group] = resnet50.dense_widths[group]
        assert (curve(wider) >= curve(widths)).all()


@pytest.mark.parametrize("name", JETSONS)
def test_every_table_says_what_it_is(name: str) -> None:
    table = find_table(name)
    assert table.estimated
    assert table.device == name
    assert "not measured" in table.fields.protocol
    assert table.fields.sources
    assert "estimated" in table.describe()
    text = json.dumps(json.loads(table.to_json()))
    assert str(Path.home()) not in text


def test_recommended_granularity() -> None:
    assert TableProvider.for_device("jetson-nano").block("fp16") == 8
    assert TableProvider.for_device("jetson-nano").block("int8") == 32
    assert TableProvider.for_device("ssh://me@orin.local").block("mixed") == 8
    assert TableProvider.for_device("jetson-nano").block("fp32") == 1
    assert LocalCpu().block("fp32") == channel_block()


def test_narrow_groups_get_finer_steps() -> None:
    space = PruningSpace(
        create_model("cifar_resnet20", 10, "none", (3, 32, 32)).eval(), torch.zeros(1, 3, 32, 32)
    )
    steps = LocalCpu().steps(space.groups, "fp32")
    block = channel_block()
    for group in space.groups:
        expected = 8 if group.width * group.unit >= 64 else 4
        assert steps[group.name] == min(block, expected)
    assert set(TableProvider.for_device("jetson-nano").steps(space.groups, "int8").values()) == {32}
    again = PruningSpace(space.model, torch.zeros(1, 3, 32, 32), granularity=steps)
    for group in again.groups:
        assert group.granularity * group.unit == steps[group.name]


def test_a_run_goes_on_only_with_a_table_of_its_device(tmp_path: Path) -> None:
    fields = {"model": "resnet18", "device": "jetson-tx2", "precision": "fp16", "budgets": {"latency": "50%"}}
    run = RunFolder.create(tmp_path / "run", parse_recipe(fields, "here").resolved().to_yaml())
    write_atomic(run.file(TABLE), LatencyTable.load("jetson-nano", "fp16").to_json())
    run.close()
    with pytest.raises(CompressorError, match="device is jetson-nano, not jetson-tx2"):
        resume(tmp_path / "run")
