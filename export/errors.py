"""The one exception of this package that users are meant to see."""

from __future__ import annotations

from export.text import message_text


class ExportError(Exception):
    """Something the user can mend.

    Args:
        message: What was expected and what came instead, in one or two sentences.
        hint: How to mend it; empty where nothing can be advised.

    Both may quote foreign text: control characters are removed and long words shortened (`export.text`).
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message_text(message)
        self.hint = message_text(hint)
        super().__init__(self.message if not hint else f"{self.message} {self.hint}")
