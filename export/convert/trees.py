"""Tensors in nested tuples, lists and dictionaries: inputs and outputs of networks, and batches of any structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def outputs_of(value: Any) -> list[Tensor]:
    """Return the floating-point tensors of a network's output, of any structure or class."""
    if not isinstance(value, (Tensor, list, tuple, Mapping)) and hasattr(value, "__dict__"):
        value = dict(vars(value))
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return `value` with each tensor in it replaced by what a function returns for it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        items = [mapped(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    return value


def rebuilt(value: Any, tensors: list[Any]) -> Any:
    """Return `value` with its tensors replaced by these, in the order of `tensors_in`."""
    left = iter(tensors)
    return mapped(lambda _: next(left), value)


def rows(value: Any, count: int, which: Any) -> Any:
    """Return `value` with some rows of the tensors that have `count` of them; other tensors belong to all rows.

    Args:
        value: Inputs of a network, for `count` inputs.
        count: Number of rows.
        which: A slice or indices.
    """
    return mapped(lambda each: each[which] if each.dim() and len(each) == count else each, value)


def moved(value: Any, device: torch.device | str) -> Any:
    """Return `value` with all tensors in it moved to `device`."""
    return mapped(lambda tensor: tensor.detach().to(device), value)


def channels_last(value: Any) -> Any:
    """Return `value` with batches of images in the memory format in which convolutions are fast."""
    return mapped(_fast, value)


def _fast(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def names_in(value: Any, first: str, *, plain: str = "input") -> list[str]:
    """Return a name for each tensor in `value`: its keys and places, or `plain` for a single tensor.

    >>> names_in(({"image": torch.zeros(1)}, torch.zeros(1)), "input")
    ['input_0_image', 'input_1']
    """
    found = [name for name, _ in _named(value, first)]
    return [plain] if len(found) == 1 else found


def _named(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    return [pair for key, item in items for pair in _named(item, f"{name}_{key}")]
