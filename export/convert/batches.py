"""Batch sizes of a network: a fixed one, or a range with the size that the engine is tuned for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Mapping, Sequence, Tuple

from export.errors import ExportError

LARGEST = 4096
MOST_TRIED = 32
Shapes = Tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Batch:
    """The minimum, optimum and maximum batch size; all are equal for a fixed batch."""

    least: int
    usual: int
    most: int

    @property
    def open(self) -> bool:
        """Whether the batch is dynamic in the file."""
        return self.least != self.most

    @property
    def label(self) -> str:
        """The part of a file name: "" for batch size 1, "batch4", "batch1-8"."""
        if not self.open:
            return "" if self.most == 1 else f"batch{self.most}"
        return f"batch{self.least}-{self.most}"

    @property
    def tried(self) -> tuple[int, ...]:
        """Batch sizes with which a file is checked; for a dynamic batch also 1 and 3."""
        if not self.open:
            return (self.most,)
        return tuple(sorted({1, 3, *(min(size, MOST_TRIED) for size in (self.least, self.usual, self.most))}))

    def profile(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shapes]:
        """An optimisation profile for the inputs whose first dimension is dynamic; {} for a fixed batch.

        Raises:
            ExportError: an input has another dynamic dimension.
        """
        made: dict[str, Shapes] = {}
        for name, shape in shapes.items():
            if -1 in shape[1:]:
                raise ExportError(
                    f"Input {name} has the shape {list(shape)}: only its first dimension, the batch, may be dynamic.",
                    "Export the network with fixed heights and widths.",
                )
            if shape and shape[0] == -1:
                least, usual, most = ((size, *shape[1:]) for size in (self.least, self.usual, self.most))
                made[name] = (least, usual, most)
        return made


ONE = Batch(1, 1, 1)


def parse_batch(text: str) -> Batch:
    """Parse a batch: `8`, `1..8` (tuned for 8) or `1..4..8` (tuned for 4).

    Raises:
        ExportError: the text has another form, or the sizes are not ascending.
    """
    if not re.fullmatch(r"[0-9]{1,4}(\.\.[0-9]{1,4}){0,2}", text):
        raise ExportError(f"{text!r} is not a batch.", "Write 8, 1..8 or 1..4..8.")
    sizes = [int(part) for part in text.split("..")]
    least, usual, most = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    if not 1 <= least <= usual <= most <= LARGEST:
        raise ExportError(
            f"{text!r} is not a batch: sizes must ascend from at least 1 to at most {LARGEST}.",
            "Write 8, 1..8 or 1..4..8.",
        )
    return Batch(least, usual, most)
