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


class Display(Protocol):
    """Shows progress."""

    def bar(self, label: str, total: int) -> AbstractContextManager[Bar]:
        """Open a bar of `total` steps that closes with the context."""

    def say(self, text: str) -> None:
        """Show one line to the user."""


class Quiet:
    """A display that shows nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Show nothing."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        yield self

    def say(self, text: str) -> None:
        """Show nothing."""


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
