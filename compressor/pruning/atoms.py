"""Atoms: one for every index of every axis of every parameter, and what a forward pass says about them.

An axis of a tensor carries *labels*, one atom per index, or None where its size can never change (batch,
space, tokens). Operations say which atoms must be kept or dropped together (`unify`) and which must always
be kept (`fix`). When the pass is over, `solve` yields the classes of atoms that go together: the smallest
things that pruning can remove.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Axes = tuple["Labels | None", ...]


@dataclass(frozen=True)
class Classes:
    """What `Atoms.solve` found.

    Args:
        of: (atoms,) the class of each atom, named by its smallest atom.
        fixed: (atoms,) whether the class of each atom must stay.
        coupled: (atoms,) whether the class of each atom runs through a residual addition.
        reasons: smallest atom of a fixed class -> why it must stay (the first reason given).
    """

    of: Labels
    fixed: NDArray[np.bool_]
    coupled: NDArray[np.bool_]
    reasons: dict[int, str]


class Atoms:
    """Hands out atoms and collects what is said about them."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs: list[tuple[Labels, Labels]] = []
        #: (atoms that must stay, why), in the order in which it was found out.
        self.fixed: list[tuple[Labels, str]] = []
        self._coupled: list[Labels] = []

    def fresh(self, size: int) -> Labels:
        """Labels for a new axis of `size` indices."""
        labels = np.arange(self._count, self._count + size, dtype=np.int64)
        self._count += size
        return labels

    def unify(self, a: Labels, b: Labels) -> None:
        """Atoms at the same place of `a` and `b` go together; both have the same shape."""
        if a is not b:
            self._pairs.append((a.reshape(-1), b.reshape(-1)))

    def fix(self, labels: Labels | None, reason: str) -> None:
        """These atoms must stay, because of `reason` (a clause that follows "left dense:")."""
        if labels is not None:
            self.fixed.append((labels.reshape(-1), reason))

    def couple(self, labels: Labels) -> None:
        """These atoms run through an addition of two activations."""
        self._coupled.append(labels.reshape(-1))

    def solve(self) -> Classes:
        """The classes of atoms that go together (connected components by hooking and pointer jumping)."""
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
