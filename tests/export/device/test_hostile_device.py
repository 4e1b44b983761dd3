"""Devices that greet, flood, hang, answer nothing, or send terminal controls: one bounded, clean message each."""

from __future__ import annotations

import gzip
import io
import os
import resource
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.device.archive import CHECKSUMS, pack, top_folder, unpack
from export.device.connection import CHUNK, Connection, Destination, run_bounded
from export.device.remote import identify, run_remote
from export.errors import ExportError
from export.files import read_bytes
from tests.archives import checksums
from tests.export.device.fake_trtexec import make_trtexec

Ssh = Callable[[str], None]

GREETS = 'echo "Welcome to \033[1mthe board\033[0m"; trap "echo Bye" EXIT; sh -c "$last"'


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ssh:
    """Put an `ssh` on PATH that does what is given, in the board's home, with the command in $last."""
    home = tmp_path / "home"
    home.mkdir()

    def install(script: str) -> None:
        program = tmp_path / "bin" / "ssh"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f"#!/bin/bash\nfor last; do :; done\ncd {home}\nexport HOME={home} last\n{script}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


def connection() -> Connection:
    return Connection(Destination("board", "me"), attempts=2, pause_s=0.01)


def test_greetings_do_no_harm(ssh: Ssh, tmp_path: Path) -> None:
    ssh(GREETS)
    content = np.random.default_rng(0).bytes(CHUNK + 1000) + b"\n>\n"
    with connection() as there:
        assert there.run("printf 'a\\n\\n'") == b"a\n\n"
        there.put(content, "some file", lambda text: None)
        assert there.get("some file", lambda text: None) == content
        assert there.once("exit 3")[0] == 3
    facts = identify("ssh://me@board", trtexec=str(make_trtexec(tmp_path / "bin", "10.3.0")))
    assert facts["tensorrt"] == "10.3.0"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("cat >/dev/null", "sent an unexpected answer: it was empty"),
        ("cat >/dev/null; echo 'System is going down'", "sent an unexpected answer: 'System is going down'"),
        ("yes tensorrt=AAAAAAAAAAAAAAAAAAAA", "sent more than 64 KB where a short answer was expected"),
        (
            r"printf 'error: \033[2J\033]0;title\007bad \u202e[bold]\u009b\n' >&2; exit 3",
            r"^me@board: bad \[bold\]\.$",
        ),
        ("yes >&2 & exit 3", "^me@board: y"),
        (
            'printf "%s" "$last" | grep -o "[0-9a-f]\\{32\\}" | { read m; printf "$m<"; read m; printf ">$m"; }',
            "did not report its TensorRT version",
        ),
    ],
)
def test_answers_that_are_none(ssh: Ssh, script: str, message: str) -> None:
    ssh(script)
    with pytest.raises(ExportError, match=message):
        identify("ssh://me@board", pause_s=0.01)


def test_a_device_that_hangs(ssh: Ssh) -> None:
    ssh("sleep 1000")
    begun = time.monotonic()
    with connection() as there, pytest.raises(ExportError, match=r"did not answer within 0\.2 s") as silent:
        there.run("true", b"x" * CHUNK, limit_s=0.2)
    assert time.monotonic() - begun < 100  # not tried again, and its child `sleep` is not waited for
    assert "ssh me@board uptime" in silent.value.hint


@pytest.mark.parametrize("said", ["", "many", "12 34", "-5", "9" * 5000, "١٢"])
def test_numbers_that_are_none(ssh: Ssh, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh('>file; wc() { echo "$SAID"; }; export -f wc; bash -c "$last"')
    monkeypatch.setenv("SAID", said)
    with connection() as there, pytest.raises(ExportError, match="sent an unexpected answer"):
        there.size("file")


def test_what_does_not_stay(ssh: Ssh) -> None:
    ssh('case $last in *"cat >>"*) cat >/dev/null;; esac; sh -c "$last"')
    with connection() as there, pytest.raises(ExportError, match="the copied bytes are lost"):
        there.put(b"content", "file", lambda text: None)


def test_a_file_that_claims_to_be_huge(ssh: Ssh) -> None:
    ssh('>file; wc() { echo 99999999999999; }; export -f wc; bash -c "$last"')
    with connection() as there, pytest.raises(ExportError, match="MB are fetched"):
        there.get("file", lambda text: None)


def test_what_a_script_says_is_bounded_and_clean(
    ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh('sh -c "$last"')
    monkeypatch.setattr("export.device.remote.LARGEST_LOG", 100_000)
    script = b"""printf 'turn \\033[2J\\342\\200\\256[bold]1\\n'; [ -f again ] || { : >again; exit 2; }
tr '\\000' x </dev/zero | head -c 200000"""
    files = {"run.sh": script}
    bundle = tmp_path / "b.tar.gz"
    bundle.write_bytes(pack({**files, CHECKSUMS: checksums(files)}, "b"))
    said: list[str] = []
    for message in (r"^me@board: turn \[bold\]1\.$", "its output is no longer read"):
        with pytest.raises(ExportError, match=message):
            run_remote("ssh://me@board", bundle, tmp_path / "r", say=said.append, poll_s=0.05, pause_s=0.01)
    assert said.count("turn [bold]1") == 2
    assert max(map(len, said)) <= 300


def test_a_flood_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = run_bounded(["yes", "x" * 4000], b"", most_bytes=1 << 16, limit_s=60)
    assert (ended.why, len(ended.output)) == ("size", 1 << 16)
    noisy = ["sh", "-c", "head -c 50000000 /dev/zero >&2; printf end >&2; cat"]
    ended = run_bounded(noisy, b"given" * 100_000, most_bytes=1 << 20, limit_s=60)
    assert (ended.code, ended.output, ended.errors[-4:]) == (0, b"given" * 100_000, b"\0end")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KB


def _tar(write: Callable[[gzip.GzipFile], object]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as file:
        write(file)
    return buffer.getvalue()


def _header(kind: bytes, size: int, name: str = "b/file") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_tar(lambda file: file.write(_header(b"x", 1 << 30) + bytes(1 << 20))), "a header is too large"),
        (_tar(lambda file: file.write(_header(b"L", 1 << 30) + bytes(1 << 20))), "a header is too large"),
        (_tar(lambda file: file.write(_header(b"x", 512) * 3000)), "too many in a row"),
        (_tar(lambda file: file.write(_header(b"0", 64 << 30))), "unpacks to more than"),
        (_tar(lambda file: file.write(_header(b"0", 0) * 300)), "unpacks to more than"),
        (_tar(lambda file: file.write(_header(b"0", 5000))), "not a complete"),
    ],
    ids=["extended header", "long name", "headers in a row", "large", "many", "cut short"],
)
def test_archives_without_bounds(
    tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.device.archive.MOST_MEMBERS", 100)
    path = tmp_path / "results.tar.gz"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        for read in (unpack, top_folder):
            with pytest.raises(ExportError, match=message):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_a_fifo_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, message in ((tmp_path / "fifo", "It is a FIFO"), (Path("/dev/zero"), "It is a device")):
        with pytest.raises(ExportError, match=message):
            read_bytes(path, "file")
        with pytest.raises(ExportError, match=message):
            unpack(path)
