"""Measuring this machine: with made-up devices for the numbers, with ONNX Runtime for the plumbing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.core.progress import shown_on
from compressor.latency import assemble, local, measured, sampling
from compressor.latency.local import LocalCpu
from compressor.latency.request import Request
from compressor.latency.sampling import random_widths
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from tests.latency.conftest import local_table


def test_predicts_networks_that_it_was_not_fitted_to(
    space: PruningSpace, table: LatencyTable, truth: Callable[[np.ndarray], np.ndarray]
) -> None:
    widths = random_widths(space, 200, seed=99)
    error = table.curve(space)(widths) / truth(widths) - 1
    assert np.abs(error).mean() < 0.02
    assert np.abs(error).max() < 0.08


def test_states_its_error_and_how_it_was_made(space: PruningSpace, table: LatencyTable) -> None:
    network = next(iter(table.fields.networks.values()))
    assert network.held_out is not None
    assert network.held_out.networks == sampling.HELD_OUT
    assert network.held_out.mape < 0.03
    assert network.held_out.spearman > 0.98
    assert network.fitted_networks >= 25
    assert not table.estimated
    assert "unseen sub-networks" in table.describe()


def test_dense_is_the_measured_number(
    space: PruningSpace, table: LatencyTable, truth: Callable[[np.ndarray], np.ndarray]
) -> None:
    assert table.predict(space) == pytest.approx(float(truth(space.dense_widths)[0]), rel=1e-5)
    plan = space.uniform(0.5)
    assert table.predict(space, plan) == pytest.approx(float(truth(space.widths(plan.widths))[0]), rel=0.05)


def test_a_noisy_device_is_still_ranked(
    space: PruningSpace, example: Tensor, table: LatencyTable, device: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MAX_NETWORKS", 60)
    noisy = local_table(space, example, device=device(noise=0.2))
    widths = random_widths(space, 100, seed=5)
    quiet = table.curve(space)(widths)
    assert np.abs(noisy.curve(space)(widths) / quiet - 1).mean() < 0.05


def test_the_time_limit_cuts_fitted_and_held_out_alike(
    space: PruningSpace, example: Tensor, device: type
) -> None:
    counting = device()
    hurried = local_table(space, example, device=counting, time_limit_s=0.0)
    assert counting.measured == 14
    network = next(iter(hurried.fields.networks.values()))
    assert network.held_out is not None
    assert network.held_out.networks >= 2


def test_only_batches_of_one(space: PruningSpace) -> None:
    with pytest.raises(CompressorError, match="needs a batch of one input"):
        local_table(space, torch.zeros(4, 3, 16, 16))


class _Lines:
    """A display that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def bar(self, label: str, total: int):  # type: ignore[no-untyped-def]
        from compressor.core.progress import Quiet

        return Quiet().bar(label, total)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, device: type) -> list[int]:
    """`local_table` with a made-up device instead of ONNX Runtime; grows by one for each table that is
    measured.
    """
    made: list[int] = []
    measure = LocalCpu.measured

    def counting(
        here: LocalCpu, space: PruningSpace, example: Tensor, request: Request, **named: Any
    ) -> LatencyTable:
        made.append(request.threads)
        return measure(here, space, example, request, **named)

    monkeypatch.setattr(local, "OrtProcess", lambda threads=1, streams=1: device(noise=0.05, seed=len(made)))
    monkeypatch.setattr(LocalCpu, "measured", counting)
    return made


def test_a_second_run_reads_the_cache(
    space: PruningSpace, example: Tensor, tmp_path: Path, counted: list[int]
) -> None:
    first = local_table(space, example, cache_dir=tmp_path)
    again = local_table(space, example, cache_dir=tmp_path)
    assert counted == [1]
    assert again.to_json() == first.to_json()
    local_table(space, example, cache_dir=tmp_path, threads=2)
    assert counted == [1, 2]


Later = Callable[[Any], tuple[LatencyTable, LatencyTable, list[str]]]


@pytest.fixture
def seen_later(
    space: PruningSpace, example: Tensor, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> Later:
    """Ask for a table, and again once the machine is another device: both tables, and the lines of the second time."""

    def twice(device: Any) -> tuple[LatencyTable, LatencyTable, list[str]]:
        before = local_table(space, example, cache_dir=tmp_path)
        monkeypatch.setattr(local, "OrtProcess", lambda threads=1, streams=1: device(before))
        lines = _Lines()
        with shown_on(lines):
            return before, local_table(space, example, cache_dir=tmp_path), lines.lines

    return twice


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_table_of_a_busy_machine_is_made_anew_on_a_quiet_one(
    space: PruningSpace, counted: list[int], seen_later: Later, device: type, factor: float
) -> None:
    before, now, lines = seen_later(lambda _: device(factor=factor))
    assert counted == [1, 1]
    assert any("measured again" in line for line in lines)
    assert now.dense_ms(space) == pytest.approx(factor * before.dense_ms(space), rel=0.1)


@pytest.mark.parametrize("factor", [0.75, 1.3])
def test_a_busy_machine_keeps_its_table_where_shares_of_the_dense_network_have_not_changed(
    counted: list[int], seen_later: Later, device: type, factor: float
) -> None:
    before, now, lines = seen_later(lambda _: device(factor=factor, noise=0.05))
    assert now.to_json() == before.to_json()
    assert counted == [1]
    assert any("the table is kept" in line for line in lines)


def test_a_table_is_made_anew_where_shares_of_the_dense_network_have_changed(
    space: PruningSpace, counted: list[int], seen_later: Later, device: type
) -> None:
    class Launching(device):  # type: ignore[misc]
        """Slower by a constant: small networks lose more."""

        constant_ms = 0.0

        def whole(self, total: np.ndarray) -> np.ndarray:
            return np.asarray(super().whole(total) + self.constant_ms)

    def launching(before: LatencyTable) -> Launching:
        made = Launching()
        made.constant_ms = 0.3 * before.dense_ms(space)
        return made

    seen_later(launching)
    assert counted == [1, 1]


def test_a_damaged_cache_is_said_and_measured_anew(
    space: PruningSpace, example: Tensor, tmp_path: Path, counted: list[int]
) -> None:
    local_table(space, example, cache_dir=tmp_path)
    (file,) = (tmp_path / "latency").glob("*.json")
    file.write_text(file.read_text()[:1000])
    lines = _Lines()
    with shown_on(lines):
        local_table(space, example, cache_dir=tmp_path)
    assert counted == [1, 1]
    assert any("damaged" in line and "measured again" in line for line in lines.lines)
    json.loads(file.read_text())


def test_a_table_that_predicts_badly_says_so(
    space: PruningSpace, example: Tensor, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "UNSURE", 0.0)
    lines = _Lines()
    with shown_on(lines):
        local_table(space, example, cache_dir=tmp_path, time_limit_s=0.0)
    (file,) = (tmp_path / "latency").glob("*.json")
    assert any("unseen sub-networks" in line and str(file) in line for line in lines.lines)


def test_finer_steps_are_measured_anew(
    space: PruningSpace, example: Tensor, tmp_path: Path, counted: list[int]
) -> None:
    coarse = local_table(space, example, cache_dir=tmp_path)
    finer = PruningSpace(space.model, example, granularity=4)
    assert not coarse.covers(finer)
    fine = local_table(finer, example, cache_dir=tmp_path, time_limit_s=0.0)
    assert counted == [1, 1]
    assert fine.covers(finer)


def test_two_at_once_measure_once(
    space: PruningSpace, example: Tensor, tmp_path: Path, counted: list[int]
) -> None:
    tables: list[LatencyTable] = []
    threads = [
        threading.Thread(target=lambda: tables.append(local_table(space, example, cache_dir=tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == [1]
    assert tables[0].to_json() == tables[1].to_json()


def test_a_cache_folder_that_cannot_be_written(
    space: PruningSpace, example: Tensor, tmp_path: Path, counted: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressorError, match="COMPRESSOR_CACHE"):
        local_table(space, example, cache_dir=tmp_path / "file")


def test_onnx_runtime_itself(
    space: PruningSpace, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "SECONDS_A_NETWORK", 0.04)
    table = local_table(space, example, cache_dir=tmp_path, time_limit_s=0.0)
    curve = table.curve(space)
    smallest, dense = curve(np.stack([space.min_widths, space.dense_widths]))
    assert 0 < smallest < dense
    assert table.fields.runtime.name == "onnxruntime-cpu"
    kinds = {key.split()[0] for key in table.fields.entries}
    assert kinds == {"conv", "depthwise", "linear"}
    assert any(key.endswith("+Relu") for key in table.fields.entries)
