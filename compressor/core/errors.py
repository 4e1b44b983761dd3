"""The exceptions that users see."""

from __future__ import annotations

from pathlib import Path

from export.text import message_text


class CompressorError(Exception):
    """An error that the user can fix.

    Args:
        message: What was expected and what came instead, in one or two sentences.
        hint: How to fix it; empty if there is no advice.

    Both may quote untrusted text: control characters are removed and long words shortened (`export.text`).

    The command line prints both and ends with `exit_code`, never with a traceback.
    """
    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message_text(message)
        self.hint = message_text(hint)
        super().__init__(self.message if not hint else f"{self.message} {self.hint}")


class Stopped(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM.

    Args:
        folder: Folder of the run, with everything that was finished; the run can be resumed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"Stopped; go on with: compress --resume {folder}")
        self.folder = folder
