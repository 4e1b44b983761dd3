"""The state in the middle of an epoch, so that a training which is stopped in a long one need not repeat it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.processes import stopped
from compressor.core.records import Checkpoint

SAVE_EVERY_S = 600.0
"""Seconds of training after which the state is saved."""


class WithinEpoch:
    """A checkpoint of the current epoch: saved at times and when a signal stops the process, removed at its end.

    Args:
        checkpoint: Its file.
        of: What is trained, such as a plan's checksum. The state of something else is not continued.
    """

    def __init__(self, checkpoint: Checkpoint, of: str = "") -> None:
        self._checkpoint, self._of = checkpoint, of
        self._saved = time.monotonic()

    def begin(self, same: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the state from which an epoch continues; None if it begins.

        Args:
            same: What a state must have been saved with to be continued, such as the number of the epoch.
        """
        self._saved = time.monotonic()
        self._same = {**same, "of": self._of}
        try:
            state = self._checkpoint.load()
        except CompressorError:  # without it the epoch is repeated
            state = None
        if state is not None and any(state.get(name) != value for name, value in self._same.items()):
            state = None
        return state

    def due(self) -> bool:
        """Return whether it is time to save the state."""
        return stopped() or time.monotonic() - self._saved >= SAVE_EVERY_S

    def save(self, state: Mapping[str, Any]) -> None:
        """Save the state after a step.

        Raises:
            KeyboardInterrupt: A signal has requested the process to stop.
        """
        self._checkpoint.save({**state, **self._same})
        self._saved = time.monotonic()
        if stopped():
            raise KeyboardInterrupt

    def end(self) -> None:
        """Remove the state of a finished epoch."""
        self._checkpoint.clear()
