"""What every command does at its ends: progress on the terminal, one message where something is to be mended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from compressor.errors import CompressorError

out = Console(emoji=False)  # a function's name such as mycosts:ok: is no picture
err = Console(stderr=True, emoji=False)

BAD_INPUT = 2  # exit code: something the user can mend


@contextmanager
def friendly() -> Iterator[None]:
    """Show progress, and end with one clear message and exit code 2 where the user can mend something."""
    from compressor.display import RichDisplay
    from compressor.progress import shown_on
    from export.errors import ExportError

    signal.signal(signal.SIGINT, _first_interrupt)
    try:
        with shown_on(RichDisplay(err)):
            yield
    except (CompressorError, ExportError) as error:
        fail(error.message, error.hint)
    except KeyboardInterrupt:
        # Nothing is left to stop, and one that came while Python shuts down would spoil the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        fail("Stopped. What was finished is kept.", "Go on with: compress --resume RUN")


def fail(message: str, hint: str = "") -> None:
    err.print("[bold red]Error:[/]", end=" ")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    if hint:
        err.print(hint, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(BAD_INPUT)


def _first_interrupt(_signal: int, _frame: Any) -> None:
    signal.signal(signal.SIGINT, _second_interrupt)
    raise KeyboardInterrupt


def _second_interrupt(_signal: int, _frame: Any) -> None:
    # Every file appears by rename, so that leaving at once loses nothing that was finished.
    os.write(2, b"\nStopped at once. Go on with: compress --resume RUN\n")
    os._exit(BAD_INPUT)
