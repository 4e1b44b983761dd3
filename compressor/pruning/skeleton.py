"""Copies of a module tree that cost microseconds a module and let the caller decide what each tensor becomes."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SHARED = (
    int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.memory_format, type,
    types.FunctionType, types.BuiltinFunctionType, torch.Size, range,
)
_HOOKS = (
    "_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)


def copy_structure(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A new module tree with the classes and attributes of `model`.

    Args:
        model: Is only read.
        tensor: Called once for each distinct parameter, buffer and plain tensor attribute; returns what stands for it.
            Parameters become parameters again, with the same `requires_grad`, without gradients.

    Sharing inside the tree (a module used twice, tied weights) is kept. Hooks of the user stay behind, since they close over
    the old network; hooks that torch.nn.utils installs (weight and spectral normalisation) come along.
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = module.__class__.__new__(module.__class__)

    def of(value: Tensor) -> Tensor:
        made = memo.get(id(value))
        if made is None:
            made = tensor(value)
            if isinstance(value, nn.Parameter) and not isinstance(made, nn.Parameter):
                made = nn.Parameter(made, requires_grad=value.requires_grad)
            memo[id(value)] = made
        assert isinstance(made, Tensor)
        return made

    for module in modules:
        held = module.__dict__
        for name in ("_parameters", "_buffers"):
            for value in held[name].values():
                if value is not None:
                    of(value)
    for module in modules:
        held = module.__dict__
        new: dict[str, Any] = {}
        for name, value in held.items():
            if isinstance(value, _SHARED):
                new[name] = value
            elif name in ("_parameters", "_buffers"):
                new[name] = {key: None if item is None else memo[id(item)] for key, item in value.items()}
            elif name == "_modules":
                new[name] = {key: None if item is None else memo[id(item)] for key, item in value.items()}
            elif name in _HOOKS:
                kept = ((key, hook) for key, hook in value.items() if _from_torch(hook))
                new[name] = OrderedDict((key, copy.deepcopy(hook, memo)) for key, hook in kept) if value else OrderedDict()
            elif name == "_non_persistent_buffers_set":
                new[name] = set(value)
            elif isinstance(value, Tensor):
                new[name] = of(value)
            elif isinstance(value, tuple) and all(isinstance(item, _SHARED) for item in value):
                new[name] = value
            elif isinstance(value, list) and all(isinstance(item, _SHARED) for item in value):
                new[name] = value.copy()
            else:
                new[name] = copy.deepcopy(value, memo)
        memo[id(module)].__dict__.update(new)
    result = memo[id(model)]
    assert isinstance(result, nn.Module)
    return result


def _from_torch(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct parameter and buffer by its first name, non-persistent buffers included."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    found.update(model.named_buffers())
    return found


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters and shared buffers -> the first name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        known = first.setdefault(id(value), name)
        if known != name:
            found[name] = known
    return found
