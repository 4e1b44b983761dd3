"""The table of networks in mixed precision: made of two tables, and of networks that were measured so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency import joined
from compressor.latency.assemble import export_candidate
from compressor.latency.backends.cpu import OrtProcess
from compressor.latency.local import Converted, LocalCpu
from compressor.latency.networks import Device
from compressor.latency.operators import channels
from compressor.latency.precisions import Conversions, CpuTimer, fastest, measured_conversions
from compressor.latency.request import Request
from compressor.latency.sampling import random_widths
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from tests.latency.conftest import MadeUpDevice

MIXED = Request(precision="mixed")


@dataclass
class InInt8(MadeUpDevice):
    """Starting an operator takes longer than in FP32, and its work a third."""

    def rule(self, shape: tuple[int, ...]) -> float:
        return 0.05 + (super().rule(shape) - 0.02) / 3


@dataclass
class InEither(MadeUpDevice):
    """Every operator takes what it does in the faster precision; nothing is converted."""

    def rule(self, shape: tuple[int, ...]) -> float:
        return min(super().rule(shape), InInt8().rule(shape))


class MadeUpCpu(LocalCpu):
    """A CPU on which these are the devices.

    Attributes:
        factor: How much slower it has become.
        ran: Precisions in which networks were asked for.
    """

    factor = 1.0

    def __init__(self, cache_dir: Path) -> None:
        super().__init__(cache_dir=cache_dir)
        self.ran: list[str] = []

    def runner(self, request: Request) -> Device:
        self.ran.append(request.precision)
        kinds = {"fp32": MadeUpDevice, "int8": InInt8, "mixed": InEither}
        return kinds[request.precision](factor=self.factor)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpCpu:
    monkeypatch.setattr(joined, "measured_conversions", lambda *_: Conversions((0.0, 0.0), (0.0, 0.0)))
    return MadeUpCpu(cache)


@pytest.fixture
def mixed(cpu: MadeUpCpu, space: PruningSpace, example: Tensor) -> LatencyTable:
    return cpu.table(space, example, MIXED)


def times(space: PruningSpace, widths: np.ndarray, device: MadeUpDevice) -> np.ndarray:
    """What a made-up device takes for each operator, (N, layers)."""
    found = np.zeros((len(widths), len(space.layers)))
    for row, (c_in, c_out) in enumerate(zip(*channels(space, widths), strict=True)):
        for place, layer in enumerate(space.layers):
            first = 1 if layer.kind == "depthwise" else int(c_in[place])
            found[row, place] = device.rule((int(c_out[place]), first, *layer.kernel))
    return found


def test_every_operator_has_its_cheaper_precision(space: PruningSpace, mixed: LatencyTable) -> None:
    widths = random_widths(space, 200, seed=99)
    floats, int8 = times(space, widths, MadeUpDevice()), times(space, widths, InInt8())
    error = mixed.curve(space)(widths) / (0.05 + 0.9 * np.minimum(floats, int8).sum(axis=1)) - 1
    assert np.abs(error).mean() < 0.03
    assert np.abs(error).max() < 0.12
    sure = np.abs(floats - int8) > 0.1 * floats
    chosen = mixed.in_int8(space, widths)
    assert 0.1 < (int8 < floats)[sure].mean() < 0.9
    assert (chosen == (int8 < floats))[sure].mean() > 0.97


def test_shares_are_of_the_dense_network_in_fp32(
    cpu: MadeUpCpu, mixed: LatencyTable, space: PruningSpace, example: Tensor
) -> None:
    floats = cpu.table(space, example, Request())
    dense = np.asarray(space.dense_widths)[None]
    whole = 0.05 + 0.9 * times(space, dense, MadeUpDevice()).sum()
    assert mixed.dense_ms(space) == floats.dense_ms(space) == pytest.approx(whole, rel=1e-4)
    assert mixed.fitted_dense_ms(space) == floats.fitted_dense_ms(space)
    share = (0.05 + 0.9 * times(space, dense, InEither()).sum()) / whole
    predicted = float(mixed.curve(space)(dense)[0]) / mixed.fitted_dense_ms(space)
    assert predicted == pytest.approx(share, rel=0.03)
    raised = mixed.refit([(1.0, 1.2)])
    assert raised.fitted_dense_ms(space) == mixed.fitted_dense_ms(space)
    assert raised.curve(space)(dense)[0] == pytest.approx(1.2 * mixed.curve(space)(dense)[0])


def test_what_the_table_says_of_itself(mixed: LatencyTable, space: PruningSpace, tmp_path: Path) -> None:
    assert (mixed.precision, mixed.precisions) == ("mixed", ("mixed",))
    assert mixed.covers(space)
    (network,) = mixed.fields.networks.values()
    assert network.held_out is not None
    assert network.held_out.networks == joined.HELD_OUT
    assert network.held_out.mape < 0.05
    assert "mixed" in mixed.describe()
    assert "networks were held out" in mixed.fields.protocol
    mixed.write(tmp_path / "table.json")
    again = LatencyTable.read(tmp_path / "table.json")
    widths = random_widths(space, 10, seed=1)
    assert np.array_equal(again.curve(space)(widths), mixed.curve(space)(widths))
    assert again.to_json() == mixed.to_json()


def test_it_is_kept_for_as_long_as_both_tables(
    cpu: MadeUpCpu, mixed: LatencyTable, space: PruningSpace, example: Tensor
) -> None:
    cpu.ran.clear()
    assert cpu.table(space, example, MIXED).to_json() == mixed.to_json()
    assert cpu.ran == ["fp32", "int8"]  # whether their tables still hold
    cpu.factor = 2.0
    slower = cpu.table(space, example, MIXED)
    assert cpu.ran.count("mixed") == 1
    assert slower.dense_ms(space) == pytest.approx(2 * mixed.dense_ms(space), rel=1e-3)


def test_tables_that_do_not_belong_together(mixed: LatencyTable, tmp_path: Path) -> None:
    path, fields = tmp_path / "table.json", json.loads(mixed.to_json())
    swapped = {**fields["joined"], "floats": fields["joined"]["int8"], "int8": fields["joined"]["floats"]}
    other = {**fields["joined"], "int8": {**fields["joined"]["int8"], "networks": {}}}
    for changed, problem in (
        ({"joined": None}, "mixed precision, and no other one, is joined"),
        ({"precision": "int8"}, "mixed precision, and no other one, is joined"),
        ({"joined": swapped}, "its table in floats is measured in int8"),
        ({"joined": other}, "its table in int8 is of other networks"),
    ):
        path.write_text(json.dumps({**fields, **changed}))
        with pytest.raises(CompressorError, match=problem):
            LatencyTable.read(path)


def test_a_network_that_was_not_measured(mixed: LatencyTable, example: Tensor, space: PruningSpace) -> None:
    fields = mixed.fields.model_copy(update={"networks": {"0" * 16: next(iter(mixed.fields.networks.values()))}})
    with pytest.raises(CompressorError, match="in mixed precision is of another network"):
        LatencyTable(fields).curve(space)


def test_other_tables_have_the_fields_that_they_had(table: LatencyTable, space: PruningSpace) -> None:
    assert "joined" not in json.loads(table.to_json())
    assert not table.in_int8(space, np.asarray(space.dense_widths)[None]).any()


def test_networks_run_in_their_faster_precisions_here(space: PruningSpace, example: Tensor) -> None:
    network = export_candidate(space, space.rank(), example, np.asarray(space.dense_widths))
    found = measured_conversions([network.model], CpuTimer(Request()))
    assert min(*found.to_int8, *found.to_float) >= 0
    assert sum(found.to_int8) > 0
    process = OrtProcess()
    seen: list[Any] = []

    def convert(content: bytes) -> bytes:
        seen.append(fastest(content, CpuTimer(Request())))
        return bytes(seen[-1])

    taken = Converted(process, convert).measure(network, 0.1)
    process.close()
    assert taken.operators_ms.shape[1] == network.operators
    assert len(seen) == 1
    assert isinstance(LocalCpu().runner(MIXED), Converted)
    assert LocalCpu().cache_key(MIXED) == "onnxruntime-cpu-mixed"
