"""Estimated latency by a roofline model of each operator, for devices without measurements.

An operator's time is the longer of two: its arithmetic at the share of peak throughput that its kind reaches, and its
memory traffic at the reached share of peak bandwidth (Williams, Waterman and Patterson, "Roofline", 2009). A launch
overhead that does not depend on the width is added. Small operators are therefore bound by launches, and halving a
network's arithmetic does not halve its latency. The constants are fitted to published latencies
(benchmarks/latency_estimated_tables.py). The results are estimates and are labelled as such everywhere.

Non-GEMM steps that run as kernels of their own count as launches and traffic of a weight-bearing operator. TensorRT
fuses normalisation, ReLU and a residual addition into the preceding convolution; these cost nothing. Other steps are
separate kernels: poolings, gates of squeeze-and-excitation, activations such as hard-swish, normalisations before a
convolution, concatenations, shuffles. Each is assigned to the latest weight-bearing operator that it depends on, so
that its cost shrinks with the channels of that operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.core.errors import CompressorError
from compressor.latency.operators import Floats, Operators, padded
from compressor.latency.schema import RooflineFields

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.pruning.space import PruningSpace

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
KINDS = ("spatial", "pointwise", "depthwise", "linear")
"""Kinds of operators that reach different shares of the peak."""

SOFTNESS = 4.0
"""Exponent of the smooth maximum of arithmetic time and memory time."""

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


class EstimatedOperators(Operators):
    """Operators with the non-GEMM kernels around them, whose time a roofline estimates.

    Args:
        layers: As in `Operators`.
        kernels: Number of non-GEMM kernels of each operator, from `count_non_gemm`.
        beside: Elements that these move, divided by the operator's output channels.

    Attributes:
        kind: Index of each operator in `KINDS`.
        launches: Kernel launches of each operator, with those of its non-GEMM kernels.
    """

    def __init__(self, layers: Sequence[Any], kernels: Floats, beside: Floats) -> None:
        super().__init__(layers)
        self.kind = np.asarray([_kind(*each) for each in zip(self.kinds, self.taps, strict=True)], dtype=np.int64)
        self.launches = 1.0 + kernels
        self._beside = beside

    @classmethod
    def of_space(cls, space: PruningSpace) -> EstimatedOperators:
        """Return a space's operators; the network runs once."""
        model, dense = space.model, np.asarray(space.dense_widths)[None]
        was_training = model.training
        model.eval()
        try:
            kernels, moved = count_non_gemm(lambda: model(*space.example_input), len(space.layers))
        finally:
            model.train(was_training)
        outputs = np.asarray([float(layer.out_channels(dense)[0]) for layer in space.layers])
        return cls(space.layers, kernels, moved / outputs)

    def work(self, c_in: Floats, c_out: Floats, block: int) -> tuple[Floats, Floats]:
        """Return computed multiply-adds (channels padded to `block`) and elements moved, both (N, operators)."""
        # kernels of grouped convolutions do not pad to blocks
        computed = (np.where(self.ungrouped, padded(count, block), count) for count in (c_in, c_out))
        return self.cost(*computed).macs, self.cost(c_in, c_out, self._beside).moved

    def milliseconds(self, fields: RooflineFields, precision: str, c_in: Floats, c_out: Floats) -> Floats:
        """Return the time of each operator, (N, operators); never decreasing in any channel count."""
        macs, moved = self.work(c_in, c_out, fields.block)
        efficiency = np.asarray([fields.efficiency[name] for name in KINDS])
        compute = 2e3 * macs / (fields.tflops * 1e12 * efficiency[self.kind])
        reached = fields.bandwidth_gbs * 1e9 * fields.bandwidth_efficiency
        memory = 1e3 * moved * ELEMENT_BYTES[precision] / reached
        return np.asarray(
            (compute**SOFTNESS + memory**SOFTNESS) ** (1 / SOFTNESS)
            + fields.launch_ms * self.launches * (np.asarray(c_out) > 0)
        )


def _kind(kind: str, taps: float) -> int:
    if kind in ("linear", "depthwise"):
        return KINDS.index(kind)
    if kind in ("conv", "grouped", "conv_transpose"):
        return KINDS.index("pointwise" if taps == 1 else "spatial")
    raise CompressorError(
        f"No estimate is known for operators of the kind {kind!r}.",
        "Use --device local, or a budget in --flops or --params.",
    )


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
