"""Ctrl-C and SIGTERM: the first one ends the work in good order, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALLED = (
    128  # a process that a signal ended has this and the signal's number as its exit code, as shells count
)
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it

_received: list[int] = []


def stopped() -> bool:
    """Whether a signal has asked this process to stop."""
    return bool(_received)


def stop_code() -> int:
    """The exit code of a command that was stopped: 130 after Ctrl-C, 143 after SIGTERM."""
    return SIGNALLED + (_received[0] if _received else signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[None]:
    """Around a whole command: signals raise `KeyboardInterrupt` in it, and the process ends with `stop_code()`.

    An exception that the interrupt turned into on its way through other libraries ends the same way, with no traceback.
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
        for number in SIGNALS:  # while Python shuts down an exception would be printed
            signal.signal(number, _at_once)


def _first(number: int, _frame: Any) -> None:
    _received.append(number)
    for other in SIGNALS:
        signal.signal(other, _at_once)
    raise KeyboardInterrupt


def _at_once(number: int, _frame: Any) -> None:
    # Every file appears by rename, so that leaving at once loses nothing that was finished; children end as their
    # standard input closes.
    if _received:
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + b"\nStopped at once.\n")
    os._exit(SIGNALLED + number)
