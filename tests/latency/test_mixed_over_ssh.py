"""Tables in mixed precision of a device that ssh reaches: joined as those of this machine, of times from bundles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency import joined, over_ssh, remote_bundle
from compressor.latency.assemble import export_candidate
from compressor.latency.converted import in_precision
from compressor.latency.over_ssh import SshDevice
from compressor.latency.precisions import fastest
from compressor.latency.request import Request
from compressor.latency.sampling import random_widths
from compressor.latency.table import LatencyTable, find_user_table
from compressor.pruning.space import PruningSpace
from tests.latency.made_up_board import URL, MadeUpBoard
from tests.latency.made_up_engines import CAST, QUANTISE, whole_ms

MIXED = Request(model="small", precision="mixed", time_limit_s=0.0)


@pytest.fixture(autouse=True)
def _quick(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_bundle, "LEVELS", 2)
    monkeypatch.setattr(remote_bundle, "HELD_OUT", 2)
    monkeypatch.setattr(joined, "LEAST", 5)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> MadeUpBoard:
    return MadeUpBoard().plug(monkeypatch)


def table_of(space: PruningSpace, example: Tensor, request: Request = MIXED) -> LatencyTable:
    return SshDevice(URL).table(space, example, request)


def test_it_predicts_networks_in_their_faster_precisions(
    board: MadeUpBoard, space: PruningSpace, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "LEAST", 10)
    table, timer = table_of(space, example), SshDevice(URL).precision_timer(MIXED)
    fields = table.fields
    assert fields.joined is not None
    assert (fields.device.name, fields.precision, fields.joined.floats.precision) == (URL, "mixed", "fp16")
    assert fields.joined.to_int8_ms == pytest.approx(QUANTISE, rel=1e-3)
    assert fields.joined.to_float_ms == pytest.approx((CAST, 0.0), abs=1e-5)
    assert "each for 5 s in 3 turns between two runs of the dense network in FP16" in fields.protocol
    rows = np.stack([space.dense_widths, *random_widths(space, 5, seed=7)])
    networks = [export_candidate(space, space.rank(), example, widths).model for widths in rows]
    dense_ms = whole_ms(in_precision(networks[0], "fp16"))
    assert table.dense_ms(space) == pytest.approx(dense_ms, rel=1e-3)
    took = [whole_ms(fastest(network, timer)) / dense_ms for network in networks]
    found = table.curve(space)(rows) / table.fitted_dense_ms(space)
    assert np.abs(found / took - 1).mean() < 0.06
    assert 0 < table.in_int8(space, rows).mean() < 1


def test_it_is_measured_once(board: MadeUpBoard, space: PruningSpace, example: Tensor) -> None:
    first = table_of(space, example)
    bundles = len(board.ran)
    assert bundles == 2 + 1 + 3 * joined.LEAST  # tables, conversions, then profiles, plans and turns of each network
    assert table_of(space, example).to_json() == first.to_json()
    assert len(board.ran) == bundles
    stored = find_user_table(URL, "mixed", space)
    assert stored is not None
    assert stored.to_json() == first.to_json()
    board.facts["tensorrt"] = "10.7.0"
    with pytest.raises(CompressorError, match=r"TensorRT is 10\.7\.0, and was 10\.3\.0") as refused:
        table_of(space, example)
    assert f"--device {URL} --precision fp16" in str(refused.value.hint)
    anew = table_of(space, example, Request(model="small", precision="mixed", time_limit_s=0.0, renew=True))
    assert len(board.ran) == 2 * bundles
    assert anew.fields.runtime.version == "10.7.0"


def test_interrupted_it_continues(
    board: MadeUpBoard, space: PruningSpace, example: Tensor, own_tables: None, tmp_path: Path, said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    board.ends_after = 2 + 1 + 3 * 2 + 2  # in the turns of the third network
    with pytest.raises(KeyboardInterrupt):
        table_of(space, example)
    board.ends_after = 10**9
    table = table_of(space, example)
    assert "Continuing with 2 earlier measurements." in said
    assert len(board.ran) == 2 + 1 + 3 * joined.LEAST + 1 + 2  # conversions, and two of the third network, once more
    assert not list((tmp_path / "cache" / "tables").glob("*.jsonl"))
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "other"))
    whole = table_of(space, example)
    rows = random_widths(space, 10, seed=1)
    assert table.curve(space)(rows) == pytest.approx(whole.curve(space)(rows), rel=1e-4)


def test_layers_without_names(
    board: MadeUpBoard, space: PruningSpace, example: Tensor, said: list[str]
) -> None:
    """Networks are timed in FP16 or in INT8, whichever is faster."""
    board.named = False
    table = table_of(space, example)
    assert table.fields.joined is not None
    assert table.fields.joined.to_int8_ms == (0.0, 0.0)
    assert ["does not say which parts 100% of an engine's time belongs to" in line for line in said].count(True) == 1
    dense = export_candidate(space, space.rank(), example, np.asarray(space.dense_widths)).model
    half, int8 = (whole_ms(in_precision(dense, kind)) for kind in ("fp16", "int8"))
    share = float(table.curve(space)(np.asarray(space.dense_widths)[None])[0]) / table.fitted_dense_ms(space)
    assert share == pytest.approx(min(1.0, int8 / half), rel=0.1)


def test_another_power_mode_on_the_way(
    board: MadeUpBoard, space: PruningSpace, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*_: object, **__: object) -> int:
        board.facts["power_mode"] = "15W"
        return MadeUpBoard.run(board, *_, **__)  # type: ignore[arg-type]

    table_of(space, example, Request(model="small", precision="fp16"))
    table_of(space, example, Request(model="small", precision="int8"))
    monkeypatch.setattr(over_ssh, "run_remote", changed)
    with pytest.raises(CompressorError, match="the power mode is 15W, and was MAXN"):
        table_of(space, example)
    assert find_user_table(URL, "mixed", space) is None


def test_files_are_those_of_the_run(board: MadeUpBoard, space: PruningSpace, example: Tensor, tmp_path: Path) -> None:
    """Its opset, batch and streams, kept apart from other loads."""
    table = table_of(
        space, example, Request(model="small", precision="mixed", opset=13, batch=2, streams=2, time_limit_s=0.0)
    )
    assert board.opsets == {13}
    assert (table.fields.batch, table.fields.streams) == (2, 2)
    assert "each run is of a batch of 2; 2 copies" in table.fields.protocol
    (path,) = (tmp_path / "cache" / "tables").glob("*.mixed.*.json")
    assert ".mixed.batch2.streams2." in path.name
    assert find_user_table(URL, "mixed", space) is None
