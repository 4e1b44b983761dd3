"""A device over ssh from end to end: a local sshd, a stand-in for trtexec, tables, single networks, a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from compressor.budgets.energy import find_meter
from compressor.core.errors import CompressorError
from compressor.latency import over_ssh, remote_bundle
from compressor.latency.converted import in_precision
from compressor.latency.over_ssh import SshDevice, energy_over_ssh, measured_over_ssh, ssh_table
from compressor.latency.request import Request, Turns
from compressor.latency.table import LatencyTable, find_user_table
from compressor.pruning.space import PruningSpace
from export.device.bundle import BundleInfo
from export.errors import ExportError
from export.files import sha256_bytes
from tests.export.device.fake_trtexec import make_trtexec
from tests.export.device.local_sshd import Board, open_board
from tests.latency.made_up_engines import whole_ms

ASKED = Request("small", "fp16")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with open_board(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture(scope="module")
def written(space: PruningSpace, example: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network's bundle, which every test of its table carries to the board anew."""
    patch = pytest.MonkeyPatch()
    patch.setattr(remote_bundle, "LEVELS", 2)
    patch.setattr(remote_bundle, "HELD_OUT", 2)
    patch.setattr(remote_bundle, "anchor_widths", lambda space: space.min_widths[None])
    folder = tmp_path_factory.mktemp("written") / "profile"
    remote_bundle.write_table_bundle(space, example, folder, "any", ASKED)
    patch.undo()
    return folder


@pytest.fixture
def quickly(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the bundle instead of writing it again."""

    def copied(space: PruningSpace, example: Tensor, folder: Path, *_: object) -> BundleInfo:
        shutil.copytree(written, folder)
        return BundleInfo(folder, 1, remote_bundle.target_of("any"), {"n00": "fp16"})

    monkeypatch.setattr(over_ssh, "write_table_bundle", copied)


@pytest.fixture(autouse=True)
def _quick(
    board: Board, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small design, short measurements, an `ssh` that knows the board, and tables of its own for each test."""
    monkeypatch.setattr(remote_bundle, "LEVELS", 2)
    monkeypatch.setattr(remote_bundle, "HELD_OUT", 2)
    monkeypatch.setattr(remote_bundle, "anchor_widths", lambda space: space.min_widths[None])
    quick = {"duration_s": 1, "warmup_s": 0, "processes": 1, "poll_s": 0.1, "pause_s": 0.05}
    monkeypatch.setattr(over_ssh, "PROTOCOL", quick)
    monkeypatch.setenv("PATH", board.ssh_on_path(tmp_path / "bin"))
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    shutil.rmtree(board.home / ".cache", ignore_errors=True)
    has(board, "10.3.0")


def has(board: Board, version: str, **behaviour: object) -> None:
    """Give the board a version of trtexec."""
    memory = str(board.folder / "memory")
    make_trtexec(board.folder / "bin", version, **{"rule": "named", "memory": memory, **behaviour})


def left(board: Board) -> list[Path]:
    """The bundles that lie on the board."""
    return list((board.home / ".cache" / "compressor-bundles").glob("*"))


def table_of(board: Board, space: PruningSpace, example: Tensor) -> LatencyTable:
    return ssh_table(board.url, space, example, ASKED)


@pytest.mark.usefixtures("quickly")
def test_a_table_is_measured_once(
    board: Board, space: PruningSpace, example: Tensor, said: list[str]
) -> None:
    board.drop_at("cat >>")  # and the connection drops on the way
    first = table_of(board, space, example)
    assert not (board.folder / "drop").exists()
    assert (first.device, first.fields.how, first.fields.runtime.version) == (board.url, "measured", "10.3.0")
    assert first.covers(space)
    assert left(board) == []
    before = board.commands().count("run.sh")
    assert table_of(board, space, example).to_json() == first.to_json()
    assert board.commands().count("run.sh") == before
    assert any("TensorRT 10.3.0" in line for line in said)
    has(board, "10.13.2")
    with pytest.raises(CompressorError, match=r"TensorRT is 10\.13\.2, and was 10\.3\.0") as refused:
        table_of(board, space, example)
    assert f"compress profile --model MODEL --device {board.url}" in refused.value.hint
    anew = ssh_table(board.url, space, example, replace(ASKED, renew=True))
    assert anew.fields.runtime.version == "10.13.2"
    assert find_user_table(board.url, "fp16") is not None
    assert any("It is measured again" in line for line in said)


def test_single_networks(
    board: Board, space: PruningSpace, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(over_ssh.PROTOCOL, "processes", 3)
    ranking = space.rank()
    dense, slim = (
        in_precision(remote_bundle.export_candidate(space, ranking, example, widths).model, "fp16")
        for widths in (space.dense_widths, space.min_widths)
    )
    found = measured_over_ssh(board.url, dense, slim, None)
    stats = (found.dense, found.slim)
    assert 0 < found.ratio.value < 1
    assert found.ratio.sessions == 3
    assert [each.runtime for each in stats] == ["tensorrt", "tensorrt"]
    assert 0 < stats[1].median_ms < stats[0].median_ms
    assert (stats[0].runs, stats[1].runs) == (126, 63)  # dense first and last in each of three turns
    assert left(board) == []


def test_two_networks_in_mixed_precision(
    board: Board, space: PruningSpace, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slim one has each part in its faster precision, found there: faster than in FP16, and than in INT8."""
    has(board, "10.3.0", rule="precisions")
    dense, slim = tmp_path / "dense.onnx", tmp_path / "slim.onnx"
    for path, widths in ((dense, space.dense_widths), (slim, space.round(0.7 * space.dense_widths))):
        path.write_bytes(remote_bundle.export_candidate(space, space.rank(), example, widths).model)
    device, request = SshDevice(board.url), Request(precision="mixed")
    found = device.time(dense, slim, request, Turns())
    took = {
        kind: 0.05 + 0.9 * whole_ms(in_precision(slim.read_bytes(), kind)) for kind in ("fp16", "int8")
    }
    assert found.slim.median_ms < 0.99 * min(took.values())
    whole = 0.05 + 0.9 * whole_ms(in_precision(dense.read_bytes(), "fp16"))
    assert found.dense.median_ms == pytest.approx(whole, rel=1e-3)
    assert found.ratio.value == pytest.approx(found.slim.median_ms / whole, rel=1e-2)
    assert left(board) == []


def test_energy_is_the_modules_power_for_the_time_of_a_run(
    board: Board, space: PruningSpace, example: Tensor
) -> None:
    """The stand-in for tegrastats prints twelve readings of 9.832 W and one of an idle module."""
    program = board.folder / "bin" / "tegrastats"
    program.parent.mkdir(exist_ok=True)
    lines = "\n".join(["VDD_IN 3000mW/3000mW", *["VDD_IN 9832mW/9433mW"] * 12])
    program.write_text(f"#!/bin/sh\nprintf '{lines}\\n'\nexec sleep 30\n")
    program.chmod(0o755)
    network = remote_bundle.export_candidate(space, space.rank(), example, space.min_widths).model
    times = measured_over_ssh(board.url, network, network, None).slim
    assert energy_over_ssh(board.url, network) == pytest.approx(9832 * times.mean_ms / 1e3, rel=1e-6)
    program.unlink()
    with pytest.raises(CompressorError, match="tegrastats was not found: energy is measured on Jetson modules only"):
        energy_over_ssh(board.url, network)
    assert find_meter(board.url, Request())(space).source == (
        f"tegrastats of {board.url}, the whole module, idle power included"
    )


@pytest.mark.usefixtures("quickly")
def test_a_device_that_fails_keeps_what_it_has(board: Board, space: PruningSpace, example: Tensor) -> None:
    has(board, "10.3.0", fail="build")
    with pytest.raises(
        CompressorError, match=r"could not be measured on the device; dense: .*Could not find any"
    ):
        table_of(board, space, example)
    (place,) = left(board)
    has(board, "10.3.0")
    assert table_of(board, space, example).covers(space)
    assert not place.exists()


@pytest.mark.usefixtures("quickly")
def test_a_script_that_was_ended_goes_on(board: Board, space: PruningSpace, example: Tensor) -> None:
    has(board, "10.3.0", die_after=12)
    (board.folder / "bin" / "trtexec.calls").unlink(missing_ok=True)
    with pytest.raises(CompressorError, match=r"The script on 127\.0\.0\.1 was killed") as ended:
        table_of(board, space, example)
    assert "The same command resumes" in ended.value.hint
    (place,) = left(board)
    assert place.name in ended.value.hint
    kept = len(list(place.glob("*/results/*/1-*.txt")))
    assert kept > 0
    has(board, "10.3.0")
    assert table_of(board, space, example).covers(space)
    assert left(board) == []


@pytest.mark.usefixtures("quickly")
def test_what_the_device_lacks(board: Board, space: PruningSpace, example: Tensor) -> None:
    (board.folder / "bin" / "trtexec").unlink()
    with pytest.raises(CompressorError, match="trtexec was not found: install TensorRT"):
        table_of(board, space, example)
    assert left(board) == []


def test_a_full_disk(board: Board) -> None:
    content = b"x" * 100
    (board.home / f"full.{sha256_bytes(content)[:16]}.part").symlink_to("/dev/full")
    with (
        board.connection() as connection,
        pytest.raises(ExportError, match="No space left on device") as full,
    ):
        connection.put(content, "full", lambda text: None)
    assert "Free some space there" in full.value.hint


def test_another_host_key(board: Board, space: PruningSpace, example: Tensor, tmp_path: Path) -> None:
    known = tmp_path / "known"
    stranger = (board.folder / "client.pub").read_text().split()[:2]
    port = board.url.rpartition(":")[2]
    known.write_text(f"[127.0.0.1]:{port} {' '.join(stranger)}\n")
    program = tmp_path / "bin" / "ssh"
    text = program.read_text().replace(f"{board.folder}/known", str(known))
    program.write_text(text.replace("StrictHostKeyChecking=no", "StrictHostKeyChecking=yes"))
    with pytest.raises(CompressorError, match="Host key verification failed") as refused:
        table_of(board, space, example)
    assert f"ssh-keygen -R [127.0.0.1]:{port}" in refused.value.hint


def test_addresses_that_are_none(space: PruningSpace, example: Tensor) -> None:
    from compressor.latency.table import check_known

    for url in ("ssh://", "ssh://-oProxyCommand=x", "ssh:host", "ssh://a b"):
        with pytest.raises(CompressorError, match="is not an ssh address"):
            check_known(url)
    check_known("ssh://me@orin.local:2222")


def test_a_whole_run(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor import run_recipe
    from compressor.recipe import parse_recipe

    monkeypatch.setitem(over_ssh.PROTOCOL, "processes", 3)
    recipe = parse_recipe(
        {
            "model": "tests.nets:tiny",
            "device": board.url,
            "agent": "uniform",
            "epochs": 2,
            "budgets": {"latency": "70%"},
            "search": {"max_evaluations": 3, "batch_norm_batches": 1},
            "export": {"engine": False},
        },
        "test",
    )
    result = run_recipe(recipe, out=tmp_path / "run")
    latency = result.manifest["latency"]
    assert (latency["device"], latency["runtime"], latency["precision"]) == (
        board.url,
        "tensorrt 10.3.0",
        "fp16",
    )
    assert latency["estimated"] is False
    (budget,) = result.manifest["budgets"]
    assert budget["measured"] == latency["measured_ms"] < latency["dense_ms"]
    assert (result.exit_code, budget["kept"]) == (0, True)
    assert result.manifest["rounds"][-1]["measured_ms"] == pytest.approx(budget["measured"], rel=0.05)
    assert left(board) == []
