"""A command in one of several processes that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from compressor.cli.terminal import friendly
from compressor.core.errors import CompressorError
from compressor.core.processes import stop_code, stopped
from compressor.core.progress import Quiet, shown_on
from compressor.training.team import launched


def in_first_process(command: Callable[[], None]) -> None:
    """Run a command in the first process; the others only take part in the trainings of its run.

    They get all that they need from the first one, and neither parse the command line nor print anything but their own
    errors. Their exit code is 0 unless they fail themselves, so that the first one's is that of the command.
    """
    with _exiting():
        _require_folder()
        rank, world = launched()
    if world == 1:
        command()
    elif rank == 0:
        _lead(command)
    else:
        _follow()


def _require_folder() -> None:
    """Refuse a current folder that was removed: importing torch there ends the process with a message of its own."""
    try:
        os.getcwd()
    except OSError:
        raise CompressorError("The current folder does not exist any more.", "Go to another one: cd DIR") from None


def _lead(command: Callable[[], None]) -> None:
    try:
        command()
    finally:
        if not stopped():  # else the launcher stops the others as well
            from compressor.run.together import dismiss

            with _exiting():
                dismiss()


def _follow() -> None:
    from compressor.run.follower import FirstEnded, follow
    from compressor.run.load import load

    with _exiting(), shown_on(Quiet()):
        try:
            follow(load)
        except FirstEnded:
            pass
        except KeyboardInterrupt:
            raise SystemExit(stop_code()) from None


@contextmanager
def _exiting() -> Iterator[None]:
    """Show errors as in a command, outside of one."""
    try:
        with friendly():
            yield
    except typer.Exit as ended:
        raise SystemExit(ended.exit_code) from None
