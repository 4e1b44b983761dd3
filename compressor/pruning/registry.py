"""Registry of rules: what an operation of the torch API means for channels.

A rule is a function that is registered by its operations' names:

    @register_rule("pixel_shuffle")
    def pixel_shuffle(tracer: Tracer, call: Call) -> None: ...

An operation without a rule keeps all channels that go in (`UNKNOWN`). Names are

- those of torch's functions and methods, without underscores around them: `add` for `torch.add`, `add_`, `__iadd__`;
- `namespace::name` for operators of another library (`torch.library`);
- `module.function` for functions elsewhere that go through torch's function protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

from compressor.core.errors import CompressorError
from compressor.pruning.facts import Call
from export.convert.trees import tensors_in

Rule = Callable[[Any, Call], None]
"""A rule: it is called with the `Tracer` and the call, after the call has run."""

AxesRule = Callable[[Any, Call, list[Any]], Iterable[Any] | None]
"""A rule for `maps_axes`."""

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

_OPERATORS = "torch._ops."
"""Module of operators that are called as `torch.ops.library.name`."""

_TORCHS_OWN = ("aten", "prims")
_TOOLKIT = f"{__name__.partition('.')[0]}."

_SILENT = frozenset(SILENT.split())
_RULES: dict[str, Rule] = {}
_known: dict[Any, tuple[str, Rule | None]] = {}


def register_rule(*operations: str | Callable[..., Any]) -> Callable[[_Registered], _Registered]:
    """Register a function as the rule of operations; a decorator.

    A rule that is defined again in its own module (in a notebook, by a reload) replaces its earlier version.

    Args:
        operations: Names, several separated by spaces, or the functions themselves.

    Raises:
        CompressorError: An operation has another rule already, or an argument is no operation.
    """
    names = [name for each in operations for name in _names(each)]

    def register(function: _Registered) -> _Registered:
        for name in names:
            if (other := _RULES.get(name)) is not None and _place(other) != _place(function):
                raise CompressorError(
                    f"The operation {name!r} of the rule {_place(function)} has the rule {_place(other)}.",
                    "One operation has one rule: remove one of the two.",
                )
        _RULES.update(dict.fromkeys(names, function))
        _known.clear()
        return function

    return register


def maps_axes(*operations: str) -> Callable[[AxesRule], AxesRule]:
    """Register a rule of operations whose results have the channels of the first argument, in other places.

    The decorated function is called with the tracer, the call and the list of the first argument's labels, which it may
    change. It returns the labels of each result, or None to leave the results without channels.
    """

    def register(function: AxesRule) -> AxesRule:
        @wraps(function)
        def rule(tracer: Any, call: Call) -> None:
            source = call.args[0]
            axes = function(tracer, call, list(tracer.axes(source)))
            if axes is not None:
                for result in tensors_in(call.out):
                    tracer.mark(result, axes, tracer.active(source))

        register_rule(*operations)(rule)
        return function

    return register


def rule_of(func: Any) -> tuple[str, Rule | None]:
    """Return the name of an operation and its rule; None for calls that have nothing to do with channels."""
    found = _known.get(func)
    if found is None:
        name = _name_of(func)
        found = (name, None if name in _SILENT else _RULES.get(name, _RULES[UNKNOWN]))
        _known[func] = found
    return found


def is_own(rule: Rule) -> bool:
    """Whether a rule is one of the toolkit's."""
    return rule.__module__.startswith(_TOOLKIT)


def modules_of_rules() -> list[str]:
    """Return the modules, other than the toolkit's, whose rules are registered; other processes import them too."""
    return sorted({rule.__module__ for rule in _RULES.values() if not is_own(rule)})


def _place(rule: Rule) -> str:
    return f"{rule.__module__}:{rule.__qualname__}"


def _names(operation: str | Callable[..., Any]) -> list[str]:
    if isinstance(operation, str):
        return operation.split()
    if not hasattr(operation, "__name__"):
        raise CompressorError(
            f"{operation!r} has no name by which a call of it is known.",
            "Give the name of an operator of torch.library as 'namespace::name', or the function that is called.",
        )
    return [_name_of(operation)]


def _name_of(func: Any) -> str:
    """Return the name of a function that torch's function protocol passes on."""
    module, name = str(getattr(func, "__module__", "")), str(getattr(func, "__name__", ""))
    if module.startswith(_OPERATORS) and (library := module.removeprefix(_OPERATORS)) not in _TORCHS_OWN:
        return f"{library}::{name.partition('.')[0]}"
    if isinstance(func, FunctionType) and module.partition(".")[0] != "torch":
        return f"{module}.{func.__qualname__}"
    return _plain_name(func)


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
