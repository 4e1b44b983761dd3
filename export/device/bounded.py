"""Runs a command with bounded output and time, for programs that relay output of an untrusted machine."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

_PIECE = 1 << 16
_LAST_WORDS = 1 << 14
_LINGER_S = 1.0


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: Its exit code, negative for a signal; None if `run_bounded` stopped it.
        output: Its standard output, at most `most_bytes`.
        errors: The last 16 KiB of its standard error.
        why: "", or the limit that stopped it: "time" or "size".
    """

    code: int | None
    output: bytes
    errors: bytes
    why: str


def run_bounded(command: Sequence[str], given: bytes, *, most_bytes: int, limit_s: float) -> Ended:
    """Run a command in its own process group, which is killed when it writes too much or takes too long.

    Args:
        command: The program and its arguments; no shell.
        given: Its standard input.
        most_bytes: Limit on its standard output. Only the end of standard error is kept.
        limit_s: Limit on its duration in seconds.

    Raises:
        OSError: the program cannot be started.
    """
    deadline = time.monotonic() + limit_s
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    try:
        return _exchange(process, given, most_bytes, deadline)
    finally:
        # also after Ctrl-C, which does not reach a group in its own session
        _kill(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _exchange(process: subprocess.Popen[bytes], given: bytes, most_bytes: int, deadline: float) -> Ended:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors, left, reading = bytearray(), bytearray(), memoryview(given), 2
    with selectors.DefaultSelector() as selector:
        for pipe, events in (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
        ):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, events)
        while reading:
            if process.poll() is not None:
                # its output is in the pipes; a child process that it left may keep them open
                deadline = min(deadline, time.monotonic() + _LINGER_S)
            wait = deadline - time.monotonic()
            if wait <= 0:
                break
            for key, _ in selector.select(min(wait, 0.1)):
                if key.fileobj is process.stdin:
                    try:
                        left = left[os.write(key.fd, left[:_PIECE]) :] if left else left
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, _PIECE)
                if not piece:
                    selector.unregister(key.fileobj)
                    reading -= 1
                elif key.fileobj is process.stdout:
                    output += piece
                    if len(output) > most_bytes:
                        return Ended(None, bytes(output[:most_bytes]), bytes(errors), "size")
                else:
                    errors += piece
                    del errors[:-_LAST_WORDS]
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return Ended(None, bytes(output), bytes(errors), "time")
    return Ended(code, bytes(output), bytes(errors), "")


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
