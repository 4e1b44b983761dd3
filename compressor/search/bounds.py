"""The widths that a group may have so that the episode still ends within every budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.budgets.limits import Widths, choices_for, excess, keeping_widths, kept, shares
from compressor.core.errors import CompressorError

__all__ = ["ActionBounds", "LegalWidths", "Widths"]

if TYPE_CHECKING:
    from compressor.budgets.base import Budget
    from compressor.pruning.space import PruningSpace


@dataclass(frozen=True)
class LegalWidths:
    """Legal widths of one group.

    Attributes:
        dense: Channels of the group before pruning.
        widths: Legal numbers of channels, ascending, never empty.
    """

    dense: int
    widths: Widths

    @property
    def low(self) -> float:
        """Smallest ratio that may be removed, in [0, 1)."""
        return 1.0 - float(self.widths[-1]) / self.dense

    @property
    def high(self) -> float:
        """Largest ratio that may be removed, in [0, 1)."""
        return 1.0 - float(self.widths[0]) / self.dense

    def clip(self, ratio: float) -> float:
        """Clip `ratio` to [low, high]."""
        return min(max(ratio, self.low), self.high)

    def width(self, ratio: float) -> int:
        """Return the legal width closest to what remains after removing `ratio`; of two equally close, the larger."""
        distance = np.abs(self.widths - self.dense * (1.0 - ratio))
        nearest = np.flatnonzero(distance <= distance.min() + 1e-6)
        return int(self.widths[nearest[-1]])


class ActionBounds:
    """Bounds on every action of an episode, so that all budgets are met at its end.

    Given the widths so far, a candidate width of the current group is legal if the network meets all budgets with the
    remaining groups either at their cheapest or dense. Of these, widths below the largest one that meets the budgets
    with all remaining groups dense are excluded: nothing is pruned more than needed. (arXiv 2403.19490 has the same two
    ends for MACs, but reserves nothing for the remaining groups; here their true cheapest widths are reserved, so that
    minimum widths and granularity cannot break the budget.)

    Every episode ends within every budget by construction, and this needs no cost to be monotone in the widths: there
    is one known completion (`cheapest`, or all dense) that keeps the budgets at the start, and every legal width keeps
    one of the two in force for the groups after it.

    Args:
        space: Pruning space with the groups, their legal widths and the dense widths.
        budgets: Costs with a `target` and a vectorized `predict(widths (N, G)) -> (N,)`; all must be met. If a budget
            has to build each network to price it, few widths of each group are considered.

    Raises:
        CompressorError: No widths were found that meet all budgets.
    """

    def __init__(self, space: PruningSpace, budgets: Sequence[Budget]) -> None:
        self.budgets = tuple(budgets)
        self.dense: Widths = np.asarray(space.dense_row, dtype=np.int64)
        self.choices = choices_for(space, self.budgets)
        blocks = space.blocks if space.depth else ()
        self.names = (*(group.name for group in space.groups), *(block.name for block in blocks))
        #: Number of groups; the columns after them are blocks, with 1 for present and 0 for removed.
        self.groups = len(space.groups)
        self._between = [(choices[:-1] + choices[1:]) / 2 for choices in self.choices]
        self.cheapest = keeping_widths(self.choices, self.dense, self.budgets)

    def shares(self, widths: Widths) -> NDArray[np.float64]:
        """Return predicted / target of each budget for widths (N, G), (budgets, N)."""
        return shares(self.budgets, widths)

    def excess(self, widths: Widths) -> NDArray[np.float64]:
        """Return the largest predicted / target of the budgets for widths (N, G), (N,): 1 or less meets all."""
        return excess(self.budgets, widths)

    def feasible(self, widths: Widths) -> NDArray[np.bool_]:
        """Return whether widths (N, G) meet all budgets, (N,)."""
        return kept(self.budgets, np.atleast_2d(widths))

    def round(self, widths: NDArray[np.float64]) -> Widths:
        """Return the legal widths closest to real numbers (N, G); of two equally close, the smaller."""
        found = np.empty(widths.shape, dtype=np.int64)
        for i, (choices, between) in enumerate(zip(self.choices, self._between, strict=True)):
            found[:, i] = choices[between.searchsorted(widths[:, i])]
        return found

    def legal(self, step: int, widths: Widths) -> LegalWidths:
        """Return the widths that group `step` may have.

        Args:
            step: Index of the group, 0-based.
            widths: (G,), of which the first `step`, already chosen, are read.

        Raises:
            CompressorError: The widths so far leave no way to meet the budgets; this cannot happen with legal
                ones.
        """
        choices = self.choices[step]
        rows = np.empty((2, len(choices), len(self.dense)), dtype=np.int64)
        rows[0], rows[1] = self.cheapest, self.dense
        rows[:, :, :step] = widths[:step]
        rows[:, :, step] = choices
        cheap, dense = self.feasible(rows.reshape(-1, len(self.dense))).reshape(2, -1)
        legal = cheap | dense
        if dense.any():
            legal &= choices >= choices[dense].max()
        if not legal.any():
            raise CompressorError(
                f"Group {self.names[step]} cannot keep the budgets after widths {widths[:step].tolist()}.",
                "Choose the widths of earlier groups from those that ActionBounds.legal returns.",
            )
        return LegalWidths(int(self.dense[step]), choices[legal])

    def bounds(self, step: int, widths: Widths) -> tuple[float, float]:
        """Return the smallest and the largest ratio that may be removed from group `step`; see `legal`."""
        legal = self.legal(step, widths)
        return legal.low, legal.high
