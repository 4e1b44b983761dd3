"""Meaning of an action: a ratio of a group's channels, or a mask over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.pruning.plan import ChannelPlan
from compressor.search.bounds import LegalWidths, Widths

if TYPE_CHECKING:
    from compressor.search.environment import PruningEnv

Masks = list[NDArray[np.float64]]


class LayerActions:
    """One number per group: the ratio to remove, relative to the ratio of the plan around which the policy acts.

    Args:
        env: Environment with the groups.
        fold: Whether values beyond 0 and the cap are mirrored there instead of clipped. With clipping, all actions of
            a policy that has moved beyond are equal, and it learns nothing from them.
    """

    size = 1
    sums_past = True

    def __init__(self, env: PruningEnv, *, fold: bool) -> None:
        self._env, self._fold = env, fold
        self.around = np.zeros(len(env.bounds.dense))

    def centre(self, widths: Widths) -> None:
        """Act around a plan of these widths (G,): an action of 0 keeps them."""
        self.around = 1.0 - np.asarray(widths) / self._env.bounds.dense

    def ratio(self, group: int, action: NDArray[np.float32], cap: float) -> float:
        """Return the ratio that an action removes from a group, 0..cap; the plan's own ratio may be above the cap."""
        cap = max(cap, float(self.around[group]))
        wanted = float(self.around[group]) + float(action[0])
        if self._fold:
            wanted = abs(wanted) if wanted < cap else 2 * cap - wanted
        return float(np.clip(wanted, 0.0, cap))

    def width(self, group: int, ratio: float) -> int:
        """Return the legal width closest to what a ratio leaves."""
        bounds = self._env.bounds
        return LegalWidths(int(bounds.dense[group]), bounds.choices[group]).width(ratio)


class ChannelActions(LayerActions):
    """As many numbers as the widest group has channels; the first of them are a group's soft mask, 0..1.

    Around a plan, the masks are above 0.5 for the channels that it keeps, and higher for more important channels.
    """

    sums_past = False

    def __init__(self, env: PruningEnv, *, fold: bool) -> None:
        super().__init__(env, fold=fold)
        self.size = int(env.bounds.dense.max())
        # Rank of each channel in its group's order of importance.
        self._place = [np.argsort(np.argsort(-scores, kind="stable")) for scores in env.saliency()]

    def mask(self, group: int, action: NDArray[np.float32], cap: float) -> NDArray[np.float64]:
        """Return the mask (width,) of an action, raised if it would keep less than 1 - cap."""
        dense = int(self._env.bounds.dense[group])
        kept = dense * (1.0 - self.around[group])
        mask = np.clip(0.5 + (kept - 0.5 - self._place[group]) / dense + action[:dense], 0.0, 1.0)
        return np.asarray(mask + max(0.0, 1.0 - cap - float(mask.mean())) * (mask < 1.0))

    def hard(self, masks: Sequence[NDArray[np.float64]]) -> Widths:
        """Return the legal widths (G,) closest to the numbers of channels with a mask above 0.5."""
        shares = [1.0 - float((mask > 0.5).mean()) for mask in masks]
        return np.array([self.width(group, share) for group, share in enumerate(shares)], dtype=np.int64)


def plan_of_masks(names: Sequence[str], masks: Sequence[NDArray[np.float64]], widths: Widths) -> ChannelPlan:
    """Return the plan that keeps the `widths` channels with the highest masks, the first of equal ones.

    >>> dict(plan_of_masks(["a"], [np.array([0.2, 0.9, 0.6])], np.array([2])).keep)
    {'a': (1, 2)}
    """
    kept = [
        sorted(np.argsort(-mask, kind="stable")[:width].tolist())
        for mask, width in zip(masks, widths, strict=True)
    ]
    return ChannelPlan(dict(zip(names, map(tuple, kept), strict=True)))
