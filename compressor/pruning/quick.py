"""Results of the commonest operations on the meta device without running them.

torch computes shapes on the meta device by Python decompositions, which take a millisecond for a batch-norm.
For operations whose result has the shape of their input an empty tensor says as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_UNARY = frozenset(
    [
        "relu",
        "relu6",
        "gelu",
        "silu",
        "sigmoid",
        "tanh",
        "hardswish",
        "hardsigmoid",
        "leaky_relu",
        "elu",
        "mish",
        "softplus",
        "dropout",
        "dropout2d",
        "dropout3d",
    ]
)
_BINARY = frozenset(["add", "sub", "mul"])


def shape_only(name: str, inplace: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """A result of the right shape (the input itself where the call works in place), or None where it has to
    run."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not first.is_meta or not first.is_floating_point():
        return None
    if name in _UNARY:
        return (
            first
            if inplace or kwargs.get("inplace", False) or any(value is True for value in args[1:])
            else torch.empty_like(first)
        )
    if name in _BINARY and len(args) == 2 and not kwargs:
        second = args[1]
        if (
            isinstance(second, Tensor)
            and second.is_meta
            and second.shape == first.shape
            and second.dtype == first.dtype
        ):
            return first if inplace else torch.empty_like(first)
        return None
    if name == "batch_norm" and first.dim() > 1:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        vectors = [value for value in (*args[1:5], *kwargs.values()) if isinstance(value, Tensor)]
        if not training and vectors and all(value.shape == first.shape[1:2] for value in vectors):
            return torch.empty_like(first)
    return None
