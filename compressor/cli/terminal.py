"""What every command does at its ends: progress on the terminal, one message where something is to be mended."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TextIO, cast

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from compressor.core.errors import CompressorError, Stopped
from compressor.core.signals import stop_code, stopped
from export.text import message_text, plain


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
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Write nowhere from now on."""
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


_OF_A_PATH = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS)
)
"""What the system says of paths that a user gave; a file that is missing without a message is our own error."""

_UNWRITTEN = frozenset((errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


@contextmanager
def written_out() -> Iterator[None]:
    """End with a message and exit code 2 where standard output could not be written, as on a full disk."""
    try:
        yield
    except OSError as error:  # of the help, which typer writes by itself
        if error.filename is not None or error.errno not in _UNWRITTEN:
            raise
        stdout.give_up(error)
    finally:
        for stream in (stdout, stderr):
            stream.flush()
        if stdout.failed is not None:
            err.print("Error:", style="bold red", end=" ")
            _print(f"The output cannot be written: {stdout.failed.strerror or stdout.failed}.")
            raise SystemExit(BAD_INPUT)


@contextmanager
def friendly() -> Iterator[None]:
    """Show progress, and end with one clear message: with exit code 2 where the user can mend something.

    A command that a signal stops ends with 130 or 143, and says how to go on.
    """
    from compressor.cli.display import RichDisplay
    from compressor.core.progress import shown_on
    from export.errors import ExportError

    try:
        with shown_on(RichDisplay(err)):
            yield
    except OSError as error:
        if error.filename is None or error.errno not in _OF_A_PATH:
            raise
        fail(f"{error.filename}: {error.strerror}.")
    except (CompressorError, ExportError) as error:
        if stopped():  # such as that of a child which the signal ended, too
            _say_stopped(None)
        fail(error.message, error.hint)
    except KeyboardInterrupt as stop:
        _say_stopped(stop)


def fail(message: str, hint: str = "") -> None:
    err.print("Error:", style="bold red", end=" ")
    _print(message_text(message))
    if hint:
        _print(message_text(hint))
    raise typer.Exit(BAD_INPUT)


def _say_stopped(stop: KeyboardInterrupt | None) -> None:
    if isinstance(stop, Stopped):
        _print(f"Stopped. What was finished is kept; go on with: compress --resume {stop.folder}")
    else:
        _print("Stopped. No file was left half written; give the command again.")
    raise typer.Exit(stop_code())


def _print(text: str) -> None:
    err.print(text, highlight=False, soft_wrap=True)
