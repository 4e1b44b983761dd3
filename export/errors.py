"""The one exception of this package that users are meant to see."""

from __future__ import annotations


class ExportError(Exception):
    """Something the user can mend.

    Args:
        message: What was expected and what came instead, in one or two sentences.
        hint: How to mend it; empty where nothing can be advised.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message} {hint}")
        self.message = message
        self.hint = hint
