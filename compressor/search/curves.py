"""TensorBoard curves of a search, where a folder is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Curves:
    """Writes scalars; without a folder it does nothing, and TensorBoard is not imported.

    Args:
        folder: where the event files go; None writes none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve at `step`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
