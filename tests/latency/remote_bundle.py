"""A bundle on a device that is not here: running its script, and spoiling what it brings back."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from export.device.archive import CHECKSUMS, unpack
from tests.archives import checksums

TOOLS = ["cat", "cut", "gzip", "head", "mkdir", "mv", "rm", "sha256sum", "sort", "tail", "tar", "tr", "wc"]
FAST = ("--duration", "1", "--warmup", "0", "--processes", "2")
ONCE = (*FAST[:-1], "1")
needs_shell = pytest.mark.skipif(os.name == "nt" or not shutil.which("dash"), reason="needs a POSIX shell")


def run(folder: Path, trtexec: Path, *options: str, shell: str = "dash") -> subprocess.CompletedProcess[str]:
    """Run the script with nothing on the path but coreutils."""
    tools = folder.parent / "tools"
    if not tools.exists():
        tools.mkdir()
        for name in TOOLS:
            (tools / name).symlink_to(str(shutil.which(name)))
    return subprocess.run(
        [str(shutil.which(shell)), str(folder / "run.sh"), *(options or FAST)],
        env={"PATH": str(tools), "TRTEXEC": str(trtexec)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def respoil(folder: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Change the results and make their checksums right again."""
    files = unpack(folder / "results.tar.gz")
    change(files)
    files.pop(CHECKSUMS, None)
    files[CHECKSUMS] = checksums(files)
    with tarfile.open(folder / "results.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"results/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return folder


def altered(files: dict[str, bytes], name: str, **changes: object) -> None:
    """Change some fields of one of the results' JSON files."""
    files[name] = json.dumps({**json.loads(files[name]), **changes}).encode()
