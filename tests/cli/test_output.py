"""What becomes of a command whose output cannot be written: no traceback, and an exit code that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from compressor.cli.terminal import friendly

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'compress'; from compressor.cli import main; main()"]


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*COMMAND, "devices"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode in (0, 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_message() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*COMMAND, "devices"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "No space left on device" in " ".join(ended.stderr.split())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_message(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, friendly():
        raise error
    first, second = capsys.readouterr().err.splitlines()
    assert caught.value.exit_code == 2
    assert first == f"Error: The memory is too small: {str(error).partition(chr(10))[0] or 'MemoryError'}."
    assert second.startswith("Use smaller inputs (--image-size)")


def test_another_error_stays_an_internal_one() -> None:
    with pytest.raises(RuntimeError, match="a shape is wrong"), friendly():
        raise RuntimeError("a shape is wrong")


def test_a_current_folder_that_was_removed_is_one_message(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    leave = f"os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})"
    script = f"import os, sys; from compressor.cli import main; {leave}; sys.argv = ['compress', 'list']; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    said = "Error: The current folder does not exist any more.\nGo to another one: cd DIR\n"
    assert (done.returncode, done.stderr) == (2, said)
