"""Groups of channels that are removed together: found from the atoms of a trace, limited by the user's settings.

Two classes of atoms that occur equally often in every axis of every parameter, layer, cost and attribute are
exchangeable: removing either changes all sizes equally. Exchangeable classes form a group, so that every channel count
is an affine function of the widths.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compressor.core.errors import CompressorError
from compressor.pruning.counts import Affine, Ints
from compressor.pruning.facts import Facts, Labels

MIN_SHARE = 0.1
"""Default minimum width: a tenth of the dense width, at least one step of the granularity."""


SINGLE = "it makes a single channel"
UNREACHED = "the forward pass never reaches it"
NO_FILTERS = "no convolution or linear layer makes its channels"


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
    members: tuple[str, ...] = ()
    makers: tuple[tuple[str, int], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which a pattern finds it."""
        return (self.name, *self.members)


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
    """Group the classes of atoms that are exchangeable; a class that alone makes up an axis stays dense."""
    solved = facts.atoms.solve()
    roots = solved.of
    signature = _signatures(facts, roots)
    result = Resolved([], [], np.full(roots.size, -1, dtype=np.int64), np.full(roots.size, -1, dtype=np.int64))
    by_signature: dict[int, Found] = {}
    skipped: dict[str, str] = {}
    for (param, axis), module in facts.outputs.items():
        producers = facts.params[param][axis] if param in facts.params else None
        if producers is None:
            skipped.setdefault(module, SINGLE)
            continue
        classes, first = np.unique(roots[producers], return_index=True)
        classes = classes[np.argsort(first)]
        fixed = classes[solved.fixed[classes]]
        if fixed.size:
            skipped.setdefault(module, solved.reasons[int(fixed[0])])
        classes = classes[~solved.fixed[classes]]
        for value in dict.fromkeys(signature[classes].tolist()):
            members = classes[signature[classes] == value]
            if value not in by_signature:
                unit = int(np.isin(roots[producers], members).sum()) // len(members)
                by_signature[value] = Found(module, members, unit, bool(solved.coupled[members[0]]))
            by_signature[value].makers += ((param, axis),)
    names: dict[str, int] = {}
    for index, found in enumerate(by_signature.values()):
        result.groups.append(found)
        found.members = tuple(dict.fromkeys(facts.outputs[maker] for maker in found.makers))
        names[found.name] = names.get(found.name, 0) + 1
        if names[found.name] > 1:
            found.name = f"{found.name}/{names[found.name]}"
        result.group[found.classes] = index
        result.unit[found.classes] = np.arange(found.classes.size)
    result.group, result.unit = result.group[roots], result.unit[roots]
    result.skipped = [Skipped(name, reason) for name, reason in skipped.items()]
    for index in reversed(range(len(result.groups))):
        found = result.groups[index]
        if found.classes.size == 1:
            result.collapsed.append(found.classes)
            result.leave_dense(index, SINGLE if found.unit == 1 else "all of its channels are tied together")
    return result


def _signatures(facts: Facts, roots: Labels) -> NDArray[np.uint64]:
    """Return a checksum of how often each class occurs in every axis, (atoms,); equal for exchangeable classes."""
    axes: list[int | Labels | None] = [axis for each in facts.params.values() for axis in each]
    for layer in facts.layers:
        axes += [layer.in_channels, layer.out_channels, layer.reads, *layer.positions[1]]
    axes += [size for term in facts.terms for size in term.sizes]
    axes += [tie.labels for tie in facts.ties]
    random = np.random.default_rng(0)
    signature = np.zeros(roots.size, dtype=np.uint64)
    for labels in {id(axis): axis for axis in axes if isinstance(axis, np.ndarray)}.values():
        np.add.at(signature, roots[labels], np.uint64(random.integers(1, 2**63)))
    return signature


def name_others(model: nn.Module, facts: Facts, resolved: Resolved) -> None:
    """Report the modules whose parameters no pass used, and those whose weights no group prunes and nobody named."""
    named = {each.name for each in resolved.skipped} | set(facts.outputs.values())
    for name, value in model.named_parameters():
        path = name.rpartition(".")[0] or name
        if path in named:
            continue
        if name not in facts.params:
            named.add(path)
            resolved.skipped.append(Skipped(path, UNREACHED))
            continue
        labels = [axis for axis in facts.params[name] if axis is not None]
        if value.dim() > 1 and labels and not any((resolved.group[axis] >= 0).any() for axis in labels):
            solved = facts.atoms.solve()
            roots = np.unique(solved.of[np.concatenate(labels)]).tolist()
            reason = next((solved.reasons[root] for root in roots if root in solved.reasons), NO_FILTERS)
            named.add(path)
            resolved.skipped.append(Skipped(path, reason))


# ---------------------------------------------------------------- settings
def exclude(resolved: Resolved, frozen: str | Sequence[str], scope: str) -> None:
    """Leave the frozen groups dense, and with scope "inner" those of residual additions.

    Raises:
        CompressorError: A pattern matches nothing.
    """
    if isinstance(frozen, str):
        frozen = (frozen,)
    known = {name for found in resolved.groups for name in found.names} | {each.name for each in resolved.skipped}
    for pattern in frozen:
        if not fnmatch.filter(known, pattern):
            raise CompressorError(
                f"The pattern '{pattern}' of frozen groups matches nothing.", f"Names: {some(sorted(known), pattern)}."
            )
    for index in reversed(range(len(resolved.groups))):
        found = resolved.groups[index]
        if any(fnmatch.filter(found.names, pattern) for pattern in frozen):
            resolved.leave_dense(index, "frozen by the caller")
        elif scope == "inner" and found.coupled:
            resolved.leave_dense(index, "it runs through residual additions (scope 'inner')")


def make_groups(resolved: Resolved, granularity: Any, min_width: Any) -> tuple[Group, ...]:
    """Return the groups with the user's granularity and smallest widths.

    Raises:
        CompressorError: A setting has a wrong type or value, or a pattern matches no group.
    """
    names = [found.name for found in resolved.groups]
    groups = []
    for index, found in enumerate(resolved.groups):
        width = int(found.classes.size)
        step = _setting(granularity, found.name, 1, names, "granularity")
        if not _is_whole(step) or step < 1:
            raise CompressorError(
                f"The granularity must be a whole number of at least 1, not {step!r}.", "8 suits FP16, 32 INT8."
            )
        # Granularity counts channels; a unit of several channels needs fewer units to be a multiple.
        step = int(step) // math.gcd(int(step), found.unit)
        least = _setting(min_width, found.name, MIN_SHARE, names, "min_width")
        if not (_is_whole(least) or isinstance(least, float)) or not least >= 0:
            raise CompressorError(f"A smallest width must be channels or a share, not {least!r}.", "0.1 is a tenth.")
        if isinstance(least, float):
            if least > 1:
                raise CompressorError(
                    f"A smallest width of {least} is not a share of the dense width.", "Use an int for channels."
                )
            least = math.ceil(least * width - 1e-9)
        least = min(max(step, -(-int(least) // step) * step), width)
        groups.append(Group(found.name, index, width, found.unit, step, least, found.coupled, found.members))
    return tuple(groups)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _setting(value: Any, name: str, default: Any, names: Sequence[str], what: str) -> Any:
    """Return a group's value of a setting: the setting itself, or that of the first pattern that matches its name."""
    if not isinstance(value, Mapping):
        return value
    for pattern in value:
        if not fnmatch.filter(names, pattern):
            raise CompressorError(
                f"The pattern '{pattern}' of {what} matches no group.", f"Groups: {some(names, pattern)}."
            )
    return next((item for pattern, item in value.items() if fnmatch.fnmatchcase(name, pattern)), default)


# ---------------------------------------------------------------- widths
def legal_widths(group: Group) -> Ints:
    """Return the legal widths of a group, ascending; the last is dense."""
    # The smallest width is no multiple only if it is the dense one.
    multiples = range(group.min_width, group.width + 1, group.granularity)
    return np.unique(np.array([*multiples, group.width], dtype=np.int64))


def checked_widths(
    groups: Sequence[Group], choices: Sequence[Ints], given: Mapping[str, int] | Sequence[int] | Ints
) -> Ints:
    """Return validated widths (G,) from a mapping (omitted groups stay dense) or a sequence.

    Args:
        groups: Groups of the space.
        choices: Legal widths of each group.
        given: Requested widths.

    Raises:
        CompressorError: A group is unknown, the number of widths is wrong, or a width is not legal.
    """
    if isinstance(given, Mapping):
        values: list[Any] = [given.get(group.name, group.width) for group in groups]
        if sum(group.name in given for group in groups) < len(given):
            names = [group.name for group in groups]
            unknown = next(name for name in given if name not in names)
            raise CompressorError(f"There is no group '{unknown}'.", f"Groups: {some(names, str(unknown))}.")
    else:
        values = list(given)
        if len(values) != len(groups):
            raise CompressorError(
                f"{len(values)} widths for {len(groups)} groups.", "Pass one for each group, in their order."
            )
    for group, legal, value in zip(groups, choices, values, strict=True):
        _check(group, legal, value)
    return np.array(values, dtype=np.int64)


def _check(group: Group, legal: Ints, value: Any) -> None:
    if not _is_whole(value):
        raise CompressorError(
            f"The width of group '{group.name}' must be a whole number, not {value!r}.", "Use round()."
        )
    if value in legal:
        return
    legal_text = f"multiples of {group.granularity} from {group.min_width} on, or {group.width}"
    if value > group.width:
        what = f"is above the dense width {group.width}"
    elif value < group.min_width:
        what = f"is below the smallest width {group.min_width}"
    else:
        what = f"is not a multiple of the granularity {group.granularity}"
    raise CompressorError(f"Width {value} of group '{group.name}' {what}.", f"Legal widths: {legal_text}.")


def nearest_widths(choices: Sequence[Ints], wanted: Any) -> Ints:
    """Return the legal widths nearest to the real numbers `wanted`, (G,).

    Raises:
        CompressorError: Their number is wrong, or one is not finite.
    """
    real = np.asarray(wanted, dtype=np.float64)
    if real.shape != (len(choices),) or not np.isfinite(real).all():
        raise CompressorError(
            f"Widths to round must be {len(choices)} finite numbers, not shape {real.shape}.", "Pass one per group."
        )
    nearest = [legal[int(np.abs(legal - value).argmin())] for legal, value in zip(choices, real, strict=True)]
    return np.array(nearest, dtype=np.int64)


def some(names: Sequence[str], wanted: str) -> str:
    """List the names nearest to `wanted`, or the first ones."""
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3) or names[:5]
    return ", ".join(near) + (", ..." if len(names) > len(near) else "")
