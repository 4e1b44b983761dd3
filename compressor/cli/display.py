"""Progress: bars that Rich draws on a terminal, and plain lines with the time left where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from compressor.core.progress import Bar

INTERVAL_S = 30.0
"""Seconds between two lines about a task that is running."""


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        if note:
            self._progress.update(self._task, note=note)
        self._progress.advance(self._task, steps)


class RichDisplay:
    """Shows bars on a terminal while they run, and one line with the elapsed time when they end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        task = self._progress.add_task(label, total=total, note="")
        if self._open == 0:
            self._progress.start()
        self._open += 1
        try:
            yield _RichBar(self._progress, task)
        finally:
            self._open -= 1
            done = next(state for state in self._progress.tasks if state.id == task)
            note = f": {done.fields['note']}" if done.fields["note"] else ""
            self._progress.remove_task(task)
            if self._open == 0:
                self._progress.stop()
            if done.completed >= total:
                took = (f" ({_duration(done.elapsed or 0.0)})", "dim")
                self.console.print(Text.assemble(f"  {label}{note}", took), highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(self, text: str) -> None:
        self.console.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)


class _LineBar:
    """A running task: how far it is, and when it began."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.done, self.note, self.began = 0, "", time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + steps, note or self.note

    def line(self) -> str:
        """Return how far it is and how much time is left at its pace so far."""
        elapsed = time.monotonic() - self.began
        left, done = "time left not known yet", f"{self.done} of {self.total}"
        if self.done >= self.total:  # more than was planned, until it is enough
            done = f"{self.done}"
        elif self.done:
            left = f"about {_duration(elapsed / self.done * (self.total - self.done))} left"
        note = f"; {self.note}" if self.note else ""
        return f"  {self.label}: {done} in {_duration(elapsed)}, {left}{note}"


class LineDisplay:
    """Writes lines, for pipes and logs: each stage, the end of each task, and every `INTERVAL_S` how far it is.

    Args:
        write: Writes a line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._bars: list[_LineBar] = []
        self._stage, self._began = "", 0.0
        self._ended: threading.Event | None = None

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        bar = _LineBar(label, total)
        self._bars.append(bar)
        self._watch()
        try:
            yield bar
        finally:
            self._bars.remove(bar)
            if bar.done >= total:
                note = f": {bar.note}" if bar.note else ""
                self._write(f"  {label}{note} ({_duration(time.monotonic() - bar.began)})")

    def say(self, text: str) -> None:
        self._write(text)

    def stage(self, text: str) -> None:
        self._stage, self._began = text, time.monotonic()
        self._write(text)
        self._watch()

    def close(self) -> None:
        """Write no more lines about what is running."""
        if self._ended is not None:
            self._ended.set()

    def _watch(self) -> None:
        """Begin to write lines about what is running."""
        if self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._lines, args=(self._ended,), daemon=True).start()

    def _lines(self, ended: threading.Event) -> None:
        while not ended.wait(INTERVAL_S):
            bars = list(self._bars)
            for bar in bars[:1]:  # those within it are its steps
                self._write(bar.line())
            if not bars and self._stage:
                self._write(f"  {self._stage}: {_duration(time.monotonic() - self._began)} so far")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
