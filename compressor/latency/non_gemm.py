"""Counts the non-GEMM operators of a network that run as kernels of their own, and their memory traffic.

TensorRT fuses normalisation, ReLU and a residual addition into the preceding convolution; these cost nothing. Other
steps are separate kernels: poolings, gates of squeeze-and-excitation, activations such as hard-swish, normalisations
before a convolution, concatenations, shuffles. Each is assigned to the latest weight-bearing operator that it depends
on, so that its cost shrinks with the channels of that operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

_WEIGHTED = frozenset({"convolution", "addmm", "mm", "_convolution"})
_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"})
_FOLDED = frozenset(
    {"relu", "relu_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "clamp", "clamp_"}
)
"""Activations that are fused into the preceding kernel."""

_POINTWISE = frozenset(
    {
        *_FOLDED, "add", "add_", "sub", "mul", "mul_", "div", "div_", "sigmoid", "sigmoid_", "silu", "silu_", "gelu",
        "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "tanh", "tanh_", "elu", "elu_", "mish",
    }
)  # fmt: skip
"""Steps that fuse with one another."""

_FREE = frozenset({"t", "detach", "alias", "dropout", "empty", "zeros", "lift_fresh", "clone_no_copy"})


def count_non_gemm(run: Callable[[], Any], operators: int) -> tuple[Floats, Floats]:
    """Run a network once and count its non-GEMM kernels.

    Args:
        run: Runs the network in eval mode.
        operators: Number of weight-bearing operators.

    Returns:
        Non-GEMM kernels, and elements moved by them, assigned to each operator, both (operators,). Zeros where the run
        has another number of products (such as products of activations in attention), so that the order is ambiguous.
    """
    with torch.no_grad(), _OperationRecorder() as watch:
        run()
    if len(watch.kernels) != operators:
        return np.zeros(operators), np.zeros(operators)
    return np.asarray(watch.kernels), np.asarray(watch.moved)


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[float] = []
        self.moved: list[float] = []
        self._made_by: dict[int, tuple[int, str]] = {}  # storage -> (owner, kind of the kernel that wrote it)
        self._alive: list[Any] = []  # keeps tensors alive: a reused address would identify two tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs, outputs = list(_tensors(args)), list(_tensors(result))
        if outputs:
            self._record(name, inputs, outputs)
        return result

    def _record(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        known = [self._made_by[key] for each in inputs if (key := _key(each)) in self._made_by]
        owner = max((place for place, _ in known), default=max(len(self.kernels) - 1, 0))
        kinds = {kind for _, kind in known}
        if name in _WEIGHTED:
            self.kernels.append(0.0)
            self.moved.append(0.0)
            self._note(outputs, len(self.kernels) - 1, "weighted")
            return
        same = {_key(each) for each in inputs} & {_key(each) for each in outputs}
        view = bool(same) and not name.endswith("_") and name != "contiguous"
        if view or name in _FREE or not known:
            return
        if (name in _NORMS or name in _FOLDED) and kinds & {"weighted", "pointwise"}:
            kind = "weighted" if "weighted" in kinds else "pointwise"
        elif name in ("add", "add_") and "weighted" in kinds:
            kind = "weighted"
        elif name in _POINTWISE and "pointwise" in kinds:
            kind = "pointwise"
            self.moved[owner] += float(max(each.numel() for each in inputs))
        else:
            kind = "pointwise" if name in _POINTWISE or name in _NORMS else "other"
            self.kernels[owner] += 1.0
            self.moved[owner] += float(sum(each.numel() for each in inputs) + outputs[0].numel())
        self._note(outputs, owner, kind)

    def _note(self, outputs: list[Tensor], owner: int, kind: str) -> None:
        for each in outputs:
            self._alive.append(each)
            self._made_by[_key(each)] = (owner, kind)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> Iterable[Any]:
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
