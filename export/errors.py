"""The exceptions that this package raises for errors that the user can fix."""

from __future__ import annotations

from export.text import message_text


class ExportError(Exception):
    """An error that the user can fix.

    Args:
        message: What was expected and what was given, in one or two sentences.
        hint: How to fix it; empty where there is no advice.

    Both may quote untrusted text: control characters are removed and long words are shortened (`export.text`).
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message_text(message)
        self.hint = message_text(hint)
        super().__init__(self.message if not hint else f"{self.message} {self.hint}")


class DropError(ExportError):
    """No file in a lower precision keeps the score within the allowed drop."""
