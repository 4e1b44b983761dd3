"""What takes the place of the modules of a removed block, so that nothing of it is left in the network.

A block that is a module with one tensor in and out becomes `nn.Identity`, or the activation that follows its addition.
A branch of several modules, such as the attention of a transformer block, is called by code that adds its result:
each of them then returns an `Absent` value, and adding that returns the other operand, without any operation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compressor.core.errors import CompressorError

IDENTITY = "identity"
ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
"""Activations that may remain of a block, with default arguments."""

REPEATABLE = ("relu", "relu6")
"""Activations that change nothing when they are applied again."""

_NOTHING = re.compile(r"nothing(?::([1-9]))?")


class Absent:
    """The value of a removed branch: adding it returns the other operand itself."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class Nothing(nn.Module):
    """Takes the place of a module of a removed branch, whatever its arguments are.

    Args:
        outputs: Number of results in the tuple that the module returned; 0 for a single one.
    """

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return as many absent values."""
        return tuple(Absent() for _ in range(self.outputs)) if self.outputs else Absent()

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}" if self.outputs else ""


def inside(name: str, paths: Mapping[str, str] | Sequence[str]) -> bool:
    """Whether a name is one of these paths, or lies below one."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def nothing(outputs: int) -> str:
    """Return the word for `Nothing` with so many outputs."""
    return f"nothing:{outputs}" if outputs else "nothing"


def place(word: str) -> nn.Module:
    """Return the module that a word stands for: "identity", an activation, "nothing" or "nothing:2".

    Raises:
        CompressorError: It stands for none.
    """
    if word == IDENTITY:
        return nn.Identity()
    if word in ACTIVATIONS:
        return ACTIVATIONS[word]()
    if (match := _NOTHING.fullmatch(word)) is None:
        raise CompressorError(f"Nothing is known to take the place of a module as {word[:60]!r}.", "Save it again.")
    return Nothing(int(match[1] or 0))


def remove(model: nn.Module, replaced: Mapping[str, str]) -> None:
    """Put other modules in the places of a block's modules.

    Args:
        replaced: Path of a module -> what takes its place, as for `place`.

    Raises:
        CompressorError: The network has no such module, or nothing is known to take its place.
    """
    for path, word in replaced.items():
        parent, _, leaf = path.rpartition(".")
        holder = _module(model, parent)
        old = None if holder is None else holder._modules.get(leaf)
        if holder is None or old is None:
            raise CompressorError(f"The network has no module '{path[:200]}' to remove.", "Was its code changed?")
        new = place(word)
        new.training = old.training
        holder._modules[leaf] = new


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
