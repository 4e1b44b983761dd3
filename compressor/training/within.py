"""The state in the middle of an epoch, so that a training which is stopped in a long one need not repeat it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from compressor.core.errors import CompressorError
from compressor.core.processes import stopped
from compressor.core.records import Checkpoint
from compressor.training.placement import Placement

SAVE_EVERY_S = 600.0
"""Seconds of training after which the state is saved."""
_ASK_EVERY = 10
"""Steps after which several processes ask each other whether one of them wants to save."""


class WithinEpoch:
    """A checkpoint of the current epoch: saved at times and when a signal stops the process, removed at its end.

    Args:
        checkpoint: Its file.
        of: What is trained, such as a plan's checksum. The state of something else is not continued.
    """

    def __init__(self, checkpoint: Checkpoint, of: str = "") -> None:
        self._checkpoint, self._of = checkpoint, of
        self._saved = time.monotonic()

    def of_rank(self, rank: int) -> WithinEpoch:
        """Return that of one of several processes, in a file of its own: their random numbers differ."""
        path = self._checkpoint.path
        return WithinEpoch(Checkpoint(path.with_name(f"{path.stem}-{rank}{path.suffix}")), self._of)

    def begin(self, same: Mapping[str, Any], place: Placement) -> dict[str, Any] | None:
        """Return the state from which an epoch continues; None if it begins.

        Args:
            same: What a state must have been saved with to be continued, such as the number of the epoch.
            place: This process among others, which must all have a state after the same step.
        """
        self._saved = time.monotonic()
        self._same = {**same, "of": self._of}
        try:
            state = self._checkpoint.load()
        except CompressorError:  # without it the epoch is repeated
            state = None
        if state is not None and any(state.get(name) != value for name, value in self._same.items()):
            state = None
        done = 0 if state is None else int(state["done"])
        if place.world > 1:
            found = torch.tensor([done, done**2], device=place.device)
            total, squares = place.total(found).tolist()
            if total**2 != squares * place.world:  # killed while they saved
                return None
        return state

    def due(self, done: int, place: Placement) -> bool:
        """Return whether the state should be saved after this number of steps; the same in all processes."""
        wanted = stopped() or time.monotonic() - self._saved >= SAVE_EVERY_S
        if place.world == 1:
            return wanted
        return done % _ASK_EVERY == 0 and bool(place.total(torch.tensor(float(wanted), device=place.device)) > 0)

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
