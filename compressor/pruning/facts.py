"""Data of one traced forward pass: calls, layers, counts and attributes, in terms of atoms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compressor.pruning.atoms import Atoms, Axes, Labels
from compressor.pruning.traffic import Traffic

#: Identifies a call of an operation: the calling module (its path without numbers, and its class) and the call's index
#: in that module's forward pass. Blocks that differ only in their number share a key, so that a decision for one
#: applies to all.
Key = tuple[str, int]


MEETS_FIXED = "it meets an axis of fixed size"


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

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """Return the argument at `place`, or by `name`, or `default`."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments, including those in lists."""
        return list(tensors_in([*self.args, *self.kwargs.values()]))


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


@dataclass
class LayerCall:
    """One call of a weight-bearing operation; channel axes are labels or constant sizes.

    `reads` are the input channels that one output reads (an axis of the weight). `positions` is a constant and the axes
    whose product is the number of uses of each weight. `counted` is False if fvcore does not count the operation.
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
    in_channels: int | Labels
    out_channels: int | Labels
    reads: int | Labels
    positions: tuple[int, list[Labels]]
    counted: bool


@dataclass
class Tie:
    """A module attribute that is a channel count: `attribute` (at `place` of a tuple or list) is len(labels)."""

    path: str
    attribute: str
    place: int | None
    labels: Labels
    #: The attribute counts blocks of this many labels.
    block: int = 1


@dataclass
class Facts:
    """All data of a trace; labels are resolved by the caller."""

    atoms: Atoms
    params: dict[str, Axes] = field(default_factory=dict)
    outputs: dict[tuple[str, int], str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    #: Multiply-adds that are counted besides the layers.
    terms: list[Counted] = field(default_factory=list)
    layers: list[LayerCall] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    swaps: dict[str, str] = field(default_factory=dict)
    decisions: dict[Key, tuple[str, list[Labels]]] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    #: Channels of the network's first output: the classes of a classifier.
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


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def example_tensors(value: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples and dictionaries."""
    return list(tensors_in([value]))


def moved(value: Any, device: torch.device | str) -> Any:
    """Return `value` with all tensors in it moved to `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, (list, tuple)):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
