"""Progress reports of any stage, shown only if a display was installed.

Library code calls `bar` and `say`; the command line installs a display that draws them. Without a display both do
nothing, so that a notebook or a test stays quiet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """A running task on a display."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Advance by `steps`; a non-empty `note` replaces the short text after the bar."""


class Steps:
    """Advances a bar to the number of finished steps that it is called with, beginning at 0."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._done = bar, 0

    def __call__(self, done: int) -> None:
        self._bar.advance(done - self._done)
        self._done = done


class Display(Protocol):
    """Shows progress."""

    def bar(self, label: str, total: int) -> AbstractContextManager[Bar]:
        """Open a bar of `total` steps that closes with the context."""

    def say(self, text: str) -> None:
        """Show one line to the user."""

    def stage(self, text: str) -> None:
        """Show that a stage begins, which lasts until the next one."""


class Quiet:
    """A display that shows nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Show nothing."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        yield self

    def say(self, text: str) -> None:
        """Show nothing."""

    stage = say


class Both:
    """Two displays that show the same."""

    def __init__(self, first: Display, second: Display) -> None:
        self._displays = first, second

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        first, second = self._displays
        with first.bar(label, total) as one, second.bar(label, total) as other:
            yield _BothBars(one, other)

    def say(self, text: str) -> None:
        for each in self._displays:
            each.say(text)

    def stage(self, text: str) -> None:
        for each in self._displays:
            each.stage(text)


class _BothBars:
    def __init__(self, *bars: Bar) -> None:
        self._bars = bars

    def advance(self, steps: int = 1, note: str = "") -> None:
        for each in self._bars:
            each.advance(steps, note)


_display: Display = Quiet()


@contextmanager
def shown_on(display: Display) -> Iterator[None]:
    """Send progress to `display` while the context lasts."""
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


def bar(label: str, total: int) -> AbstractContextManager[Bar]:
    """Open a bar of `total` steps on the installed display."""
    return _display.bar(label, total)


def say(text: str) -> None:
    """Show one line to the user on the installed display."""
    _display.say(text)


def stage(text: str) -> None:
    """Show on the installed display that a stage begins."""
    _display.stage(text)
