"""Value of a width: from the saliency of channels, or from measured losses of accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.core import progress
from compressor.search.candidate import MEASUREMENT

if TYPE_CHECKING:
    from compressor.search.bounds import Widths
    from compressor.search.session import SearchSession

POWERS = (1.0, 0.5, 0.25)
"""Exponents of the saliency: lower ones raise a layer's weak channels relative to its strong ones."""

_SAVE_EVERY = 5
_LEAST = 1e-4


def saliency_values(
    saliency: Sequence[NDArray[np.float64]], levels: Sequence[Widths], power: float
) -> list[NDArray[np.float64]]:
    """Return the value of each level of each group: the sum of its channels' saliencies, each to a power."""
    values = []
    for scores, widths in zip(saliency, levels, strict=True):
        kept = np.concatenate([[0.0], np.cumsum(np.sort(np.maximum(scores, 0.0) ** power)[::-1])])
        values.append(kept[widths])
    return values


class Sensitivity:
    """Cost of pruning one group alone, measured at few widths and fitted by a power of the removed share.

    Args:
        run: Session that scores the plans.
        levels: Widths of each group for which values are needed.
        points: Widths measured in each group, 1 or 2: a quarter of the channels kept, and a half.

    Attributes:
        losses: For each group measured so far, pairs of removed share and lost reward.
    """

    def __init__(self, run: SearchSession, levels: Sequence[Widths], points: int = 2) -> None:
        self._run, self._levels = run, levels
        self._kept = (0.25, 0.5)[:points]
        self.losses: list[list[list[float]]] = []

    def measure(self) -> None:
        """Measure the remaining groups, saving now and then."""
        env, groups = self._run.env, len(self._levels)
        with progress.bar("Measuring each group", total=groups) as bar:
            bar.advance(len(self.losses))
            for group in self._run.remaining(MEASUREMENT, groups):
                if self._run.spent(reserve=1):
                    return
                pairs = []
                for kept in self._kept:
                    if self._run.late:
                        return
                    levels, widths = self._levels[group], self._cut(group, kept)
                    env.ahead(self._planned(group, kept))
                    lost = env.score(env.bounds.dense).reward - self._run.score(widths, MEASUREMENT).reward
                    pairs.append([1.0 - float(widths[group] / levels[-1]), float(lost)])
                self.losses.append(pairs)
                self._run.place.steps[MEASUREMENT] = group + 1
                if (group + 1) % _SAVE_EVERY == 0 or group + 1 == groups:
                    self._run.save()
                bar.advance()

    def _cut(self, group: int, kept: float) -> Widths:
        """Return the widths with one group pruned to about this share of its channels."""
        widths, levels = self._run.env.bounds.dense.copy(), self._levels[group]
        widths[group] = levels[np.abs(levels - kept * levels[-1]).argmin()]
        return widths

    def _planned(self, group: int, kept: float) -> Iterator[Widths]:
        """Yield the plans to score from this one on; the first time, the dense network is the reference."""
        dense = self._run.env.bounds.dense
        if not self._run.env.known(dense):
            yield dense
        cuts = [(each, share) for each in range(group, len(self._levels)) for share in self._kept]
        for each, share in cuts[cuts.index((group, kept)) :]:
            yield self._cut(each, share)

    @property
    def complete(self) -> bool:
        """Whether every group is measured."""
        return len(self.losses) == len(self._levels)

    def values(self) -> list[NDArray[np.float64]]:
        """Return the value of each level of each group: the negative fitted loss."""
        return [
            -_Fitted(pairs)(1.0 - levels / levels[-1])
            for pairs, levels in zip(self.losses, self._levels, strict=True)
        ]


class _Fitted:
    """loss(x) = a * (x / x1) ** p through one or two points; p is 2 for one, and between 1 and 6 for two."""

    def __init__(self, pairs: Sequence[Sequence[float]]) -> None:
        self._most, lost = pairs[0]
        self._lost = max(lost, _LEAST)
        self._power = 2.0
        if len(pairs) > 1 and 0 < pairs[1][0] < self._most:
            half, at_half = pairs[1]
            at_half = min(max(at_half, 1e-3 * self._lost), self._lost)
            power = np.log(self._lost / at_half) / np.log(self._most / half)
            self._power = float(np.clip(power, 1.0, 6.0))

    def __call__(self, removed: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._most <= 0:  # the group has no smaller width
            return np.zeros_like(removed)
        return self._lost * np.power(removed / self._most, self._power)
