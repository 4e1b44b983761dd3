"""Results of common operations on the meta device without running them.

torch computes shapes on the meta device by Python decompositions, which take a millisecond for a batch-norm. If the
result has the shape of the input, an empty tensor of that shape is sufficient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

UNARY = """
    hardtanh relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid leaky_relu elu mish softplus dropout dropout2d
    dropout3d
"""
_UNARY = frozenset(UNARY.split())
_BINARY = frozenset({"add", "sub", "mul"})


def shape_only(name: str, inplace: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a result of the right shape (the input itself for in-place calls); None if the call must run."""
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
        return _joined(first, args[1], inplace)
    if name == "batch_norm" and first.dim() > 1:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        vectors = [value for value in (*args[1:5], *kwargs.values()) if isinstance(value, Tensor)]
        if not training and vectors and all(value.shape == first.shape[1:2] for value in vectors):
            return torch.empty_like(first)
    return None


def _joined(a: Tensor, b: Any, inplace: bool) -> Tensor | None:
    """Return the result of a sum or product if one operand has the result's shape, else None."""
    if not isinstance(b, Tensor) or not b.is_meta or a.dtype != b.dtype or a.dim() != b.dim():
        return None
    if all(y in (1, x) for x, y in zip(a.shape, b.shape, strict=True)):
        return a if inplace else torch.empty_like(a)
    if not inplace and all(x in (1, y) for x, y in zip(a.shape, b.shape, strict=True)):
        return torch.empty_like(b)
    return None
