"""Ctrl-C and SIGTERM: the first one stops the work cleanly, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALLED = (
    128  # the exit code of a process ended by a signal is this plus the signal's number, as in shells
)
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it

_received: list[int] = []


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


def _first(number: int, _frame: Any) -> None:
    _received.append(number)
    for other in SIGNALS:
        signal.signal(other, _at_once)
    raise KeyboardInterrupt


def _at_once(number: int, _frame: Any) -> None:
    # Every file appears by rename, so that exiting at once loses nothing that was finished; children end when their
    # standard input closes.
    if _received:
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + b"\nStopped at once.\n")
    os._exit(SIGNALLED + number)
