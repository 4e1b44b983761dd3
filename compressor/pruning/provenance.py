"""Whole numbers that remember the attribute they came from.

Code such as `x.reshape(b, n, self.num_heads, self.head_dim)` bakes channel counts into attributes. On the
network that is traced every whole-number attribute is an `Attribute`, so that a call that receives it knows
which attribute must follow the pruned width. Products and quotients remember their origin too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: Attributes that never count channels, left as plain numbers.
_PLAIN = frozenset({"training", "call_super_init", "dump_patches", "T_destination"})


class Attribute(int):
    """A whole number read from an attribute of a module.

    Args:
        value: The number.
        origins: (path of the module, attribute, place in it or None, value of the attribute).
        derived: Whether arithmetic was done on it.
    """

    origins: tuple[tuple[str, str, int | None, int], ...]
    derived: bool

    def __new__(
        cls, value: int, origins: tuple[tuple[str, str, int | None, int], ...], derived: bool = False
    ) -> Attribute:
        made = super().__new__(cls, value)
        made.origins = origins
        made.derived = derived
        return made

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
    """Turn the whole-number attributes of a module (lists and tuples of them included) into `Attribute`s."""
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
