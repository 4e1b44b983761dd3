"""Measuring a GPU as the CPU is measured: with a time limit, going on after a stop, refused where it is too noisy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency import local, sampling
from compressor.latency.local import LocalGpu
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.request import Request
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from compressor.recipe import parse_recipe
from compressor.run import job
from export.device import here
from export.device.here import Backend
from export.engine.cuda import Device
from export.errors import ExportError
from tests.latency.conftest import MadeUpDevice

GPU = Device("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, 2520, "13.0")
BACKEND = Backend("tensorrt", "10.3.0", GPU)


class Gpu(MadeUpDevice):
    """A made-up GPU that may tell nothing of its operators, wander, or end at a network.

    Attributes:
        apart: Whether it tells its operators apart.
        wanders: Whether it is as fast as chance will have it, from one network to the next.
        last, ends: What it raises after so many networks.
    """

    def __init__(self, factor: float = 1.0, *, apart: bool = True, wanders: bool = False) -> None:
        super().__init__(factor=factor, noise=0.01)
        self.apart, self.wanders = apart, wanders
        self.last, self.ends = 10**9, BaseException()

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        if self.measured >= self.last:
            raise self.ends
        times = super().measure(network, seconds)
        factor = 0.5 + 1.5 * (0.618 * self.measured % 1.0) if self.wanders else 1.0
        operators = times.operators_ms[:1] if self.apart else np.zeros((0, network.operators))
        return NetworkTimes(times.whole_ms * factor, operators * factor)

    def rule(self, shape: tuple[int, ...]) -> float:
        """Blocks of 8 channels, as of tensor cores in FP16."""
        blocks = np.ceil(shape[0] / 8) * np.ceil(shape[1] / 8)
        return float(0.02 + 0.001 * blocks * np.prod(shape[2:]))


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Put a made-up GPU in the machine."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))

    def plug(device: Gpu) -> Gpu:
        monkeypatch.setattr(local, "device_of", lambda backend, precision, streams: device)
        return device

    return plug


def gpu_table(
    space: PruningSpace, example: Tensor, backend: Backend, precision: Any, **request: Any
) -> LatencyTable:
    return LocalGpu(backend).table(space, example, Request(precision=precision, **request))


def measured_table(
    space: PruningSpace, example: Tensor, backend: Backend, precision: Any, journal_path: Path, **request: Any
) -> LatencyTable:
    asked = Request(precision=precision, **request)
    return LocalGpu(backend).measured(space, example, asked, journal_path=journal_path)


def stopped_after(device: Gpu, networks: int, end: BaseException) -> Gpu:
    device.last, device.ends = networks, end
    return device


def network_of(table: LatencyTable) -> Any:
    return next(iter(table.fields.networks.values()))


@pytest.mark.parametrize("apart", [True, False])
def test_a_time_limit_cuts_fitted_and_held_out_alike(
    space: PruningSpace, example: Tensor, plugged: Any, apart: bool
) -> None:
    device = plugged(Gpu(apart=apart))
    table = gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0)
    assert device.measured == sampling.MIN_NETWORKS + 2  # and the dense network at both ends
    network = network_of(table)
    assert network.held_out.networks == 3
    assert network.fitted_networks == sampling.MIN_NETWORKS - 3 + 2
    assert table.covers(space)
    assert ("layers under the profiler" in table.fields.protocol) is apart
    assert ("by a fit" in table.fields.protocol) is not apart


def test_more_time_makes_it_anew_unless_it_is_good(
    space: PruningSpace, example: Tensor, plugged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MAX_NETWORKS", 45)
    device = plugged(Gpu())
    first = gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0, goal=0.0)
    hurried = device.measured
    gpu_table(space, example, BACKEND, "fp16", time_limit_s=1.0, goal=0.0)
    error = network_of(first).held_out.mape
    gpu_table(space, example, BACKEND, "fp16", time_limit_s=3600.0, goal=error)
    assert device.measured == hurried + 2  # a look at the dense network each time
    again = gpu_table(space, example, BACKEND, "fp16", time_limit_s=3600.0, goal=0.9 * error)
    assert device.measured > hurried + 40
    assert network_of(again).held_out.networks == sampling.HELD_OUT


def test_a_table_of_a_throttled_gpu_is_made_anew(
    space: PruningSpace, example: Tensor, plugged: Any, said: list[str]
) -> None:
    plugged(Gpu(1.5))
    then = gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0)
    quick = plugged(Gpu())
    now = gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0)
    assert quick.measured > sampling.MIN_NETWORKS
    assert any("measured again" in line for line in said)
    assert now.dense_ms(space) == pytest.approx(then.dense_ms(space) / 1.5, rel=0.05)


@pytest.mark.parametrize("apart", [True, False])
def test_a_stopped_measuring_goes_on(
    space: PruningSpace, example: Tensor, plugged: Any, tmp_path: Path, said: list[str], apart: bool
) -> None:
    plugged(stopped_after(Gpu(apart=apart), 9, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0)
    (journal,) = (tmp_path / "cache" / "latency").glob("*.partial.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 9
    second = plugged(Gpu(apart=apart))
    table = gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0)
    # nine networks less the first dense one were there; it is run three times: now, then, and at the end
    assert second.measured == sampling.MIN_NETWORKS - 8 + 3
    assert network_of(table).held_out.networks == 3
    assert any("with 9 earlier measurements" in line for line in said)
    assert not journal.exists()


def test_a_network_that_cannot_be_built_keeps_what_was_measured(
    space: PruningSpace, example: Tensor, plugged: Any, tmp_path: Path
) -> None:
    plugged(stopped_after(Gpu(), 7, ExportError("No memory is left on the GPU.")))
    with pytest.raises(CompressorError, match=r"cannot be measured: No memory is left on the GPU"):
        gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0)
    (journal,) = (tmp_path / "cache" / "latency").glob("*.partial.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + 7


OTHERS: list[tuple[str, Backend, Any, float]] = [
    ("GPU", dataclasses.replace(BACKEND, gpu=dataclasses.replace(GPU, name="NVIDIA H100")), "fp16", 1.0),
    ("driver", dataclasses.replace(BACKEND, gpu=dataclasses.replace(GPU, driver="12.4")), "fp16", 1.0),
    ("runtime", dataclasses.replace(BACKEND, kind="onnxruntime-tensorrt"), "fp16", 1.0),
    ("version", dataclasses.replace(BACKEND, version="10.13.2"), "fp16", 1.0),
    ("precision", BACKEND, "fp32", 1.0),
    ("dense time", BACKEND, "fp16", 1.3),
    ("nothing", BACKEND, "fp16", 1.0),
]


@pytest.mark.parametrize(("what", "backend", "precision", "factor"), OTHERS, ids=[each[0] for each in OTHERS])
def test_a_journal_of_something_else_is_begun_anew(
    space: PruningSpace, example: Tensor, plugged: Any, tmp_path: Path, what: str, backend: Backend,
    precision: Any, factor: float,
) -> None:  # fmt: skip
    journal = tmp_path / "table.partial.jsonl"
    plugged(stopped_after(Gpu(), 9, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        measured_table(space, example, BACKEND, "fp16", journal_path=journal)
    second = plugged(Gpu(factor))
    measured_table(space, example, backend, precision, time_limit_s=0.0, journal_path=journal)
    anew = sampling.MIN_NETWORKS + 2 + (what == "dense time")  # which takes a look to be seen
    assert second.measured == (sampling.MIN_NETWORKS - 8 + 3 if what == "nothing" else anew)


def test_a_gpu_that_is_too_noisy_is_refused(
    space: PruningSpace, example: Tensor, plugged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MAX_SPREAD", 0.5)
    monkeypatch.setattr(sampling, "REFERENCE_EVERY", 3)
    plugged(Gpu(wanders=True))
    with pytest.raises(CompressorError, match=r"too noisy .*quartiles \d+% apart, at most 50%") as caught:
        gpu_table(space, example, BACKEND, "fp16", time_limit_s=0.0)
    assert "Keep the GPU cool" in caught.value.hint
    (journal,) = (tmp_path / "cache" / "latency").glob("*.partial.jsonl")
    assert len(journal.read_text().splitlines()) == 1
    assert not list((tmp_path / "cache" / "latency").glob("*.json"))


def test_operators_that_are_not_told_apart_are_fitted(
    space: PruningSpace, example: Tensor, plugged: Any
) -> None:
    plugged(Gpu(apart=False))
    network = network_of(gpu_table(space, example, BACKEND, "fp16", time_limit_s=600.0, goal=0.2))
    assert network.held_out.networks == sampling.HELD_OUT
    assert network.held_out.mape < 0.1
    assert network.held_out.spearman > 0.95


@pytest.mark.parametrize(("given", "limit"), [(90.0, 90.0), (None, LocalGpu.time_limit_s)])
def test_the_time_limit_reaches_the_gpu(
    space: PruningSpace, example: Tensor, monkeypatch: pytest.MonkeyPatch, given: float | None, limit: float
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(here, "gpu_backend", lambda: BACKEND)
    monkeypatch.setattr(LocalGpu, "table", lambda self, *rest: asked.append(self.limit_s(rest[-1])))
    recipe = parse_recipe({"model": "resnet18", "precision": "fp16"}, "test")
    job.latency_table(recipe, space, example, given)
    assert asked == [limit]
