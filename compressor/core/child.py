"""Run work in a separate process that may die or hang without affecting this one.

Requests and replies are lines of JSON on the child's standard input and output, so that nothing is pickled and
a child needs no guard in the caller's main module. A child leads a process group; it ends with its
parent, however that ends, because its standard input closes then.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from compressor.core.errors import CompressorError


class ChildDied(Exception):
    """The process ended before it answered; the text says how, with the last line that it wrote."""


class ChildLate(Exception):
    """No answer came within the time; the process was killed."""


class Failed(Exception):
    """The work itself raised in the child; the text is the exception's type and message."""


class Child:
    """One process that answers requests, one after another.

    Args:
        module: Run as `python -m module`; it calls `serve`.
        threads: Threads of torch and its libraries, set before they are imported.
    """

    def __init__(self, module: str, threads: int = 1) -> None:
        paths = [os.path.abspath(path) for path in sys.path]
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which stops its children itself
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        self._close_said = weakref.finalize(self, self._said.close)
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], seconds: float | None = None) -> Any:
        """Return the answer to one request.

        Args:
            request: JSON-compatible values.
            seconds: Time limit for the answer; the child is killed after it. None for no limit.

        Raises:
            ChildDied, ChildLate: There is no answer, and the child is gone.
            Failed: The work raised; the child is ready for the next request.
            CompressorError: The work raised one.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise ChildDied(self._obituary()) from None
        reply = json.loads(self._line(seconds))
        if "error" not in reply:
            return reply["value"]
        if reply["error"] == CompressorError.__name__:
            raise CompressorError(reply["message"], reply["hint"])
        raise Failed(f"{reply['error']}: {reply['message']}" if reply["message"] else reply["error"])

    def close(self) -> None:
        """Stop the process and its children."""
        self._end()
        self._close_said()

    def _line(self, seconds: float | None) -> bytes:
        ends = None if seconds is None else time.monotonic() + seconds
        line, pipe = b"", self._pipe
        while not line.endswith(b"\n"):
            left = None if ends is None else ends - time.monotonic()
            try:
                if left is not None and (left <= 0 or not wait([pipe], left)):
                    self.close()
                    raise ChildLate
                part = os.read(pipe, 65536)
            except OSError:  # closed meanwhile by another thread
                part = b""
            if not part:
                raise ChildDied(self._obituary())
            line += part
        return line

    def _obituary(self) -> str:
        self._end()
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines: list[str] = []
        if not self._said.closed:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
            self._close_said()
        return f"{how}; it last wrote: {lines[-1]}" if lines else how


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.05)  # if it is about to end, its own exit code is more informative
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            assert pipe is not None
            pipe.close()


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """Answer requests from standard input until it closes, then end this process and what it started.

    Whatever the work prints goes to standard error: standard output belongs to the replies.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        try:
            reply: dict[str, Any] = {"value": answer(request)}
        except CompressorError as error:
            reply = {"error": CompressorError.__name__, "message": error.message, "hint": error.hint}
        except BaseException as error:  # whatever a user's function raises is an answer, too
            reply = {"error": type(error).__name__, "message": " ".join(str(error).split())}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _listen(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os.killpg(0, signal.SIGKILL)  # the parent is gone: the work might not notice it
