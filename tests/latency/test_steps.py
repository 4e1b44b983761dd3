"""Channel steps from scans: known jumps are found again, and what is no jump is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import MadeUpDevice
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.latency.backends.cpu import OrtCpu
from compressor.latency.machine import channel_block
from compressor.latency.steps import find_step, measured_steps, refuse_table, scan
from compressor.latency.table import LatencyTable, find_table
from compressor.pruning.space import PruningSpace
from compressor.recipe import parse_recipe


class Steps24(MadeUpDevice):
    """Jumps after every 24 channels, with a small slope between."""

    def rule(self, shape: tuple[int, ...]) -> float:
        blocks = np.ceil(shape[0] / 24) * np.ceil(shape[1] / 24)
        return float(0.02 + 0.003 * blocks * np.prod(shape[2:]) + 1e-5 * shape[0])


class Smooth(MadeUpDevice):
    """No jumps at all."""

    def rule(self, shape: tuple[int, ...]) -> float:
        return float(0.02 + 1e-5 * np.prod(shape))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 144, 3, 1, 1), nn.ReLU(), nn.Conv2d(144, 96, 1), nn.ReLU(), nn.Conv2d(96, 40, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def fine() -> PruningSpace:
    torch.manual_seed(0)
    return PruningSpace(convolutions(), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("step", [8, 16, 24, 40])
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_a_staircase_is_told_from_a_slope(step: int, noise: float) -> None:
    rng = np.random.default_rng(step)
    widths = np.arange(4, 193, 4)
    stairs = 1.0 + np.ceil(widths / step) * step / 40 + 0.003 * widths
    slope = 1.0 + widths / 40
    disturbed = 1 + noise * rng.standard_normal(len(widths))
    assert find_step(widths.tolist(), (stairs * disturbed).tolist(), noise) == step
    assert find_step(widths.tolist(), (slope * disturbed).tolist(), noise) is None


def test_one_interrupted_measurement_changes_nothing() -> None:
    widths = list(range(4, 129, 4))
    times = [1.0 + np.ceil(width / 16) for width in widths]
    times[9] *= 3
    assert find_step(widths, times, 0.01) == 16


def test_too_few_widths_give_no_step() -> None:
    assert find_step([4, 8, 12, 16], [1.0, 1.0, 2.0, 2.0]) is None


def test_known_jumps_of_a_device_are_offered(fine: PruningSpace) -> None:
    device = Steps24(noise=0.1)
    example = torch.zeros(1, 3, 16, 16)
    otherwise = {group.name: 4 for group in fine.groups}
    steps = measured_steps(fine, example, device, otherwise=otherwise, least_stride=4)
    assert steps == {"0": 24, "2": 24, "4": 4}  # the last is too narrow for two steps of 24
    space = PruningSpace(fine.model, example, granularity=steps)
    assert [group.granularity for group in space.groups] == [24, 24, 4]
    assert device.measured == 2 * (32 + 22 + 10)  # two passes over the widths from a tenth on


def test_a_device_without_jumps_gets_the_finest_scanned_step(fine: PruningSpace) -> None:
    found = scan(fine, fine.groups[0], torch.zeros(1, 3, 16, 16), Smooth(noise=0.02), least_stride=8)
    assert found.step is None
    assert found.stride == 8
    assert found.widths[-1] == 144


def test_this_machines_steps_are_the_runtimes_blocks(
    example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = channel_block()
    if block == 1:
        pytest.skip("the runtime has no blocked convolutions on this processor")
    monkeypatch.setattr("compressor.latency.steps.SECONDS_A_WIDTH", 0.02)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()).append(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    )
    space = PruningSpace(model.eval(), example)
    found = scan(space, space.groups[0], example, OrtCpu(1), least_stride=4)
    assert found.step is None or found.step % block == 0  # noise may hide a jump, but must not invent one


def test_what_was_not_measured_has_no_steps(table: LatencyTable) -> None:
    with pytest.raises(CompressorError, match=r"estimated.*no measured jumps"):
        raise refuse_table(find_table("jetson-orin-nano-8gb"))
    with pytest.raises(CompressorError, match="widths of an operator: too few"):
        raise refuse_table(table)


def test_the_recipe_takes_steps_by_group() -> None:
    for given in ("measured", "auto", 8, {"layer1.*": 16}):
        recipe = parse_recipe({"model": "resnet18", "pruning": {"granularity": given}}, "test")
        assert recipe.pruning.granularity == given
    with pytest.raises(CompressorError, match="granularity"):
        parse_recipe({"model": "resnet18", "pruning": {"granularity": "wide"}}, "test")
