"""Common parts of all commands on the terminal: progress, and one message for an error that the user can fix."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TextIO, cast

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from compressor.core.errors import CompressorError, Stopped
from compressor.core.processes import stop_code, stopped
from compressor.core.progress import Display
from compressor.core.tables import Table
from export.text import message_text, plain


class _Output(io.TextIOBase):
    """Standard output or standard error, which may be closed or full without affecting the work.

    A reader may close the pipe (`| head -1`): the rest of the output is then dropped, and the command ends with the
    exit code of its work. Any other failure to write to standard output is an error at the end.
    """

    failed: OSError | None = None
    """Why something could not be written, other than a closed pipe."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO | None:
        stream: TextIO | None = getattr(sys, self._name)
        return getattr(
            stream, "rich_proxied_file", stream
        )  # while a bar is drawn, Rich wraps the stream

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
        with self._writable_stream() as stream:
            if stream is not None:
                # a terminal with another encoding shows a question mark for a missing character
                stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with self._writable_stream() as stream:
            if stream is not None:
                stream.flush()

    @contextmanager
    def _writable_stream(self) -> Iterator[TextIO | None]:
        try:
            yield self._stream
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Drop all output from now on."""
        if error.errno != errno.EPIPE:
            self.failed = self.failed or error
        with suppress(OSError, ValueError):  # flushing the buffer at exit would fail again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


class _Plain(Console):
    """A console that removes control characters and format marks from all texts."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(plain(segment.text, lines=True), segment.style)


stdout, stderr = _Output("stdout"), _Output("stderr")
# no markup: [bold] in a name is part of the name, and :ok: in mycosts:ok: is not an emoji
out = _Plain(file=cast("IO[str]", stdout), emoji=False, markup=False)
err = _Plain(file=cast("IO[str]", stderr), stderr=True, emoji=False, markup=False)


class _Log:
    """A file that receives a command's lines; each is written with its time as soon as it comes."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CompressorError(
                f"--log {path} cannot be written: {error.strerror or error}.", "Give a file in a folder that exists."
            ) from error

    def write(self, text: str) -> None:
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError, ValueError):  # a full disk must not end the work
            self._file.write("".join(f"{now} {plain(line)}\n" for line in text.splitlines()))
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


@dataclass
class _Wanted:
    """Where the output of the running command goes besides the terminal, as its options say."""

    quiet: bool = False
    path: Path | None = None
    log: _Log | None = None


_wanted = _Wanted()


@contextmanager
def output_as(quiet: bool, log: Path | None) -> Iterator[None]:
    """Run a command with `--quiet` and `--log`; those of the whole command line hold for a subcommand, too."""
    global _wanted
    before = _wanted
    _wanted = _Wanted(quiet or before.quiet, log or before.path, before.log if log is None else None)
    try:
        yield
    finally:
        if _wanted.log is not None and _wanted.log is not before.log:
            _wanted.log.close()
        _wanted = before


def _logged(text: str) -> None:
    if _wanted.log is not None:
        _wanted.log.write(text)


@contextmanager
def _display() -> Iterator[Display]:
    """Open what shows the progress of the running command."""
    from compressor.cli.display import LineDisplay, RichDisplay
    from compressor.core.progress import Both, Quiet

    if _wanted.path is not None and _wanted.log is None:
        _wanted.log = _Log(_wanted.path)
    lines: list[LineDisplay] = []
    shown: Display
    if _wanted.quiet:
        shown = Quiet()
    elif err.is_terminal:
        shown = RichDisplay(err)
    else:
        shown = LineDisplay(_print)
        lines.append(shown)
    if _wanted.log is not None:
        lines.append(LineDisplay(_wanted.log.write))
        shown = Both(shown, lines[-1])
    try:
        yield shown
    finally:
        for each in lines:
            each.close()


def show(parts: Iterable[str | Table], style: str = "") -> None:
    """Print lines of text and tables, each as soon as it comes; no line is wrapped and no name broken."""
    for part in parts:
        for place, line in enumerate(part.lines() if isinstance(part, Table) else [part]):
            heading = isinstance(part, Table) and place == 0
            out.print(line, style="bold" if heading else style or None, highlight=False, soft_wrap=True)
            _logged(line)


def show_json(content: Any) -> None:
    """Print a result for programs; dataclasses are objects with their fields."""

    def plain_value(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        raise TypeError(f"{type(value).__name__} has no JSON form")

    stdout.write(json.dumps(content, indent=2, default=plain_value) + "\n")


BAD_INPUT = 2  # exit code: something that the user can fix


_OF_A_PATH = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS)
)
"""Operating system errors about paths that a user gave; a missing file without a message is an internal error."""

_UNWRITTEN = frozenset((errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def written_out() -> Iterator[None]:
    """End with a message and exit code 2 if standard output cannot be written, as on a full disk."""
    try:
        yield
    except OSError as error:  # from the help, which typer prints itself
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
    """Show progress, and end with one clear message; the exit code is 2 if the user can fix the error.

    A command that a signal stops ends with 130 or 143, and prints how to continue.
    """
    from compressor.core.progress import shown_on
    from export.errors import ExportError

    try:
        with _display() as display, shown_on(display):
            yield
    except OSError as error:
        if error.filename is None or error.errno not in _OF_A_PATH:
            raise
        fail(f"{error.filename}: {error.strerror}.")
    except (CompressorError, ExportError) as error:
        if stopped():  # for example the error of a child that the same signal ended
            _say_stopped(None)
        fail(error.message, error.hint)
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            raise
        fail(
            f"The memory is too small: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            "Use smaller inputs (--image-size), fewer at once (--set training.batch_size=N, --batch N), or a smaller "
            "network. A run that had begun continues with: compress --resume RUN",
        )
    except KeyboardInterrupt as stop:
        _say_stopped(stop)


def _of_memory(error: Exception) -> bool:
    """Return whether an error says that memory could not be allocated: torch has no class of its own for a CPU's."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def fail(message: str, hint: str = "") -> None:
    err.print("Error:", style="bold red", end=" ")
    _print(message_text(message))
    _logged(f"Error: {message_text(message)}")
    if hint:
        _print(message_text(hint))
        _logged(message_text(hint))
    raise typer.Exit(BAD_INPUT)


def _say_stopped(stop: KeyboardInterrupt | None) -> None:
    text = "Stopped. No file is incomplete; run the command again."
    if isinstance(stop, Stopped):
        text = f"Stopped. Finished stages are saved; continue with: compress --resume {stop.folder}"
    _print(text)
    _logged(text)
    raise typer.Exit(stop_code())


def _print(text: str) -> None:
    err.print(text, highlight=False, soft_wrap=True)
