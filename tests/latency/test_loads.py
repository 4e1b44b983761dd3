"""Tables of batches and of several streams: measured so, kept apart, and never used for anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency import local, remote_bundle
from compressor.latency.assemble import export_candidate, with_batch
from compressor.latency.backends.gpu import Trtexec
from compressor.latency.local import LocalCpu
from compressor.latency.measured import MeasuredDevice
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.provider import TableProvider
from compressor.latency.remote_bundle import write_table_bundle
from compressor.latency.remote_table import table_of_results
from compressor.latency.request import Request
from compressor.latency.stored import keep
from compressor.latency.table import LatencyTable, find_user_table
from compressor.pruning.space import PruningSpace
from export.convert.onnx_header import parse_header
from tests.export.device.fake_trtexec import known_layers, make_trtexec
from tests.latency.conftest import local_table
from tests.latency.remote_bundle import ONCE, run


class _Batches:
    """A device whose time grows with the batch of the file that it is given."""

    def __init__(self, device: type, streams: int) -> None:
        self._device, self.streams, self.seen = device(), streams, []

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        header = parse_header(network.model, "network")
        self.seen.append(header.shapes[header.inputs[0]][0])
        times = self._device.measure(network, seconds)
        return NetworkTimes(times.whole_ms * self.seen[-1], times.operators_ms * self.seen[-1])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, device: type) -> list[_Batches]:
    """Devices in place of ONNX Runtime, in order."""
    found: list[_Batches] = []

    def process(threads: int = 1, streams: int = 1) -> _Batches:
        found.append(_Batches(device, streams))
        return found[-1]

    monkeypatch.setattr(local, "OrtProcess", process)
    return found


def test_a_batch_is_measured_as_one_and_kept_apart(
    space: PruningSpace, example: Tensor, tmp_path: Path, made: list[_Batches]
) -> None:
    one = local_table(space, example, cache_dir=tmp_path, time_limit_s=0.0)
    eight = local_table(space, example, cache_dir=tmp_path, time_limit_s=0.0, batch=8)
    assert [set(each.seen) for each in made] == [{1}, {8}]
    assert (eight.fields.batch, one.fields.batch) == (8, 1)
    assert eight.dense_ms(space) == pytest.approx(8 * one.dense_ms(space), rel=0.05)
    assert "each run is of a batch of 8" in eight.fields.protocol
    assert "batch 8" in eight.describe()
    local_table(space, example, cache_dir=tmp_path, time_limit_s=0.0, batch=8, streams=2)
    assert made[-1].streams == 2
    assert len(list((tmp_path / "latency").glob("*.json"))) == 3
    before = len(made)
    again = local_table(space, example, cache_dir=tmp_path, time_limit_s=0.0, batch=8)
    assert again.to_json() == eight.to_json()
    assert len(made[before:]) == 1  # which only looked at the dense network
    assert len(made[-1].seen) == 1


def test_a_table_serves_for_no_other_load(table: LatencyTable) -> None:
    assert table.at("fp32", batch=1, streams=1).to_json() == table.to_json()
    with pytest.raises(CompressorError, match="its batch is 1, not 8; number of streams is 1, not 2") as refused:
        table.at("fp32", batch=8, streams=2)
    assert "compress profile --model MODEL --batch 8 --streams 2" in refused.value.hint


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch": 8}, "batch 1, and this is batch 8"),
        ({"streams": 2}, r"1 stream\(s\), and this is 2 stream\(s\)"),
        ({"threads": 2}, r"1 thread\(s\), and this is 2 thread\(s\)"),
    ],
)
def test_a_run_does_not_go_on_under_another_load(table: LatencyTable, asked: dict[str, int], message: str) -> None:
    here = LocalCpu()
    here.require_same(table, Request())
    with pytest.raises(CompressorError, match=message):
        here.require_same(table, Request(**asked))


def test_an_estimate_is_for_one_input_in_one_stream(space: PruningSpace, example: Tensor) -> None:
    board = TableProvider.for_device("jetson-nano")
    board.table(space, example, Request(precision="fp16"))
    for asked in ({"batch": 8}, {"streams": 2}):
        with pytest.raises(CompressorError, match="jetson-nano does not match the request"):
            board.table(space, example, Request(precision="fp16", **asked))


def test_a_device_that_runs_one_network_at_a_time_says_so() -> None:
    class Npu(MeasuredDevice):
        name, runtime, version = "npu-x", "npu-run", "1"

    Npu("npu-x").check_load(Request(batch=8))
    with pytest.raises(CompressorError, match="npu-x runs one network at a time, and 2 streams were requested"):
        Npu("npu-x").check_load(Request(streams=2))


def test_streams_that_share_cores_are_said_and_more_threads_than_cores_refused(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 7}, raising=False)
    LocalCpu().check_load(Request(threads=2))
    assert said == []
    LocalCpu().check_load(Request(threads=2, streams=3))
    assert said == ["3 stream(s) of 2 thread(s) need 6 cores, and there are 2: they wait for one another."]
    with pytest.raises(CompressorError, match=r"3 threads were requested, .* process is 2") as caught:
        LocalCpu().check_load(Request(threads=3))
    assert caught.value.hint.startswith("Use --threads 2 or fewer, or a machine with more cores. A run that has begun")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {7}, raising=False)
    with pytest.raises(CompressorError, match="process is 1") as caught:
        LocalCpu().check_load(Request(threads=2))
    assert caught.value.hint.startswith("Use --threads 1, or a machine")
    TableProvider.for_device("ssh://me@board").check_load(Request(threads=3))  # this machine's cores do not matter


@pytest.mark.usefixtures("own_tables")
def test_a_bundle_of_batches_in_streams(
    space: PruningSpace, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_bundle, "LEVELS", 2)
    monkeypatch.setattr(remote_bundle, "HELD_OUT", 2)
    folder = tmp_path / "carry"
    load = {"batch": 4, "streams": 2}
    write_table_bundle(space, example, folder, "my-orin", Request("small", **load))
    header = parse_header((folder / "models" / "dense.onnx").read_bytes(), "dense")
    assert header.shapes[header.inputs[0]] == (4, *example.shape[1:])
    calls = tmp_path / "calls"
    program = make_trtexec(
        tmp_path / "bin", "10.3.0", rule="named", memory=str(tmp_path / "memory"), calls=str(calls)
    )
    for path in (folder / "models").iterdir():  # worked out here, not in a process for each
        known_layers(path.read_bytes(), "named", tmp_path / "memory")
    done = run(folder, program, *ONCE)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    measured = [call for call in calls.read_text().splitlines() if "exportTimes" in call]
    assert measured
    assert all("--infStreams=2" in call for call in measured)
    table = table_of_results(folder)
    assert (table.fields.batch, table.fields.streams) == (4, 2)
    assert "each run is of a batch of 4; 2 copies" in table.fields.protocol
    path = keep(table)
    assert path.name.startswith("my-orin.fp32.batch4.streams2.")
    assert find_user_table("my-orin", "fp32", space) is None
    found = find_user_table("my-orin", "fp32", space, **load)
    assert found is not None
    board = TableProvider.for_device("my-orin")
    assert board.table(space, example, Request(**load)).to_json() == table.to_json()
    with pytest.raises(CompressorError, match=r"no latency table of my-orin in fp32\..* fp32 for batches of 4 with 2"):
        board.table(space, example, Request())


def test_trtexec_here_runs_streams(space: PruningSpace, example: Tensor, tmp_path: Path) -> None:
    """The stand-in's runs take as many times longer as there are streams."""
    network = export_candidate(space, space.rank(), with_batch(example, 2), space.min_widths)
    program = make_trtexec(tmp_path / "bin", "8.5.2", rule="named", memory=str(tmp_path / "memory"))
    alone, beside = (Trtexec(program, "fp32", streams).measure(network, 0.5) for streams in (1, 2))
    assert np.median(beside.whole_ms) == pytest.approx(2 * np.median(alone.whole_ms), rel=1e-3)
