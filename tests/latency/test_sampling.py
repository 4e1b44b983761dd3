"""Which networks are measured next, when it ends, what a kill leaves, and what noise is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency import sampling
from compressor.latency.measured import duration_s
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.operators import channels
from compressor.latency.sampling import LEVELS, anchor_widths, grid_widths, random_widths
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from tests.latency.conftest import MadeUpDevice, local_table

ROOT = Path(__file__).resolve().parents[2]


def network_of(table: LatencyTable) -> Any:
    return next(iter(table.fields.networks.values()))


def test_a_goal_that_is_met_ends_it_and_one_that_is_not_goes_on(
    space: PruningSpace, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = len(sampling.anchor_widths(space)) + len(sampling.grid_widths(space)) + sampling.HELD_OUT
    monkeypatch.setattr(sampling, "BATCH", 2)
    monkeypatch.setattr(sampling, "MAX_NETWORKS", start + 3 * sampling.BATCH)
    easy, hard = MadeUpDevice(noise=0.05), MadeUpDevice(noise=0.05)
    local_table(space, example, device=easy, goal=0.2, time_limit_s=600.0)
    local_table(space, example, device=hard, goal=0.0, time_limit_s=600.0)
    assert easy.measured <= start + sampling.BATCH + 6  # the dense network in between, and at both ends
    assert hard.measured > easy.measured + sampling.BATCH


class Seen(MadeUpDevice):
    """Remembers how often it measured each network, and what it made of each time."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__(noise=noise)
        self.seen: dict[bytes, list[float]] = {}

    def measured_again(self) -> list[list[float]]:
        """What was made of each measurement of each network but the dense one, which is measured most often."""
        dense = max(self.seen.values(), key=len)
        return [each for each in self.seen.values() if each is not dense]


class Busy(Seen):
    """Every seventh network falls into a busy moment, and takes half as long again."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        times = super().measure(network, seconds)
        slower = 1.5 if self.measured % 7 == 3 else 1.0
        self.seen.setdefault(network.model, []).append(slower)
        return NetworkTimes(times.whole_ms * slower, times.operators_ms * slower)


def test_networks_of_a_busy_moment_are_measured_again(
    space: PruningSpace, example: Tensor, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MAX_NETWORKS", 60)
    device = Busy(noise=0.01)
    table = local_table(space, example, device=device, time_limit_s=600.0, goal=0.02)
    widths = sampling.random_widths(space, 100, seed=77)
    assert np.abs(table.curve(space)(widths) / truth(widths) - 1).mean() < 0.03
    slowed = [times for times in device.measured_again() if times[0] > 1]
    assert len(slowed) > 3
    assert sum(len(times) > 1 and min(times) == 1.0 for times in slowed) >= 0.7 * len(slowed)


class Slowed(Seen):
    """Says of every fifth measurement that the processor was slow meanwhile."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        times = super().measure(network, seconds)
        slowdown = 0.3 if self.measured % 5 == 3 else 0.0
        self.seen.setdefault(network.model, []).append(slowdown)
        return NetworkTimes(times.whole_ms, times.operators_ms, slowdown)


def test_a_network_that_met_a_slow_processor_is_measured_until_its_time_is_confirmed(
    space: PruningSpace, example: Tensor
) -> None:
    device = Slowed()
    local_table(space, example, device=device, goal=10.0, time_limit_s=600.0)
    met = [slowdowns for slowdowns in device.measured_again() if slowdowns[0] > 0]
    assert len(met) > 3
    for slowdowns in met:
        assert len(slowdowns) == (2 if slowdowns[1] == 0 else 3)
    assert all(len(slowdowns) <= 2 for slowdowns in device.measured_again() if slowdowns[0] == 0)


class Unsteady(MadeUpDevice):
    """As fast as chance will have it, from one network to the next."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        times = super().measure(network, seconds)
        factor = 0.5 + 1.5 * (0.618 * self.measured % 1.0)  # spread evenly from 0.5 to 2
        return NetworkTimes(times.whole_ms * factor, times.operators_ms * factor)


def test_a_machine_that_is_too_noisy_is_refused(
    space: PruningSpace, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "REFERENCE_EVERY", 3)
    journal = tmp_path / "table.partial.jsonl"
    with pytest.raises(CompressorError, match=r"too noisy .*quartiles \d+% apart, at most 50%") as caught:
        local_table(space, example, device=Unsteady(), time_limit_s=0.0, journal_path=journal)
    assert "End other programs" in caught.value.hint
    assert len(journal.read_text().splitlines()) == 1  # what it measured is not used by the next attempt


class Stopped(MadeUpDevice):
    """Is stopped while it measures a network."""

    last: int = 10**9

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        if self.measured >= self.last:
            raise KeyboardInterrupt
        return super().measure(network, seconds)


def test_a_stopped_measuring_goes_on_where_it_stood(
    space: PruningSpace, example: Tensor, tmp_path: Path
) -> None:
    journal = tmp_path / "table.partial.jsonl"
    stopped, second = Stopped(), MadeUpDevice()
    stopped.last = 20
    with pytest.raises(KeyboardInterrupt):
        local_table(space, example, device=stopped, time_limit_s=75.0, journal_path=journal)
    with journal.open("a") as file:
        file.write('{"role": "fit", "widths": [8,')  # as a kill in the middle of writing leaves it
    table = local_table(space, example, device=second, time_limit_s=75.0, journal_path=journal)
    assert not journal.exists()
    whole = MadeUpDevice()
    undisturbed = local_table(space, example, device=whole, time_limit_s=75.0)
    assert (
        second.measured <= whole.measured - 20 + 3
    )  # the dense network again, to see that the machine is the same
    assert network_of(table).held_out.networks == sampling.HELD_OUT
    assert network_of(table).dense_ms == network_of(undisturbed).dense_ms


@pytest.mark.parametrize("change", ["faster", "seed", "garbage"])
def test_a_journal_of_something_else_is_begun_anew(
    space: PruningSpace, example: Tensor, tmp_path: Path, change: str
) -> None:
    journal = tmp_path / "table.partial.jsonl"
    stopped, second = Stopped(), MadeUpDevice(factor=0.5 if change == "faster" else 1.0)
    stopped.last = 16
    with pytest.raises(KeyboardInterrupt):
        local_table(space, example, device=stopped, time_limit_s=75.0, journal_path=journal)
    if change == "garbage":
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    seed = int(change == "seed")
    table = local_table(space, example, device=second, time_limit_s=0.0, seed=seed, journal_path=journal)
    assert second.measured >= sampling.MIN_NETWORKS + 2
    assert network_of(table).fitted_networks + network_of(table).held_out.networks == sampling.MIN_NETWORKS + 2


SCRIPT = """
import sys, time, torch
from pathlib import Path
from compressor.pruning.space import PruningSpace
from tests.latency.conftest import MadeUpDevice, SmallNet, local_table
class Slow(MadeUpDevice):
    def measure(self, network, seconds):
        time.sleep(0.05)
        return super().measure(network, seconds)
torch.manual_seed(0)
example = torch.zeros(1, 3, 16, 16)
space = PruningSpace(SmallNet().eval(), example, granularity=8)
local_table(space, example, device=Slow(), time_limit_s=75.0, journal_path=Path(sys.argv[1]))
"""


def test_a_killed_measuring_leaves_whole_measurements(
    space: PruningSpace, example: Tensor, tmp_path: Path
) -> None:
    journal = tmp_path / "table.partial.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(journal)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_text().count("\n") > 8:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert len(lines) > 8
    assert [json.loads(line)["role"] for line in lines[1:3]] == ["dense", "fit"]
    second = MadeUpDevice()
    local_table(space, example, device=second, time_limit_s=0.0, journal_path=journal)
    assert second.measured <= sampling.MIN_NETWORKS + 2 + 3 - (len(lines) - 2) + 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("1.5min", 90.0), ("2 m", 120.0), ("1h", 3600.0)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["90", "0s", "-5s", "soon", "5minutes"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(CompressorError, match="not a duration"):
        duration_s(text)


def test_the_grid_holds_every_pair_of_levels_of_groups_that_meet(space: PruningSpace) -> None:
    widths = grid_widths(space)
    assert widths.shape == (LEVELS**2, len(space.groups))
    for row in widths:
        space.widths(row)
    inputs, outputs = channels(space, widths)
    for index, layer in enumerate(space.layers):
        groups = {group for group, _ in (*layer.in_channels.terms, *layer.out_channels.terms)}
        if len(groups) == 2:
            first, second = (len(np.unique(widths[:, group])) for group in groups)
            pairs = set(zip(inputs[:, index].tolist(), outputs[:, index].tolist(), strict=True))
            assert len(pairs) == first * second
    assert {tuple(row) for row in np.stack([space.min_widths])} <= {
        tuple(row) for row in anchor_widths(space)
    }
    for group in range(len(space.groups)):
        assert widths[:, group].min() == space.min_widths[group]
        assert widths[:, group].max() == space.dense_widths[group]


def test_random_sub_networks_are_legal_repeatable_and_of_every_size(space: PruningSpace) -> None:
    widths = random_widths(space, 60, seed=3)
    assert np.array_equal(widths, random_widths(space, 60, seed=3))
    for row in widths:
        space.widths(row)
    share = widths.sum(axis=1) / space.dense_widths.sum()
    assert share.min() < 0.35
    assert share.max() > 0.85
