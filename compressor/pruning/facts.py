"""What one traced forward pass says about a network: atoms and their constraints, calls, layers, counts, attributes.

An *atom* is one index of one axis of a parameter. An axis of a tensor has *labels*, one atom per index, or None where
its size is constant (batch, space, tokens). Operations state which atoms must be kept or removed together (`unify`) and
which must always be kept (`fix`). After the pass, `solve` returns the classes of atoms that belong together: the
smallest removable units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from export.convert.trees import tensors_in

Labels = NDArray[np.int64]
Axes = tuple["Labels | None", ...]
Key = tuple[str, int]
"""Identifies a call of an operation: the calling module (its path without numbers, and its class) and the call's index
in that module's forward pass. Blocks that differ only in their number share a key: a decision for one applies to all.
"""

MEETS_FIXED = "it meets an axis of fixed size"


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


@dataclass
class Frame:
    """A module whose forward pass is running."""

    path: str
    module: nn.Module | None
    calls: int = 0
    inputs: tuple[Any, ...] = ()

    @property
    def kind(self) -> str:
        return type(self.module).__name__ if self.module is not None else ""

    @property
    def pattern(self) -> str:
        """The module's path without numbers, and its class."""
        return f"{re.sub(r'[0-9]+', '*', self.path)}:{self.kind}"


@dataclass
class Call:
    """One call of the torch API, as passed to a rule."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    key: Key

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Return the argument at `index`, or by `name`, or `default`."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def axis(self, index: int, name: str = "dim", default: Any = None) -> int:
        """Return an argument that is an axis of the first argument, counted from the front."""
        return positive(int(self.arg(index, name, default)), self.args[0].dim())

    def ints(self, first: int) -> list[int]:
        """Return the integers among the arguments from index `first` on, with tuples and lists flattened."""
        found: list[int] = []
        for value in [*self.args[first:], *self.kwargs.values()]:
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments, including those in lists."""
        return tensors_in([*self.args, *self.kwargs.values()])


@dataclass
class Step:
    """A call and the axes of its results, for the lockstep check."""

    name: str
    key: Key
    path: str
    outs: list[tuple[tuple[int, ...], Axes]]
    labelled: list[Labels]


class Counted(NamedTuple):
    """Multiply-adds that fvcore counts for one call outside of layers: `constant` times the sizes of axes."""

    operation: str
    constant: int
    sizes: list[Labels]
    #: Rounded as fvcore rounds its count of an einsum.
    rounded: bool = False


@dataclass(frozen=True)
class LayerShape:
    """A call of a weight-bearing operation, without its channel counts.

    Attributes:
        kind: "conv", "depthwise", "grouped", "conv_transpose" or "linear".
        groups: Groups of the dense convolution; 1 for a linear layer.
        in_hw, out_hw: (height, width); (tokens, 1) for a sequence, (1, 1) without spatial axes.
        images: Images of this size that a convolution computes for one input of the network, such as frames that it
            folds into the batch; 1 for a linear layer, whose height has them.
    """

    name: str
    kind: str
    module_class: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_hw: tuple[int, int]
    out_hw: tuple[int, int]
    images: int


@dataclass(frozen=True)
class LayerCall(LayerShape):
    """A layer as traced: each channel count is a constant or the labels of an axis.

    Attributes:
        reads: Input channels that one output reads (an axis of the weight).
        positions: A constant and the axes whose product is the number of uses of each weight.
        counted: Whether fvcore counts the operation.
    """

    in_channels: int | Labels
    out_channels: int | Labels
    reads: int | Labels
    positions: tuple[int, list[Labels]]
    counted: bool


@dataclass(frozen=True)
class Event:
    """One call of the forward pass in terms of values; a tensor that is changed in place has another value afterwards.

    Attributes:
        path: The running module.
        reads, writes: Values that depend on the network's input, or on other results.
        parameters: Parameters and buffers that it reads.
        step: Index in `Facts.steps`; -1 for a call that returns nothing.
        layers, terms: What it added to `Facts.layers` and `Facts.terms`.
        traffic: Index in `Traffic.steps`; -1 if there is none.
        plain: Whether all further arguments are at their defaults (or say "in place").
        in_place: Whether it changes one of its arguments.
    """

    name: str
    path: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    parameters: tuple[str, ...]
    step: int
    layers: range
    terms: range
    traffic: int
    plain: bool
    in_place: bool


@dataclass
class Visit:
    """One run of a module's forward, in the order in which they begin.

    Attributes:
        reads, writes: Values among its positional arguments, and among its results.
        start, end: Its events are those from `start` to before `end`.
        last: Index after the last visit that began within it.
        outputs: Number of results if it returns a tuple; 0 for a tensor, -1 for anything else.
        single: Whether one tensor is its only argument.
    """

    path: str
    reads: tuple[int, ...]
    start: int
    single: bool
    writes: tuple[int, ...] = ()
    end: int = -1
    last: int = -1
    outputs: int = -1


@dataclass
class Flow:
    """How values run through a forward pass.

    Attributes:
        shapes: Shape of each value.
        active: Values that depend on the network's input.
        results: Values that the network returns.
    """

    events: list[Event] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    active: set[int] = field(default_factory=set)
    results: tuple[int, ...] = ()


@dataclass
class Tie:
    """A module attribute that is a channel count: `attribute` (at `index` of a tuple or list) is len(labels)."""

    path: str
    attribute: str
    index: int | None
    labels: Labels
    #: The attribute counts blocks of this many labels.
    block: int = 1


@dataclass
class Traffic:
    """The activations that a forward pass writes and reads in each step.

    Attributes:
        sizes: Axes of each buffer, as constants or labels.
        steps: Buffers read, buffers written, and whether the step is elementwise.
    """

    sizes: list[list[int | Labels]] = field(default_factory=list)
    steps: list[tuple[list[int], list[int], bool]] = field(default_factory=list)


@dataclass
class Facts:
    """All data of a trace, in terms of labels; `groups.resolve` turns labels into functions of widths.

    Attributes:
        params: Name of each parameter and buffer that the pass used -> its labels.
        outputs: (name, axis) of each tensor that produces channels -> its module, in the order of the pass.
        terms: Multiply-adds outside of layers.
        swaps: Path of each attention module that may lose heads -> name of the class that replaces it.
        decisions: Each call that split channels -> how they are pruned, and their labels.
        numbered: Axes that are split or cut by numbers of channels, or may be dropped at one channel.
        classes: Channels of the network's first output, or those among which it chooses: the classes of a classifier.
    """

    atoms: Atoms
    params: dict[str, Axes] = field(default_factory=dict)
    outputs: dict[tuple[str, int], str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    terms: list[Counted] = field(default_factory=list)
    layers: list[LayerCall] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    swaps: dict[str, str] = field(default_factory=dict)
    decisions: dict[Key, tuple[str, list[Labels]]] = field(default_factory=dict)
    numbered: list[Labels] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)
    flow: Flow = field(default_factory=Flow)
    classes: int = 1


@dataclass
class Settings:
    """Decisions and exceptions learned from earlier traces of the same network."""

    decisions: dict[Key, str] = field(default_factory=dict)
    frozen: dict[Key, str] = field(default_factory=dict)
    #: Reshapes whose channels are tied to those that enter the module.
    locks: set[Key] = field(default_factory=set)
    #: Number of failures of each step.
    failures: dict[Key, int] = field(default_factory=dict)

    def copy(self) -> Settings:
        """Return an independent copy."""
        return Settings(dict(self.decisions), dict(self.frozen), set(self.locks), dict(self.failures))


def positive(dim: int, rank: int) -> int:
    """Return the number of an axis, counted from the front."""
    return dim + rank if dim < 0 else dim
