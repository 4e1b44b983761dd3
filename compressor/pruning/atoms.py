"""Atoms: one for each index of each axis of each parameter, with the constraints found in a forward pass.

An axis of a tensor has *labels*, one atom per index, or None where its size is constant (batch, space, tokens).
Operations state which atoms must be kept or removed together (`unify`) and which must always be kept (`fix`). After the
pass, `solve` returns the classes of atoms that belong together: the smallest removable units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Axes = tuple["Labels | None", ...]


@dataclass(frozen=True)
class Classes:
    """The classes of atoms that `Atoms.solve` found.

    Args:
        of: Class of each atom, identified by its smallest atom, (atoms,).
        fixed: Whether the class of each atom must be kept, (atoms,).
        coupled: Whether the class of each atom is part of a residual addition, (atoms,).
        reasons: Smallest atom of a fixed class -> first reason why it must be kept.
    """

    of: Labels
    fixed: NDArray[np.bool_]
    coupled: NDArray[np.bool_]
    reasons: dict[int, str]


class Atoms:
    """Creates atoms and collects the constraints on them."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs: list[tuple[Labels, Labels]] = []
        #: (atoms that must be kept, reason), in the order of discovery.
        self.fixed: list[tuple[Labels, str]] = []
        self._coupled: list[Labels] = []

    def fresh(self, size: int) -> Labels:
        """Create the labels of a new axis with `size` indices."""
        labels = np.arange(self._count, self._count + size, dtype=np.int64)
        self._count += size
        return labels

    def unify(self, a: Labels, b: Labels) -> None:
        """Tie the atoms at equal positions of `a` and `b`, which have the same shape."""
        if a is not b:
            self._pairs.append((a.reshape(-1), b.reshape(-1)))

    def fix(self, labels: Labels | None, reason: str) -> None:
        """Require that these atoms are kept, because of `reason` (a clause that follows "left dense:")."""
        if labels is not None:
            self.fixed.append((labels.reshape(-1), reason))

    def couple(self, labels: Labels) -> None:
        """Mark these atoms as part of an addition of two activations."""
        self._coupled.append(labels.reshape(-1))

    def solve(self) -> Classes:
        """Return the classes of tied atoms (connected components by hooking and pointer jumping)."""
        parent = np.arange(self._count, dtype=np.int64)
        if self._pairs:
            left = np.concatenate([a for a, _ in self._pairs])
            right = np.concatenate([b for _, b in self._pairs])
            keep = left != right
            left, right = left[keep], right[keep]
            while left.size:
                low, high = np.minimum(left, right), np.maximum(left, right)
                np.minimum.at(parent, high, low)
                while True:
                    jumped = parent[parent]
                    if np.array_equal(jumped, parent):
                        break
                    parent = jumped
                left, right = parent[left], parent[right]
                keep = left != right
                left, right = left[keep], right[keep]
        fixed = np.zeros(self._count, dtype=bool)
        reasons: dict[int, str] = {}
        for labels, reason in self.fixed:
            roots = np.unique(parent[labels])
            fixed[roots] = True
            for root in roots.tolist():
                reasons.setdefault(root, reason)
        coupled = np.zeros(self._count, dtype=bool)
        for labels in self._coupled:
            coupled[parent[labels]] = True
        return Classes(parent, fixed[parent], coupled[parent], reasons)
