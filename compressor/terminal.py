"""What every command does at its ends: progress on the terminal, one message where something is to be mended."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from compressor.errors import CompressorError
from export.text import plain


class _Output(io.TextIOBase):
    """Standard output or standard error, which may go away or be full without harm to the work.

    A reader that leaves (`| head -1`) is in its right: what follows is written nowhere, and the command ends with the
    exit code that its work has. What cannot be written to standard output for another reason is an error at the end.
    """

    failed: OSError | None = None
    """Why something could not be written, other than that its reader had left."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO | None:
        stream: TextIO | None = getattr(sys, self._name)
        return getattr(
            stream, "rich_proxied_file", stream
        )  # while a bar is drawn, it stands before the stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._bearing() as stream:
            if stream is not None:
                # a terminal of another encoding gets a question mark for what it lacks
                stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with self._bearing() as stream:
            if stream is not None:
                stream.flush()

    @contextmanager
    def _bearing(self) -> Iterator[TextIO | None]:
        try:
            yield self._stream
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.failed = self.failed or error
            with suppress(OSError, ValueError):  # what is still buffered would fail again at the end
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)


class _Plain(Console):
    """A console whose texts reach the terminal without control characters and format marks, wherever they come from."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(plain(segment.text, lines=True), segment.style)


stdout, stderr = _Output("stdout"), _Output("stderr")
# no markup: [bold] in a name is a name, as :ok: in mycosts:ok: is no picture
out = _Plain(file=cast("IO[str]", stdout), emoji=False, markup=False)
err = _Plain(file=cast("IO[str]", stderr), stderr=True, emoji=False, markup=False)

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
    err.print("Error:", style="bold red", end=" ")
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
