"""An sshd on this machine that stands for a board; tests that need it skip where it is absent."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.device.connection import Connection, parse_destination

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


class Board:
    """An sshd on this machine whose sessions live in a folder of their own, and which drops on request."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        for name in ("host", "client"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(folder / "client.pub", folder / "authorized")
        session = folder / "session.sh"
        session.write_text(
            f"#!/bin/sh\ncd {self.home}\nHOME={self.home} PATH={folder}/bin:$PATH export HOME PATH\n"
            f"printf '%s\\n' \"$SSH_ORIGINAL_COMMAND\" >>{folder}/commands\n"
            f"if [ -s {folder}/drop ] && "
            f'printf \'%s\' "$SSH_ORIGINAL_COMMAND" | grep -q "$(cat {folder}/drop)"; then\n'
            f"  rm {folder}/drop\n  head -c 100000 >>{folder}/swallowed\n  kill -9 $PPID\n  exit 1\nfi\n"
            'exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        session.chmod(0o755)
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPasswordAuthentication no\n"
            f"PermitRootLogin yes\nForceCommand {session}\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
            stderr=(folder / "sshd.log").open("w"),
        )
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.05)
        else:
            self.process.kill()
            pytest.skip(f"sshd does not start: {(folder / 'sshd.log').read_text()}")
        self.options = ["-F", "none", "-i", str(folder / "client"), "-o", "StrictHostKeyChecking=no"]
        self.options += ["-o", f"UserKnownHostsFile={folder}/known", "-o", "LogLevel=ERROR"]
        self.url = f"ssh://127.0.0.1:{self.port}"

    def connection(self) -> Connection:
        return Connection(parse_destination(self.url), options=self.options, attempts=2, pause_s=0.05)

    def drop_at(self, words: str) -> None:
        """Cut the connection when the next command with these words runs."""
        (self.folder / "drop").write_text(words)

    def commands(self) -> str:
        return (self.folder / "commands").read_text()

    def ssh_on_path(self, folder: Path) -> str:
        """Write an `ssh` that knows the board's keys; the path with it in front."""
        folder.mkdir(exist_ok=True)
        program = folder / "ssh"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {" ".join(self.options)} "$@"\n')
        program.chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"


@contextmanager
def open_board(folder: Path) -> Iterator[Board]:
    """A board that runs while the context lasts."""
    if not Path(SSHD).exists() or not shutil.which("ssh-keygen"):
        pytest.skip("there is no sshd on this machine")
    made = Board(folder)
    try:
        yield made
    finally:
        made.process.terminate()
        made.process.wait(timeout=10)
