"""Resolves classes of atoms to groups of channels, and reports the parts that stay dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from compressor.pruning.atoms import Labels
from compressor.pruning.counts import Affine
from compressor.pruning.facts import Facts


@dataclass(frozen=True)
class Group:
    """Channels that can be removed unit by unit; each unit is removed from all tensors that contain it.

    Args:
        name: The first module that produces these channels; unique.
        index: Index in `PruningSpace.groups`, in the order in which the network produces the channels.
        width: Units of the dense network. A unit is a channel, an attention head, or a group of a grouped
            convolution.
        unit: Channels per unit in the first module (1; the three projections of a head; a group's size).
        granularity: Widths are multiples of this, or dense.
        min_width: Smallest legal width.
        coupled: Whether the channels are part of a residual addition.
        members: All modules that produce these channels.
    """

    name: str
    index: int
    width: int
    unit: int
    granularity: int
    min_width: int
    coupled: bool
    members: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A part that stays dense, with the reason."""

    name: str
    reason: str


@dataclass
class Found:
    """A group before the user's settings; its classes are in the order of the first producer's channels."""

    name: str
    classes: Labels
    unit: int
    coupled: bool
    members: tuple[str, ...]
    makers: tuple[tuple[str, int], ...]


@dataclass
class Resolved:
    """Atoms resolved to groups and units.

    Args:
        group: Index of each atom's group, (atoms,); -1 if the atom is always kept.
        unit: Index of each atom's unit in its group, (atoms,).
    """

    groups: list[Found]
    skipped: list[Skipped]
    group: NDArray[np.int64]
    unit: NDArray[np.int64]
    collapsed: list[Labels] = field(default_factory=list)
    _known: dict[int, tuple[Labels, Affine]] = field(default_factory=dict)

    def affine(self, size: int | Labels) -> Affine:
        """Return the number of kept indices of an axis as a function of widths."""
        if not isinstance(size, np.ndarray):
            return Affine(int(size))
        known = self._known.get(id(size))
        if known is None:
            # A reference to the labels is kept, so that their id is not reused.
            known = self._known[id(size)] = (size, self._affine(size))
        return known[1]

    def _affine(self, size: Labels) -> Affine:
        groups = self.group[size]
        constant = int((groups < 0).sum())
        counts = np.bincount(groups[groups >= 0]) if constant < size.size else np.zeros(0, dtype=np.int64)
        terms = []
        for index in np.flatnonzero(counts).tolist():
            coefficient, rest = divmod(int(counts[index]), len(self.groups[index].classes))
            assert rest == 0, "channels of one group run through the same axes"
            terms.append((index, coefficient))
        return Affine(constant, tuple(terms))

    def leave_dense(self, index: int, reason: str) -> None:
        """Remove a group from the space, and report it with the reason."""
        found = self.groups.pop(index)
        self._known.clear()
        self.skipped.append(Skipped(found.name, reason))
        self.group[self.group == index] = -1
        self.group[self.group > index] -= 1


def resolve(facts: Facts) -> Resolved:
    """Group the classes of atoms by the axes that contain them.

    Two classes that occur equally often in every axis of every parameter, layer, cost and attribute are
    exchangeable: removing either changes all sizes equally. Exchangeable classes form a group, so that every channel
    count is an affine function of the widths.
    """
    solved = facts.atoms.solve()
    roots = solved.of
    axes: dict[int, Labels] = {}
    for labels in [axis for each in facts.params.values() for axis in each if axis is not None]:
        axes.setdefault(id(labels), labels)
    for layer in facts.layers:
        for size in (layer.in_channels, layer.out_channels, layer.reads, *layer.positions[1]):
            if isinstance(size, np.ndarray):
                axes.setdefault(id(size), size)
    for term in facts.terms:
        for size in term.sizes:
            axes.setdefault(id(size), size)
    for tie in facts.ties:
        axes.setdefault(id(tie.labels), tie.labels)
    random = np.random.default_rng(0)
    signature = np.zeros(roots.size, dtype=np.uint64)
    for labels in axes.values():
        weight = np.uint64(random.integers(1, 2**63))
        np.add.at(signature, roots[labels], weight)

    group = np.full(roots.size, -1, dtype=np.int64)
    unit = np.full(roots.size, -1, dtype=np.int64)
    result = Resolved([], [], group, unit)
    makers: dict[int, list[tuple[str, int]]] = {}
    by_signature: dict[tuple[int, ...], int] = {}
    skipped: dict[str, str] = {}
    order: list[tuple[Labels, str, bool]] = []
    for (param, axis), module in facts.outputs.items():
        producers = facts.params[param][axis] if param in facts.params else None
        if producers is None:
            skipped.setdefault(module, "it makes a single channel")
            continue
        classes, first = np.unique(roots[producers], return_index=True)
        classes = classes[np.argsort(first)]
        still = classes[solved.fixed[classes]]
        if still.size:
            skipped.setdefault(module, solved.reasons[int(still[0])])
        classes = classes[~solved.fixed[classes]]
        for value in dict.fromkeys(signature[classes].tolist()):
            members = classes[signature[classes] == value]
            key = (value,)
            index = by_signature.get(key)
            if index is None:
                index = len(order)
                by_signature[key] = index
                order.append((members, module, bool(solved.coupled[members[0]])))
                per_unit = int(np.isin(roots[producers], members).sum()) // len(members)
                result.groups.append(Found(module, members, per_unit, order[index][2], (), ()))
            makers.setdefault(index, []).append((param, axis))
    names: dict[str, int] = {}
    for index, found in enumerate(result.groups):
        found.makers = tuple(makers[index])
        found.members = tuple(dict.fromkeys(facts.outputs[maker] for maker in found.makers))
        names[found.name] = names.get(found.name, 0) + 1
        if names[found.name] > 1:
            found.name = f"{found.name}/{names[found.name]}"
        group[found.classes] = index
        unit[found.classes] = np.arange(found.classes.size)
    group[:] = group[roots]
    unit[:] = unit[roots]
    result.skipped = [Skipped(name, reason) for name, reason in skipped.items()]
    for index in reversed(range(len(result.groups))):
        found = result.groups[index]
        if found.classes.size == 1:
            result.collapsed.append(found.classes)
            reason = "it makes a single channel" if found.unit == 1 else "all of its channels hang together"
            result.leave_dense(index, reason)
    return result
