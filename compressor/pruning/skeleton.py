"""Fast copies of a module tree, with tensors replaced by the caller; they take microseconds per module."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SHARED = frozenset(
    [
        *(int, float, str, bool, bytes, complex, range, type, type(None)),
        *(types.FunctionType, types.BuiltinFunctionType),
        *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size),
    ]
)
"""Types of attributes that a copy shares: their values cannot change."""

_HOOKS = """
    _backward_pre_hooks _backward_hooks _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called
    _forward_pre_hooks _forward_pre_hooks_with_kwargs _state_dict_hooks _state_dict_pre_hooks
    _load_state_dict_pre_hooks _load_state_dict_post_hooks
"""
_HOOK_NAMES = tuple(_HOOKS.split())
_HANDLED = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *_HOOK_NAMES})


def copy_structure(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """Create a new module tree with the classes and attributes of `model`.

    Sharing inside the tree (a module used twice, tied weights) is preserved. Hooks of the user are not copied, since
    they refer to the old network; hooks of torch.nn.utils (weight and spectral normalisation) are copied.

    Args:
        model: The network; it is only read.
        tensor: Called once for each distinct parameter, buffer and plain tensor attribute; returns its replacement.
            Parameters become parameters with the same `requires_grad`, without gradients.
    """
    memo: dict[int, Any] = {}
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in memo:
            continue
        kind = module.__class__
        new = memo[id(module)] = kind.__new__(kind)
        # Copy the whole dictionary first, which is fast; values that must not be shared are replaced below.
        held, own = module.__dict__, new.__dict__
        own.update(held)
        pairs.append((held, own))
        stack.extend(child for child in held["_modules"].values() if child is not None)
        for value in held["_parameters"].values():
            if value is not None and id(value) not in memo:
                memo[id(value)] = _parameter(value, tensor)
        for value in held["_buffers"].values():
            if value is not None and id(value) not in memo:
                memo[id(value)] = tensor(value)
    for held, own in pairs:
        for name in ("_parameters", "_buffers", "_modules"):
            own[name] = {key: None if item is None else memo[id(item)] for key, item in held[name].items()}
        own["_non_persistent_buffers_set"] = set(held["_non_persistent_buffers_set"])
        for name in _HOOK_NAMES:
            own[name] = OrderedDict()
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            for key, hook in held[name].items():
                if type(hook).__module__.startswith("torch.nn.utils"):
                    own[name][key] = copy.deepcopy(hook, memo)
        for name, value in held.items():
            if type(value) not in _SHARED and name not in _HANDLED:
                # Tensors that a network stores from its last run have the dense width.
                stale = "cache" in name and type(value) is dict
                own[name] = {} if stale else _attribute(value, memo, tensor)
    result = memo[id(model)]
    assert isinstance(result, nn.Module)
    return result


def _parameter(value: nn.Parameter, tensor: Callable[[Tensor], Tensor]) -> nn.Parameter:
    made = tensor(value)
    return made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=value.requires_grad)


def _attribute(value: Any, memo: dict[int, Any], tensor: Callable[[Tensor], Tensor]) -> Any:
    """Copy an attribute that is neither a plain value nor a parameter, buffer or submodule."""
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = _parameter(value, tensor) if isinstance(value, nn.Parameter) else tensor(value)
        return memo[id(value)]
    if type(value) in (tuple, list) and all(type(item) in _SHARED for item in value):
        return value if type(value) is tuple else value.copy()
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError):
        # Locks, open files and tensors with a gradient history cannot be copied and are shared.
        return value


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return `named_modules()` as a list; several times faster on deep trees."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        prefix = f"{path}." if path else ""
        children = module.__dict__["_modules"]
        stack += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all distinct parameters, then all distinct buffers (also non-persistent), by their first name."""
    found: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in walk(model):
        prefix = f"{path}." if path else ""
        for register, into in (("_parameters", found), ("_buffers", buffers)):
            for name, value in module.__dict__[register].items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    into[prefix + name] = value
    found.update(buffers)
    return found


def aliases(model: nn.Module) -> dict[str, str]:
    """Return further names of tied parameters and shared buffers -> first name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for listed in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, value in listed:
            known = first.setdefault(id(value), name)
            if known != name:
                found[name] = known
    return found
