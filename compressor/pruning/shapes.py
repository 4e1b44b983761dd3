"""Shapes of results on the meta device that follow from the shapes of the inputs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SAME_SHAPE = """
    hardtanh relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid leaky_relu elu mish softplus dropout dropout2d
    dropout3d
"""
_UNARY = frozenset(_SAME_SHAPE.split())


def shape_only(name: str, inplace: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a result of the right shape on the meta device (in place: the input itself), or None to run the call.

    torch computes shapes on the meta device by Python decompositions, which take a millisecond for a batch-norm; the
    first one of a process imports torch's compiler, which takes a second or two. Where the shape of the result is
    plain, an empty tensor of that shape is sufficient.
    """
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not first.is_meta or not first.is_floating_point():
        return None
    if name in _UNARY:
        return (
            first
            if inplace or kwargs.get("inplace", False) or any(value is True for value in args[1:])
            else _like(first)
        )
    if name in ("add", "sub", "mul") and len(args) == 2 and not kwargs:
        return _joined(first, args[1], inplace)
    if name == "mean" and len(args) == 2 and not kwargs.keys() - {"keepdim"}:
        return _reduced(first, args[1], bool(kwargs.get("keepdim", False)))
    if name == "linear" and len(args) > 1:
        return _linear(first, args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
    if name == "conv2d" and len(args) == 7 and not kwargs:
        return _conv2d(*args)
    if name == "batch_norm" and first.dim() > 1:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        vectors = [value for value in (*args[1:5], *kwargs.values()) if isinstance(value, Tensor)]
        if not training and vectors and all(value.shape == first.shape[1:2] for value in vectors):
            return _like(first)
    return None


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor like `x`; torch's own function imports sympy, which takes half a second."""
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


def _reduced(a: Tensor, dims: Any, keepdim: bool) -> Tensor | None:
    """Return the result of a mean over distinct axes, else None."""
    given = dims if isinstance(dims, (tuple, list)) else (dims,)
    if not all(type(dim) is int and -a.dim() <= dim < a.dim() for dim in given):
        return None
    over = {dim % a.dim() for dim in given}
    if not over or len(over) < len(given):
        return None
    sizes = [1 if dim in over else size for dim, size in enumerate(a.shape) if keepdim or dim not in over]
    return a.new_empty(sizes)


def _linear(x: Tensor, weight: Any, bias: Any) -> Tensor | None:
    """Return the result of a linear layer if its parameters fit its input, else None."""
    parameters = [weight] if bias is None else [weight, bias]
    if not all(isinstance(each, Tensor) and each.is_meta and each.dtype == x.dtype for each in parameters):
        return None
    if x.dim() < 2 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _conv2d(
    x: Tensor, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor | None:
    """Return the result of a convolution of contiguous tensors if its parameters fit its input, else None."""
    parameters = [weight] if bias is None else [weight, bias]
    if not all(isinstance(each, Tensor) and each.is_meta and each.dtype == x.dtype for each in parameters):
        return None
    if x.dim() != 4 or weight.dim() != 4 or not (x.is_contiguous() and weight.is_contiguous()):
        return None
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    pairs = [(each, each) if type(each) is int else each for each in (stride, padding, dilation)]
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return None
    sizes = [
        (size + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, gap in zip(x.shape[2:], weight.shape[2:], *pairs, strict=True)
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else None


def _joined(a: Tensor, b: Any, inplace: bool) -> Tensor | None:
    """Return the result of a sum or product if one operand has the result's shape, else None."""
    if not isinstance(b, Tensor) or not b.is_meta or a.dtype != b.dtype or a.dim() != b.dim():
        return None
    if all(y in (1, x) for x, y in zip(a.shape, b.shape, strict=True)):
        return a if inplace else _like(a)
    if not inplace and all(x in (1, y) for x, y in zip(a.shape, b.shape, strict=True)):
        return _like(b)
    return None
