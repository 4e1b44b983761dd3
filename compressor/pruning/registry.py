"""Registry of rules: each defines what an operation of the torch API means for channels.

A rule is a function that is registered by its operations' names:

    @rule("pixel_shuffle")
    def pixel_shuffle(tracer: Tracer, call: Call) -> None: ...

For an operation without a rule all input channels are kept (`UNKNOWN`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from compressor.pruning.facts import Call

Rule = Callable[[Any, Call], None]
"""A rule: it is called with the `Tracer` and the call, after the call has run."""

_Registered = TypeVar("_Registered", bound=Rule)

UNKNOWN = "*"
"""Name of the rule for operations without a rule of their own."""

SILENT = """
    size dim numel ndimension stride storage_offset is_contiguous is_floating_point is_complex is_nested get_device
    element_size nelement data_ptr is_tensor is_grad_enabled _assert __bool__ item tolist __int__ __float__ __index__
    __len__ __repr__ __format__ __hash__ __contains__ get:shape get:dtype get:device get:is_nested get:requires_grad
    get:ndim get:layout get:is_cuda get:grad get:grad_fn get:is_meta get:is_sparse get:is_quantized get:is_leaf
    get:names get:_is_view get:itemsize get:nbytes get:is_cpu get:_version is_same_size broadcast_shapes
    get_default_dtype is_inference has_names is_autocast_enabled promote_types can_cast result_type finfo iinfo numpy
    untyped_storage is_shared
"""
"""Calls that return no tensor, or a tensor without channels."""

_SILENT = frozenset(SILENT.split())
_RULES: dict[str, Rule] = {}
_known: dict[Any, tuple[str, Rule | None]] = {}


def rule(*names: str) -> Callable[[_Registered], _Registered]:
    """Register a function as the rule of operations.

    Args:
        names: Names of torch functions and methods, without surrounding underscores, separated by spaces. An existing
            rule is replaced.
    """

    def register(function: _Registered) -> _Registered:
        _RULES.update({name: function for each in names for name in each.split()})
        _known.clear()
        return function

    return register


def rule_of(func: Any) -> tuple[str, Rule | None]:
    """Return the plain name of a torch function or method, and its rule; None if it does not concern channels."""
    found = _known.get(func)
    if found is None:
        name = _plain_name(func)
        found = (name, None if name in _SILENT else _RULES.get(name, _RULES[UNKNOWN]))
        _known[func] = found
    return found


def _plain_name(func: Any) -> str:
    name = str(getattr(func, "__name__", type(func).__name__))
    if name in ("__get__", "__set__"):
        return f"get:{getattr(func.__self__, '__name__', '')}" if name == "__get__" else "__set__"
    if name in _SILENT or name in _RULES:
        return name
    bare = name.strip("_")
    if name.startswith("__") and bare not in _RULES and bare.startswith(("i", "r")) and bare[1:] in _RULES:
        return bare[1:]
    # An overload of a registered operator is called "name.overload".
    return bare.partition(".")[0]


def works_in_place(func: Any) -> bool:
    """Whether a tensor method works in place: `add_`, `__iadd__`."""
    name = str(getattr(func, "__name__", ""))
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")
