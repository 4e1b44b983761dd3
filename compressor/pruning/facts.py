"""What one forward pass tells about a network: its calls, layers, counts and attributes, in terms of atoms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compressor.pruning.atoms import Atoms, Axes, Labels
from compressor.pruning.traffic import Traffic

#: Which call of an operation: the module that made it (numbers in its path left out, and its class) and the
#: call's place in that module's forward pass. Blocks that differ in their number only share a key, so that a
#: decision for one holds for all.
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
        """The path without its numbers, and the class."""
        return f"{re.sub(r'[0-9]+', '*', self.path)}:{self.kind}"


@dataclass
class Call:
    """One call of the torch API, as a rule sees it."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    key: Key

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """The argument at `place`, or by `name`, or `default`."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, lists included."""
        return list(tensors_in([*self.args, *self.kwargs.values()]))


@dataclass
class Step:
    """What the lockstep check compares: a call and the axes of its results."""

    name: str
    key: Key
    path: str
    outs: list[tuple[tuple[int, ...], Axes]]
    labelled: list[Labels]


class Counted(NamedTuple):
    """What fvcore counts for one call of an operation without a layer: `constant` times the sizes of axes."""

    operation: str
    constant: int
    sizes: list[Labels]
    #: Rounded as fvcore rounds its count of an einsum.
    rounded: bool = False


@dataclass
class LayerCall:
    """One call of an operation that bears weights; channel axes as labels or constant sizes.

    `reads` are the input channels that one output reads (an axis of the weight), `positions` a constant and the axes
    whose product says how often each weight is used; `counted` is False where fvcore does not see the operation.
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
    """An attribute of a module that holds a channel count: `attribute` (at `place` of a tuple or list) is
    len(labels)."""

    path: str
    attribute: str
    place: int | None
    labels: Labels
    #: The attribute counts blocks of this many labels.
    block: int = 1


@dataclass
class Facts:
    """Everything a trace says about a network; labels are resolved by the caller."""

    atoms: Atoms
    params: dict[str, Axes] = field(default_factory=dict)
    outputs: dict[tuple[str, int], str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    #: What is counted beside the layers.
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
    """What earlier traces of the same network have taught."""

    decisions: dict[Key, str] = field(default_factory=dict)
    frozen: dict[Key, str] = field(default_factory=dict)
    #: Reshapes whose channels must be as many as those that enter the module.
    locks: set[Key] = field(default_factory=set)
    #: How often a step failed.
    failures: dict[Key, int] = field(default_factory=dict)

    def copy(self) -> Settings:
        """Settings that can be changed without changing these."""
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
    """Every tensor in nested lists, tuples and dictionaries."""
    return list(tensors_in([value]))


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, (list, tuple)):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
