"""Progress on the terminal, drawn by Rich: bars with the remaining time, and plain lines between them."""

from __future__ import annotations

from collections.abc import Iterator
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


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        if note:
            self._progress.update(self._task, note=note)
        self._progress.advance(self._task, steps)


class RichDisplay:
    """Shows bars while they run, and one line with the elapsed time when they end.

    If the output is not a terminal (a log file, CI), only the closing lines appear.
    """

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
            disable=not console.is_terminal,
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
                self.console.print(Text.assemble(f"  {label}{note}", took), highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
