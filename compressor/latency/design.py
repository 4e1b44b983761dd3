"""Selects sub-networks to measure, so that few whole networks fill every operator's grid.

Each group gets p levels of width. Of all combinations only p x p networks are measured, chosen as in an
orthogonal array: network (i, j) gives group g the level (a i + b j) mod p with the group's own slope (a : b).
Two groups with different slopes meet in each pair of their levels exactly once, so that an operator between
them has its complete p x p grid of (input channels, output channels). Groups that meet in one operator get
different slopes by colouring a graph; p prime gives p + 1 slopes. (R. C. Bose, "On the construction of
orthogonal sets of Latin squares", 1938.)
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from compressor.latency.signature import Widths

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

LEVELS = 5
"""Widths of each group: prime, so that the slopes are as described."""


def grid_widths(space: PruningSpace, *, levels: int = LEVELS, seed: int = 0) -> Widths:
    """Return the p x p sub-networks in random order, (p * p, G).

    The levels of each group include its smallest and its dense width.
    """
    rng = np.random.default_rng(seed)
    slopes = _slopes(space, levels)
    columns = []
    for index, slope in enumerate(slopes):
        i, j = np.divmod(np.arange(levels * levels), levels)
        level = i if slope == levels else (j + slope * i) % levels
        columns.append(_levels(space.choices(index), levels)[rng.permutation(levels)][level])
    rows = np.stack(columns, axis=1) if columns else np.zeros((levels * levels, 0), dtype=np.int64)
    return np.asarray(rng.permutation(rows, axis=0), dtype=np.int64)


def anchor_widths(space: PruningSpace) -> Widths:
    """Return the smallest network and networks of a few uniform ratios, (N, G)."""
    dense, least = np.asarray(space.dense_widths), np.asarray(space.min_widths)
    rows = [least, *(space.round(dense * share) for share in (0.15, 0.25, 0.35, 0.55, 0.75, 0.9))]
    return np.unique(np.asarray(rows, dtype=np.int64), axis=0)


def random_widths(space: PruningSpace, count: int, *, seed: int) -> Widths:
    """Draw sub-networks of all sizes, (count, G): a random ratio each, with the groups scattered around it."""
    rng = np.random.default_rng(seed)
    dense = np.asarray(space.dense_widths, dtype=np.float64)
    share = rng.uniform(0.2, 1.0, size=(count, 1)) + rng.normal(0.0, 0.25, size=(count, len(dense)))
    wanted = dense * np.clip(share, 0.0, 1.0)
    return np.asarray([space.round(row) for row in wanted], dtype=np.int64).reshape(count, len(dense))


def _levels(choices: Widths, levels: int) -> Widths:
    """Return `levels` evenly spread legal widths, ends included; widths repeat where there are fewer."""
    places = np.round(np.linspace(0, len(choices) - 1, levels)).astype(np.int64)
    return np.asarray(choices)[places]


def _slopes(space: PruningSpace, levels: int) -> list[int]:
    """Choose a slope for each group, 0 to `levels`; groups of one operator get different slopes where possible."""
    count = len(space.groups)
    meets: list[Counter[int]] = [Counter() for _ in range(count)]
    for layer in space.layers:
        near = {group for group, _ in (*layer.in_channels.terms, *layer.out_channels.terms)}
        for group in near:
            meets[group].update(near - {group})
    slopes = [-1] * count
    used: Counter[int] = Counter()
    for group in sorted(range(count), key=lambda index: -len(meets[index])):
        clashes: Counter[int] = Counter()
        for other, times in meets[group].items():
            if slopes[other] >= 0:
                clashes[slopes[other]] += times
        slopes[group] = min(range(levels + 1), key=lambda slope: (clashes[slope], used[slope]))
        used[slopes[group]] += 1
    return slopes
