"""The way over ssh, for real: against a local sshd, with drops in the middle and a stand-in for trtexec."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.convert.ort import onnx_outputs
from export.convert.parity import Reference
from export.convert.to_onnx import export_onnx
from export.device.archive import CHECKSUMS, pack, unpack
from export.device.bundle import make_bundle
from export.device.connection import Connection, Destination, parse_destination
from export.device.remote import _follow, _mark, place_of, run_remote
from export.device.results import read_results
from export.errors import ExportError
from tests.export.device.fake_trtexec import make_trtexec
from tests.export.device.local_sshd import Board, open_board
from tests.export.nets import SmallNet

IMAGES = np.random.default_rng(4).standard_normal((2, 3, 16, 16)).astype(np.float32)


def test_addresses() -> None:
    assert parse_destination("ssh://me@orin.local") == Destination("orin.local", "me", 0)
    assert parse_destination("ssh://10.0.0.5:2222/") == Destination("10.0.0.5", "", 2222)
    assert parse_destination("ssh://me@[fe80::1]").address == "me@fe80::1"


@pytest.mark.parametrize(
    "url",
    ["orin", "ssh://", "ssh://-oProxyCommand=reboot", "ssh://me@-x", "ssh://a b", "ssh://h:99999", "ssh://h/path;x",
     "ssh://$(reboot)", "ssh://a@b@c", "http://h"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ExportError, match="is not an ssh address: expected ssh://user@host"):
        parse_destination(url)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with open_board(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture
def connection(board: Board) -> Iterator[Connection]:
    with board.connection() as made:
        yield made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), folder / "net.onnx")
    right = Reference(IMAGES, onnx_outputs(folder / "net.onnx", IMAGES)[0])
    make_bundle(folder / "slim.tar.gz", [folder / "net.onnx"], right, target="jetson-orin-nano-8gb")
    return folder / "slim.tar.gz"


def go(board: Board, bundle: Path, tmp_path: Path, **more: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    trtexec = str(more.pop("trtexec", None) or make_trtexec(tmp_path / "bin", "10.3.0"))
    code = run_remote(
        board.url, bundle, tmp_path / "results.tar.gz", duration_s=1, processes=1, trtexec=trtexec,
        say=said.append, ssh_options=board.options, poll_s=0.1, pause_s=0.05, **more,
    )  # fmt: skip
    return code, said


def test_there_and_back(board: Board, bundle: Path, tmp_path: Path) -> None:
    code, said = go(board, bundle, tmp_path)
    assert code == 0
    results = read_results(tmp_path / "results.tar.gz", bundle)
    assert [network.status for network in results.networks.values()] == ["ok"]
    assert any("copying" in line for line in said)
    assert any("median" in line for line in said)
    again, said = go(board, bundle, tmp_path)
    assert again == 0
    assert not any("copying" in line for line in said)  # the bundle was there already
    assert any("the engine exists" in line for line in said)


def test_a_failure_on_the_board_comes_back(board: Board, bundle: Path, tmp_path: Path) -> None:
    broken = make_trtexec(tmp_path / "bin", "10.13.2", fail="measure")
    code, _ = go(board, bundle, tmp_path, trtexec=broken)
    assert code == 1
    assert read_results(tmp_path / "results.tar.gz", bundle).networks["net"].status == "measure-failed"
    with pytest.raises(ExportError, match="the version of /bin/true was not found"):
        go(board, bundle, tmp_path, trtexec="/bin/true")


@pytest.mark.parametrize("words", ["cat >>", "kill -0", "tail -c"])
def test_a_dropped_connection_is_taken_up_again(
    board: Board, bundle: Path, tmp_path: Path, words: str
) -> None:
    shutil.rmtree(board.home / ".cache", ignore_errors=True)
    board.drop_at(words)
    code, _ = go(board, bundle, tmp_path)
    assert code == 0
    assert not (board.folder / "drop").exists()  # it did drop
    assert read_results(tmp_path / "results.tar.gz", bundle).networks["net"].status == "ok"


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the board that has the number which the script's once had."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_number_that_is_another_process_now(
    board: Board, bundle: Path, tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    place = board.home / place_of(unpack(bundle)[CHECKSUMS])
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "pid").write_text(f"{stranger.pid}\n")  # as a board that was switched off in the middle has it
    code, _ = go(board, bundle, tmp_path)
    assert code == 0
    assert stranger.poll() is None
    assert read_results(tmp_path / "results.tar.gz", bundle).networks["net"].status == "ok"


def test_only_its_own_process_is_waited_for(
    board: Board, connection: Connection, stranger: subprocess.Popen[bytes]
) -> None:
    place = ".cache/compressor-bundles/0123456789abcdef"
    connection.run(f"mkdir -p {place} && echo {stranger.pid} >{place}/pid")
    with pytest.raises(ExportError, match=r"The script on .* was killed"):
        _follow(connection, place, lambda text: None, 0.01)
    assert not (board.home / place / "pid").exists()
    script = "sleep 0.5; echo 1 >rc"
    connection.run(
        f"cd {place} && nohup sh -c '{script}' {_mark(place)} >log 2>&1 </dev/null & echo $! >{place}/pid"
    )
    assert _follow(connection, place, lambda text: None, 0.1) == 1


def test_copies_go_on_where_they_broke(board: Board, connection: Connection) -> None:
    content = np.random.default_rng(0).bytes(3_000_000)
    said: list[str] = []
    connection.run("rm -f big*")
    board.drop_at("cat >>")
    connection.put(content, "big", said.append)
    assert (board.home / "big").read_bytes() == content
    assert connection.get("big", said.append) == content
    assert list(board.home.glob("big*.part")) == []
    connection.put(content, "big", said.append)
    assert sum("copying" in line for line in said) == 4  # three portions, one of them twice


def test_file_names_are_never_commands(board: Board, connection: Connection) -> None:
    name = "a b; touch hacked '$(touch hacked)'"
    connection.put(b"content", name, lambda text: None)
    assert connection.get(name, lambda text: None) == b"content"
    assert not (board.home / "hacked").exists()


def test_a_machine_that_refuses(board: Board, bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"ssh://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ExportError, match=r"127\.0\.0\.1 cannot be reached: .*refused.* Try: ssh"):
            run_remote(closed, bundle, tmp_path / "r.tar.gz", ssh_options=board.options, pause_s=0.01)
    stranger = ["-F", "none", "-o", "IdentityFile=none", "-o", "IdentitiesOnly=yes", *board.options[4:]]
    with pytest.raises(ExportError, match=r"cannot be reached: .*Permission denied"):
        run_remote(board.url, bundle, tmp_path / "r.tar.gz", ssh_options=stranger, pause_s=0.01)
    assert not (tmp_path / "r.tar.gz").exists()


def test_what_is_not_sent(board: Board, tmp_path: Path) -> None:
    for content, message in [
        (pack({"SHA256SUMS": b"", "run.sh": b"reboot"}, "x"), "without a checksum: run.sh"),
        (pack({"SHA256SUMS": b""}, "$(reboot)"), "unpacks to a folder with the name"),
        (b"noise", r"is not a complete \.tar\.gz"),
    ]:
        path = tmp_path / "bad.tar.gz"
        path.write_bytes(content)
        with pytest.raises(ExportError, match=message):
            run_remote(board.url, path, tmp_path / "r.tar.gz", ssh_options=board.options)


def test_no_ssh_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ExportError, match="ssh is not installed"),
        Connection(Destination("host")) as connection,
    ):
        connection.run("true")
