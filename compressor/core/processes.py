"""Child processes that may die or hang without affecting this one, and the signals that stop this one.

Requests to a child and its replies are lines of JSON on its standard input and output, so that nothing is pickled and
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which stops its children itself
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        self._close_stderr = weakref.finalize(self, self._stderr.close)
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
            raise ChildDied(self._how_it_ended()) from None
        reply = json.loads(self._line(seconds))
        if "error" not in reply:
            return reply["value"]
        if reply["error"] == CompressorError.__name__:
            raise CompressorError(reply["message"], reply["hint"])
        raise Failed(f"{reply['error']}: {reply['message']}" if reply["message"] else reply["error"])

    def close(self) -> None:
        """Stop the process and its children."""
        self._end()
        self._close_stderr()

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
                raise ChildDied(self._how_it_ended())
            line += part
        return line

    def _how_it_ended(self) -> str:
        self._end()
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines: list[str] = []
        if not self._stderr.closed:
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            self._close_stderr()
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


SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALLED = 128
"""The exit code of a process that a signal ended is this plus the signal's number, as in shells."""
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it

_received: list[int] = []
_postponed: str | None = None  # what Ctrl-C prints while a signal raises nothing


def stopped() -> bool:
    """Return whether a signal has requested this process to stop."""
    return bool(_received)


def stop_code() -> int:
    """Return the exit code of a stopped command: 130 after Ctrl-C, 143 after SIGTERM."""
    return SIGNALLED + (_received[0] if _received else signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[None]:
    """Context of a whole command: signals raise `KeyboardInterrupt` in it, and the process ends with `stop_code()`.

    If other libraries turn the interrupt into another exception, the process ends the same way, with no traceback.
    """
    for number in SIGNALS:
        signal.signal(number, _first)
    try:
        yield
    except BaseException:
        if not _received:
            raise
        raise SystemExit(stop_code()) from None
    finally:
        for number in SIGNALS:  # during Python's shutdown an exception would be printed
            signal.signal(number, _at_once)


@contextmanager
def postponed(note: str = "Stopping after this step; Ctrl-C again stops at once.") -> Iterator[None]:
    """Context of work that asks `stopped()` itself, where it can stop: a first signal raises nothing in it.

    A signal that it has not seen raises `KeyboardInterrupt` at its end. Without `stoppable` nothing changes.

    Args:
        note: What Ctrl-C prints meanwhile.
    """
    global _postponed
    before, _postponed = _postponed, note
    try:
        yield
    finally:
        _postponed = before
    if _received:
        raise KeyboardInterrupt


def _first(number: int, _frame: Any) -> None:
    _received.append(number)
    for other in SIGNALS:
        signal.signal(other, _at_once)
    if _postponed is None:
        raise KeyboardInterrupt
    if _postponed and number == signal.SIGINT:
        os.write(2, f"\n{_postponed}\n".encode())


def _at_once(number: int, _frame: Any) -> None:
    # Every file appears by rename, so that exiting at once loses nothing that was finished; children end when their
    # standard input closes.
    if _received:
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + b"\nStopped at once.\n")
    os._exit(SIGNALLED + number)
