"""Fix weights that a network computes from other tensors before each forward at their current values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def computed_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that `fix_weights` would fix, sorted."""
    found = {f"{path}.{name}" for path, module in model.named_modules() for name in _parametrized(module)}
    found |= {f"{path}.{_name(hook)}" for path, module in model.named_modules() for _, hook in _hooks(module)}
    return sorted(name.removeprefix(".") for name in found)


def fix_weights(model: nn.Module) -> list[str]:
    """Replace weights that are computed before each forward by plain parameters, in place.

    Covers both weight_norm and both spectral_norm of `torch.nn.utils`, every other parametrization, and the masks of
    `torch.nn.utils.prune`. In eval mode the network's output is unchanged; further training is without the
    parametrization. Classes of other instances do not change.

    Returns:
        Names of the fixed weights, sorted.
    """
    names = computed_weights(model)
    if not names:
        return names
    with evaluated(model), torch.no_grad():  # in training mode spectral norms update their vectors at each access
        for module in list(model.modules()):
            _fix_hooks(module)
            _fix_parametrized(module)
    return names


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Switch a network to eval mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _parametrized(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    return list(module.get_submodule("parametrizations")._modules)


def _hooks(module: nn.Module) -> list[tuple[int, Any]]:
    return [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _HOOKS)]


def _name(hook: Any) -> str:
    return str(hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name)


def _fix_hooks(module: nn.Module) -> None:
    for key, hook in _hooks(module):
        name = _name(hook)
        if isinstance(hook, WeightNorm):
            value = hook.compute_weight(module)
            parts = [f"{name}_g", f"{name}_v"]
        elif isinstance(hook, SpectralNorm):
            value = hook.compute_weight(module, do_power_iteration=False)
            parts = [f"{name}_orig", f"{name}_u", f"{name}_v"]
        else:
            value = hook.apply_mask(module)
            parts = [f"{name}_orig", f"{name}_mask"]
        trained = any(
            module._parameters[part].requires_grad  # type: ignore[union-attr]
            for part in parts
            if module._parameters.get(part) is not None
        )
        for part in parts:
            module._parameters.pop(part, None)
            module._buffers.pop(part, None)
        module.__dict__.pop(name, None)
        del module._forward_pre_hooks[key]
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for other, each in list(hooks.items()):
                if getattr(getattr(each, "hook", each), "fn", None) is hook:  # spectral norm's conversions
                    del hooks[other]
        _put(module, name, value, trained)


def _fix_parametrized(module: nn.Module) -> None:
    names = _parametrized(module)
    if not names:
        return
    values = {name: getattr(module, name) for name in names}
    trained = {
        name: any(p.requires_grad for p in module.get_submodule(f"parametrizations.{name}").parameters())
        for name in names
    }
    # `remove_parametrizations` would delete a property of the class, which copies of the module share.
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        _put(module, name, value, trained[name])


def _put(module: nn.Module, name: str, value: Tensor, trained: bool) -> None:
    """Register a parameter before the existing ones: a weight comes before its bias."""
    others = dict(module._parameters)
    module._parameters.clear()
    module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=trained))
    module._parameters.update(others)
