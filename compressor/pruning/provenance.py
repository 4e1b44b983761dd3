"""Integers that record the attribute they were read from.

Code such as `x.reshape(b, n, self.num_heads, self.head_dim)` stores channel counts in attributes. In the traced
network every integer attribute is an `Attribute`, so that a call that receives it identifies the attribute that must
follow the pruned width. Products and quotients keep their origin.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: Attributes that are never channel counts; they stay plain numbers.
_PLAIN = frozenset({"training", "call_super_init", "dump_patches", "T_destination"})


class Attribute(int):
    """An integer read from an attribute of a module.

    Args:
        value: The number.
        origins: (path of the module, attribute, index in it or None, value of the attribute).
        derived: Whether it is the result of arithmetic.
    """

    origins: tuple[tuple[str, str, int | None, int], ...]
    derived: bool

    def __new__(
        cls, value: int, origins: tuple[tuple[str, str, int | None, int], ...], derived: bool = False
    ) -> Attribute:
        number = super().__new__(cls, value)
        number.origins = origins
        number.derived = derived
        return number

    def _with(self, value: Any, other: Any) -> Any:
        if type(value) is not int:
            return value
        more = other.origins if isinstance(other, Attribute) else ()
        return Attribute(value, self.origins + more, derived=True)

    def __mul__(self, other: Any) -> Any:
        return self._with(int.__mul__(self, other), other)

    def __rmul__(self, other: Any) -> Any:
        return self._with(int.__rmul__(self, other), other)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(int.__floordiv__(self, other), other)

    def __add__(self, other: Any) -> Any:
        return self._with(int.__add__(self, other), other)

    def __radd__(self, other: Any) -> Any:
        return self._with(int.__radd__(self, other), other)

    def __sub__(self, other: Any) -> Any:
        return self._with(int.__sub__(self, other), other)

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (int(self),))


def remember(path: str, module: nn.Module) -> None:
    """Convert the integer attributes of a module, and lists and tuples of integers, to `Attribute`s."""
    held = module.__dict__
    for name, value in list(held.items()):
        if name.startswith("_") or name in _PLAIN:
            continue
        if type(value) is int and value > 0:
            held[name] = Attribute(value, ((path, name, None, value),))
        elif type(value) in (list, tuple) and value and all(type(item) is int for item in value):
            held[name] = type(value)(
                Attribute(item, ((path, name, place, item),)) if item > 0 else item
                for place, item in enumerate(value)
            )
