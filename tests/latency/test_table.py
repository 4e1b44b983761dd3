"""The file format, what a table refuses, and the curve it gives."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.latency.operators import Operators, signature_of
from compressor.latency.sampling import random_widths
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace


def _changed(table: LatencyTable, tmp_path: Path, *path: str, value: object) -> Path:
    content = json.loads(table.to_json())
    part = content
    for name in path[:-1]:
        part = part[int(name) if isinstance(part, list) else name]
    part[path[-1]] = value
    file = tmp_path / "table.json"
    file.write_text(json.dumps(content))
    return file


def test_round_trip(table: LatencyTable, space: PruningSpace, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    table.write(file)
    again = LatencyTable.read(file)
    widths = random_widths(space, 50, seed=1)
    assert again.to_json() == table.to_json()
    assert np.array_equal(again.curve(space)(widths), table.curve(space)(widths))


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0, 1e-9, "fast"])
def test_times_that_cannot_be_are_refused(table: LatencyTable, tmp_path: Path, bad: object) -> None:
    key = next(iter(table.fields.entries))
    times = [bad, *table.fields.entries[key].median_ms[1:]]
    with pytest.raises(CompressorError, match="invalid in entries"):
        LatencyTable.read(_changed(table, tmp_path, "entries", key, "median_ms", value=times))


def test_unsorted_and_ragged_points_are_refused(table: LatencyTable, tmp_path: Path) -> None:
    key = max(table.fields.entries, key=lambda name: len(table.fields.entries[name].n))
    entry = table.fields.entries[key]
    with pytest.raises(CompressorError, match="ascending"):
        LatencyTable.read(_changed(table, tmp_path, "entries", key, "c_in", value=list(reversed(entry.c_in))))
    with pytest.raises(CompressorError, match="different lengths"):
        LatencyTable.read(_changed(table, tmp_path, "entries", key, "n", value=[1]))


def test_damaged_files_are_refused(table: LatencyTable, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(table.to_json()[:-100])
    with pytest.raises(CompressorError, match="damaged"):
        LatencyTable.read(file)
    with pytest.raises(CompressorError, match="schema version 2"):
        LatencyTable.read(_changed(table, tmp_path, "schema_version", value=2))
    with pytest.raises(CompressorError, match="precison"):
        LatencyTable.read(_changed(table, tmp_path, "precison", value="fp32"))
    with pytest.raises(CompressorError, match="There is no latency table"):
        LatencyTable.read(tmp_path / "nothing.json")
    with pytest.raises(CompressorError, match="no entry"):
        LatencyTable.read(_changed(table, tmp_path, "entries", value={}))


def test_another_precision_batch_or_runtime_is_refused(table: LatencyTable) -> None:
    assert table.at("fp32").precision == "fp32"
    with pytest.raises(CompressorError, match="precision is fp32, not fp16"):
        table.at("fp16")
    with pytest.raises(CompressorError, match=r"batch is 1, not 8; runtime is onnxruntime-cpu, not tensorrt"):
        table.at("fp32", batch=8, runtime="tensorrt")


def test_ten_thousand_candidates_are_quick(table: LatencyTable, space: PruningSpace) -> None:
    curve = table.curve(space)
    widths = np.tile(random_widths(space, 100, seed=2), (100, 1))
    started = time.perf_counter()
    times = curve(widths)
    assert time.perf_counter() - started < 5.0  # some 0.02 s on a quiet machine
    assert times.shape == (10_000,)
    assert np.allclose(times[:100], [curve(row)[0] for row in widths[:100]])


def test_widths_outside_the_measured_ones_are_refused(
    table: LatencyTable, space: PruningSpace, example: Tensor
) -> None:
    wider_range = PruningSpace(space.model, example, granularity=2, min_width=2)
    assert not table.covers(wider_range)
    with pytest.raises(CompressorError, match="does not cover"):
        table.curve(wider_range)


def test_another_network_needs_known_operators(table: LatencyTable, example: Tensor) -> None:
    other = nn.Sequential(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 16, 3))
    with pytest.raises(CompressorError, match="lacks 2 of"):
        table.curve(PruningSpace(other.eval(), example, granularity=8))


def test_another_network_of_known_operators(table: LatencyTable, example: Tensor) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 48, 3, 1, 1)
            self.c, self.e = nn.Conv2d(48, 32, 3, 1, 1), nn.Conv2d(32, 48, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.e(self.c(self.b(self.a(x))))

    space = PruningSpace(Other().eval(), example, granularity=8)
    curve = table.curve(space)
    assert float(curve(space.dense_widths)[0]) > float(curve(space.min_widths)[0]) > 0


def test_refit_reaches_what_was_measured_and_never_lowers(table: LatencyTable, space: PruningSpace) -> None:
    widths = random_widths(space, 3, seed=4)
    predicted = table.curve(space)(widths)
    slower = table.refit(
        [(float(p), float(p) * factor) for p, factor in zip(predicted, (1.1, 1.5, 0.9), strict=True)]
    )
    assert np.allclose(slower.curve(space)(widths), 1.5 * predicted)
    assert np.allclose(table.curve(space)(widths), predicted)
    assert slower.dense_ms(space) == table.dense_ms(space)
    assert np.allclose(table.refit([(1.0, 0.5)]).curve(space)(widths), predicted)


def test_another_device_is_refused(table: LatencyTable) -> None:
    assert table.at("fp32", device="local").precision == "fp32"
    with pytest.raises(CompressorError, match="device is local, not jetson-orin-nano-8gb") as caught:
        table.at("fp32", device="jetson-orin-nano-8gb")
    assert "compress profile" in caught.value.hint


def test_multiply_adds_of_a_signature_by_hand(space: PruningSpace) -> None:
    stem, deep, head = (signature_of(space.layers[place]) for place in (0, 4, -1))
    assert Operators([stem]).cost(3, 32).macs == 16 * 16 * 9 * 3 * 32
    assert Operators([deep]).cost(64, 64).macs == 8 * 8 * 9 * 64
    assert Operators([head]).cost(40, 10).macs == 400


@pytest.mark.parametrize(
    ("factor", "said"), [(1e-3, "too many multiply-adds"), (1e5, "too few multiply-adds")]
)
def test_times_in_another_unit_are_refused(
    table: LatencyTable, tmp_path: Path, factor: float, said: str
) -> None:
    content = json.loads(table.to_json())
    key = "conv k3x3 s1x1 p1x1 d1x1 g1 in56x56"
    # 256 to 256 channels: 1.85 billion multiply-adds, 60 ms at some 60 GFLOP/s
    times = {name: [60.0 * factor] for name in ("median_ms", "p90_ms", "std_ms")}
    content["entries"][key] = {"c_in": [256], "c_out": [256], "n": [9], **times}
    file = tmp_path / "table.json"
    file.write_text(json.dumps(content))
    with pytest.raises(CompressorError, match=said):
        LatencyTable.read(file)
    content["entries"][key] |= {"median_ms": [60.0]}
    file.write_text(json.dumps(content))
    LatencyTable.read(file)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_network_in_another_unit_than_its_operators_is_refused(
    table: LatencyTable, tmp_path: Path, factor: float
) -> None:
    name, network = next(iter(table.fields.networks.items()))
    file = _changed(table, tmp_path, "networks", name, "dense_ms", value=network.dense_ms * factor)
    with pytest.raises(CompressorError, match="in another unit"):
        LatencyTable.read(file)


def test_bends_of_the_correction_must_ascend(table: LatencyTable, tmp_path: Path) -> None:
    name = next(iter(table.fields.networks))
    file = _changed(table, tmp_path, "networks", name, "correction", "bends", value=[[2.0, 1.0], [1.0, 1.0]])
    with pytest.raises(CompressorError, match="ascending"):
        LatencyTable.read(file)
