"""What all commands have in common: where their output goes, and how wrong usage is quoted."""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from compressor.cli.terminal import output_as
from export.text import message_text

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result and errors.")]
LogOption = Annotated[
    Path | None,
    typer.Option("--log", help="Append progress, result and errors to this file, each line with its time."),
]
_WIDE = 100
"""Columns of a terminal from which the help is drawn in boxes: in narrower ones they would break names."""


def markup() -> Literal["rich"] | None:
    """Return how the help is drawn: in boxes on a wide terminal, in plain lines on a narrow one and in a pipe."""
    wide = sys.stdout is not None and sys.stdout.isatty() and shutil.get_terminal_size().columns >= _WIDE
    return "rich" if wide else None


def with_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with the options `--quiet` and `--log`."""
    signature = inspect.signature(command, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = (
        inspect.Parameter("quiet", keyword, default=False, annotation=QuietOption),
        inspect.Parameter("log", keyword, default=None, annotation=LogOption),
    )

    @functools.wraps(command)
    def run(*args: Any, quiet: bool, log: Path | None, **more: Any) -> Any:
        with output_as(quiet, log):
            return command(*args, **more)

    del run.__wrapped__  # its signature is another one
    parameters = [*signature.parameters.values(), *options]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


class Commands(TyperGroup):
    """The command group; usage errors quote the command line as plain, short text."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _short_quotes():
            return super().make_context(*args, **more)

    def invoke(self, *args: Any, **more: Any) -> Any:
        with _short_quotes():
            return super().invoke(*args, **more)


@contextmanager
def _short_quotes() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # click's class; newer versions of typer bundle their own copy
        if isinstance(message := getattr(error, "message", None), str):
            error.message = message_text(message)  # type: ignore[attr-defined]
        raise
