"""ONNX operators as torch modules and functions, for `onnx_network`.

A reader of an operator returns a module, where the operator has weights, or a function of its inputs that are computed
from the network's input. Sizes are taken from the tensors at run time, not from the file, so that a network whose
channels were removed still runs: of the reshapes, only factors that do not depend on the channels stay constant.

    @reads("LeakyRelu")
    def leaky_relu(node: Node) -> Work: ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Work = nn.Module | Callable[..., Any]
"""What computes an operator's outputs from its active inputs, in order."""

READERS: dict[str, Callable[[Node], Work]] = {}


class Unreadable(Exception):
    """An operator is used in a way that is not read; the text says in which."""


@dataclass
class Node:
    """One operator of a file.

    Attributes:
        op: Its type.
        opset: Version of the ONNX operators.
        given: Its attributes.
        inputs: Names of its inputs; empty where an optional one is left out.
        outputs: Number of its outputs.
        constants: Values of the inputs that do not depend on the network's input, by name.
        shapes: Shapes of tensors for the file's batch, by name.
        active: Names of the inputs that depend on the network's input.
    """

    op: str
    opset: int
    given: Mapping[str, Any]
    inputs: Sequence[str]
    outputs: int
    constants: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    active: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        self.active = [name for name in self.inputs if name and name not in self.constants]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.given.get(name, default)

    def constant(self, place: int) -> Tensor | None:
        """Return the value of an input; None if it is left out, or depends on the network's input."""
        name = self.inputs[place] if place < len(self.inputs) else ""
        return self.constants.get(name)

    def weight(self, place: int) -> Tensor:
        """Return the value of an input that must be constant."""
        found = self.constant(place)
        if found is None:
            raise Unreadable(f"input {place} is computed")
        return found

    def numbers(self, name: str, place: int) -> list[int] | None:
        """Return whole numbers that are an attribute in older opsets and an input in newer ones."""
        if name in self.given:
            return [int(value) for value in self.given[name]]
        if place >= len(self.inputs) or not self.inputs[place]:
            return None
        return [int(value) for value in self.weight(place).reshape(-1).tolist()]

    def scalar(self, name: str, place: int, default: float) -> float:
        """Return a number that is an attribute in older opsets and an input in newer ones."""
        if name in self.given:
            return float(self.given[name])
        return default if place >= len(self.inputs) or not self.inputs[place] else float(self.weight(place))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first active input, for the file's batch."""
        return self.shapes[self.active[0]]


def reads(*operators: str) -> Callable[[Callable[[Node], Work]], Callable[[Node], Work]]:
    """Register a function as the reader of operators; a decorator."""

    def register(function: Callable[[Node], Work]) -> Callable[[Node], Work]:
        READERS.update(dict.fromkeys(operators, function))
        return function

    return register


# ---------------------------------------------------------------- layers with weights
_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _filled(layer: nn.Module, **values: Tensor | None) -> nn.Module:
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                getattr(layer, name).copy_(value)
    return layer


def _pads(node: Node, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the padding before and after each axis."""
    rank, mode = len(kernel), node.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = node.get("pads", [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    strides, dilations = (node.get(name, [1] * rank) for name in ("strides", "dilations"))
    whole = [
        max(0, (math.ceil(size / stride) - 1) * stride + dilation * (width - 1) + 1 - size)
        for size, stride, dilation, width in zip(node.shape[2:], strides, dilations, kernel, strict=True)
    ]
    less = [each // 2 for each in whole]
    more = [each - half for each, half in zip(whole, less, strict=True)]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def _padded(layer: nn.Module, before: Sequence[int], after: Sequence[int]) -> nn.Module:
    """Return a layer behind zeros of other numbers before and after its input."""
    sides = [each for pair in zip(reversed(before), reversed(after), strict=True) for each in pair]
    kind: Any = nn.ConstantPad2d if len(sides) == 4 else nn.ConstantPad1d
    return nn.Sequential(kind(sides, 0.0), layer)


@reads("Conv")
def conv(node: Node) -> Work:
    weight, bias = node.weight(1), node.constant(2)
    kernel, groups = tuple(weight.shape[2:]), int(node.get("group", 1))
    before, after = _pads(node, kernel)
    rank, even = len(kernel), before == after
    if rank not in _CONVS or (rank == 3 and not even):
        raise Unreadable(f"it has {rank} axes")
    layer = _CONVS[rank](
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,
        stride=tuple(node.get("strides", [1] * rank)),
        padding=tuple(before) if even else 0,
        dilation=tuple(node.get("dilations", [1] * rank)),
        groups=groups,
        bias=bias is not None,
    )
    filled = _filled(layer, weight=weight, bias=bias)
    return filled if even else _padded(filled, before, after)


@reads("ConvTranspose")
def conv_transpose(node: Node) -> Work:
    weight, bias = node.weight(1), node.constant(2)
    kernel, groups = tuple(weight.shape[2:]), int(node.get("group", 1))
    before, after = _pads(node, kernel)
    rank = len(kernel)
    usual = node.get("auto_pad", "NOTSET") == "NOTSET" and not node.get("output_shape")
    if rank not in _TRANSPOSED or before != after or not usual:
        raise Unreadable("its padding differs before and after")
    layer = _TRANSPOSED[rank](
        weight.shape[0],
        weight.shape[1] * groups,
        kernel,
        stride=tuple(node.get("strides", [1] * rank)),
        padding=tuple(before),
        output_padding=tuple(node.get("output_padding", [0] * rank)),
        groups=groups,
        bias=bias is not None,
        dilation=tuple(node.get("dilations", [1] * rank)),
    )
    return _filled(layer, weight=weight, bias=bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a linear layer from its weight (out, in) and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(layer, weight=weight, bias=None if bias is None else bias.reshape(-1))


@reads("Gemm")
def gemm(node: Node) -> Work:
    weight, bias = node.weight(1), node.constant(2)
    if node.get("transA", 0) or node.get("alpha", 1.0) != 1.0 or len(node.active) > 1:
        raise Unreadable("it is no linear layer")
    weight = weight if node.get("transB", 0) else weight.t()
    if bias is not None and (node.get("beta", 1.0) != 1.0 or bias.numel() not in (1, len(weight))):
        raise Unreadable("its bias is not one number for each output")
    return linear_of(weight, None if bias is None else bias.reshape(-1).expand(len(weight)))


@reads("MatMul")
def matmul(node: Node) -> Work:
    if len(node.active) == 2:
        return torch.matmul
    weight = node.constant(1)
    if weight is None or weight.dim() != 2:
        raise Unreadable("its constant is not the second of two factors, with two axes")
    return linear_of(weight.t(), None)


@reads("BatchNormalization")
def batch_norm(node: Node) -> Work:
    scale, bias, mean, variance = (node.weight(place) for place in range(1, 5))
    kind = _NORMS.get(len(node.shape))
    if kind is None or node.get("training_mode", 0):
        raise Unreadable("it is in training mode, or has an unusual number of axes")
    layer = kind(scale.numel(), eps=float(node.get("epsilon", 1e-5)))
    return _filled(layer, weight=scale, bias=bias, running_mean=mean, running_var=variance)


@reads("LayerNormalization")
def layer_norm(node: Node) -> Work:
    weight, bias = node.weight(1), node.constant(2)
    axis = int(node.get("axis", -1)) % len(node.shape)
    if node.outputs > 1 or tuple(weight.shape) != node.shape[axis:]:
        raise Unreadable("it has several outputs, or a scale of another shape than its axes")
    layer = nn.LayerNorm(tuple(weight.shape), eps=float(node.get("epsilon", 1e-5)), bias=bias is not None)
    return _filled(layer, weight=weight, bias=bias)


@reads("PRelu")
def prelu(node: Node) -> Work:
    slope = node.weight(1)
    if slope.numel() != 1 and tuple(slope.shape) != (slope.numel(), *[1] * (len(node.shape) - 2)):
        raise Unreadable("its slopes are not one for each channel")
    return _filled(nn.PReLU(slope.numel()), weight=slope.reshape(-1))


# ---------------------------------------------------------------- sums and products
_BINARY: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow, "Min": torch.minimum,
    "Max": torch.maximum, "Sum": torch.add,
}  # fmt: skip


class WithConstant(nn.Module):
    """An operation of the input and a constant tensor, which is a parameter: a scale, a shift, a position.

    Args:
        op: Its ONNX operator.
        value: The constant.
        first: Whether the constant is the first argument.
    """

    def __init__(self, op: str, value: Tensor, first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.clone())
        self.op, self.first = op, first

    def forward(self, x: Tensor) -> Tensor:
        function = _BINARY[self.op]
        return function(self.weight, x) if self.first else function(x, self.weight)


@reads(*_BINARY)
def binary(node: Node) -> Work:
    if len(node.inputs) != 2:
        raise Unreadable(f"it has {len(node.inputs)} inputs")
    function = _BINARY[node.op]
    if len(node.active) == 2:
        return function
    first = node.inputs[0] in node.constants
    value = node.weight(0 if first else 1)
    if not value.is_floating_point():
        value = value.to(torch.float32)
    if value.numel() > 1:
        return WithConstant(node.op, value, first)
    number = float(value)
    if node.op in ("Min", "Max"):
        return partial(torch.clamp, **{"max" if node.op == "Min" else "min": number})
    if first and node.op in ("Sub", "Div", "Pow"):
        return partial(_REVERSED[node.op], number)
    return partial(_with_number, node.op, number)


def _with_number(op: str, number: float, x: Tensor) -> Tensor:
    return _BINARY[op](x, number)


def _minus(number: float, x: Tensor) -> Tensor:
    return number - x


def _over(number: float, x: Tensor) -> Tensor:
    return number / x


def _power(number: float, x: Tensor) -> Tensor:
    return torch.pow(number, x)


_REVERSED: dict[str, Callable[[float, Tensor], Tensor]] = {"Sub": _minus, "Div": _over, "Pow": _power}


# ---------------------------------------------------------------- functions of single values
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Log": torch.log,
    "Sqrt": torch.sqrt, "Neg": torch.neg, "Abs": torch.abs, "Reciprocal": torch.reciprocal, "Softplus": F.softplus,
    "Erf": torch.erf, "HardSwish": F.hardswish, "Mish": F.mish, "Softsign": F.softsign, "Selu": F.selu,
}  # fmt: skip


@reads(*_UNARY)
def unary(node: Node) -> Work:
    return _UNARY[node.op]


@reads("LeakyRelu", "Elu", "Gelu")
def activation(node: Node) -> Work:
    if node.op == "LeakyRelu":
        return partial(F.leaky_relu, negative_slope=float(node.get("alpha", 0.01)))
    if node.op == "Elu":
        return partial(F.elu, alpha=float(node.get("alpha", 1.0)))
    return partial(F.gelu, approximate=str(node.get("approximate", "none")))


@reads("HardSigmoid")
def hard_sigmoid(node: Node) -> Work:
    slope, shift = float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))
    if abs(slope - 1 / 6) < 1e-6 and shift == 0.5:
        return F.hardsigmoid
    return partial(_line_in_bounds, slope, shift)


def _line_in_bounds(slope: float, shift: float, x: Tensor) -> Tensor:
    return torch.clamp(slope * x + shift, 0.0, 1.0)


@reads("Clip")
def clip(node: Node) -> Work:
    least, most = node.scalar("min", 1, -math.inf), node.scalar("max", 2, math.inf)
    if (least, most) == (0.0, 6.0):
        return F.relu6
    limits = {name: value for name, value in (("min", least), ("max", most)) if math.isfinite(value)}
    return partial(torch.clamp, **limits)


@reads("Softmax", "LogSoftmax")
def softmax(node: Node) -> Work:
    rank = len(node.shape)
    axis = int(node.get("axis", 1 if node.opset < 13 else -1)) % rank
    if node.opset < 13 and axis != rank - 1:
        raise Unreadable("before opset 13 it joins all axes from its own on")
    return partial(F.softmax if node.op == "Softmax" else F.log_softmax, dim=axis)


# ---------------------------------------------------------------- pooling and means
@reads("MaxPool", "AveragePool")
def pool(node: Node) -> Work:
    kernel = list(node.get("kernel_shape"))
    before, after = _pads(node, kernel)
    rank, ceil = len(kernel), bool(node.get("ceil_mode", 0))
    strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    if rank != 2 or node.outputs > 1:
        raise Unreadable("it has another number of axes than two, or returns places")
    same = before == after and all(2 * pad <= width for pad, width in zip(before, kernel, strict=True))
    if node.op == "MaxPool":
        if not same:
            sides = [each for pair in zip(reversed(before), reversed(after), strict=True) for each in pair]
            kind: Any = nn.ConstantPad2d
            padded = kind(sides, -math.inf)
            return nn.Sequential(padded, nn.MaxPool2d(tuple(kernel), strides, 0, dilations, ceil_mode=ceil))
        sizes = {"kernel_size": kernel, "stride": strides, "padding": before, "dilation": dilations}
        return partial(F.max_pool2d, **sizes, ceil_mode=ceil)
    counted = bool(node.get("count_include_pad", 0))
    if dilations != [1] * rank or not same:
        raise Unreadable("it is dilated, or its padding differs before and after")
    return partial(
        F.avg_pool2d, kernel_size=kernel, stride=strides, padding=before, ceil_mode=ceil, count_include_pad=counted
    )


@reads("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node) -> Work:
    if len(node.shape) != 4:
        raise Unreadable("it has another number of axes than two")
    return partial(F.adaptive_avg_pool2d if node.op == "GlobalAveragePool" else F.adaptive_max_pool2d, output_size=1)


@reads("ReduceMean", "ReduceSum", "ReduceMax")
def reduced(node: Node) -> Work:
    rank, keep = len(node.shape), bool(node.get("keepdims", 1))
    axes = node.numbers("axes", 1)
    if axes is None:
        if node.get("noop_with_empty_axes", 0):
            return _same
        axes = list(range(rank))
    axes = [axis % rank for axis in axes]
    functions: dict[str, Any] = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax}
    function = functions[node.op]
    return partial(function, dim=axes, keepdim=keep)


# ---------------------------------------------------------------- shapes
def _same(x: Tensor) -> Tensor:
    return x


@reads("Identity", "Dropout", "Cast")
def same(node: Node) -> Work:
    if node.op == "Cast" and int(node.get("to", 1)) != 1:
        raise Unreadable("it converts to another type than FP32")
    return _same


@reads("Flatten")
def flatten(node: Node) -> Work:
    axis = int(node.get("axis", 1)) % (len(node.shape) + 1)
    if axis != 1:
        raise Unreadable("it joins the batch with other axes")
    return partial(torch.flatten, start_dim=1)


Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Axes of the input, and sizes of the output's axes for which they stand; -1 for the one that follows from the rest."""


def blocks(before: Sequence[int], after: Sequence[int]) -> list[Block]:
    """Divide a reshape into the smallest parts that keep their number of elements.

    Where an axis becomes several, the last of them follows from its size, and the others stay as they are.

    >>> blocks((1, 116, 28, 28), (1, 2, 58, 28, 28))
    [((0,), (-1,)), ((1,), (2, -1)), ((2,), (-1,)), ((3,), (-1,))]
    >>> blocks((1, 512, 1, 1), (1, 512))
    [((0,), (-1,)), ((1, 2, 3), (-1,))]
    """
    found: list[Block] = []
    i = j = 0
    while i < len(before) or j < len(after):
        axes, sizes = [i][: len(before) - i], list(after[j : j + 1])
        i, j = i + 1, j + 1
        while (left := math.prod(before[axis] for axis in axes)) != (right := math.prod(sizes)):
            if left < right:
                axes, i = [*axes, i], i + 1
            else:
                sizes, j = [*sizes, after[j]], j + 1
        while i < len(before) and before[i] == 1 and j >= len(after):
            axes, i = [*axes, i], i + 1
        while j < len(after) and after[j] == 1 and i >= len(before):
            sizes, j = [*sizes, 1], j + 1
        last = max((place for place, size in enumerate(sizes) if size > 1), default=0)
        found.append((tuple(axes), tuple(-1 if place == last else size for place, size in enumerate(sizes))))
    return found


def _reshaped(parts: Sequence[Block], x: Tensor) -> Tensor:
    sizes: list[int] = []
    for axes, wanted in parts:
        whole, fixed = math.prod(x.shape[axis] for axis in axes), math.prod(size for size in wanted if size > 0)
        sizes += [whole // fixed if size < 0 else size for size in wanted]
    return torch.reshape(x, sizes)


@reads("Reshape")
def reshape(node: Node) -> Work:
    before, wanted = node.shape, node.numbers("shape", 1)
    assert wanted is not None
    if node.get("allowzero", 0) and 0 in wanted:
        raise Unreadable("it makes an empty tensor")
    sizes = [before[place] if size == 0 else size for place, size in enumerate(wanted)]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size > 0)
        sizes[sizes.index(-1)] = math.prod(before) // known
    return partial(_reshaped, blocks(before, sizes))


@reads("Transpose")
def transpose(node: Node) -> Work:
    order = node.get("perm", list(range(len(node.shape)))[::-1])
    return partial(_permuted, tuple(order))


def _permuted(order: tuple[int, ...], x: Tensor) -> Tensor:
    return x.permute(order)


@reads("Squeeze", "Unsqueeze")
def squeezed(node: Node) -> Work:
    axes, rank = node.numbers("axes", 1), len(node.shape)
    if axes is None:
        raise Unreadable("it removes whichever axes have size 1")
    if node.op == "Squeeze":
        return partial(_squeezed, sorted((axis % rank for axis in axes), reverse=True))
    return partial(_unsqueezed, sorted(axis % (rank + len(axes)) for axis in axes))


def _squeezed(axes: Sequence[int], x: Tensor) -> Tensor:
    for axis in axes:
        x = x.squeeze(axis)
    return x


def _unsqueezed(axes: Sequence[int], x: Tensor) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


class Joined(nn.Module):
    """Tensors and constants side by side; constants are parameters, and the same for each input of a batch.

    Args:
        axis: Axis along which they lie.
        constants: The constants in their places; None for the tensors.
    """

    def __init__(self, axis: int, constants: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.axis, self.places = axis, [value is not None for value in constants]
        self.constants = nn.ParameterList(nn.Parameter(value.clone()) for value in constants if value is not None)

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        first = tensors[0]
        own = (value.expand(len(first), *[-1] * (first.dim() - 1)) for value in self.constants)
        return torch.cat([next(own) if here else next(given) for here in self.places], self.axis)


@reads("Concat")
def concat(node: Node) -> Work:
    axis = int(node.get("axis")) % len(node.shape)
    if len(node.active) == len(node.inputs):
        return partial(_joined, axis)
    if axis == 0:
        raise Unreadable("it adds constants to the batch")
    return Joined(axis, [node.constant(place) for place in range(len(node.inputs))])


def _joined(axis: int, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, axis)


class Parts(nn.Module):
    """Parts of a tensor, whose sizes follow the channels.

    Args:
        axis: Axis that is divided.
        sizes: Size of each part.
    """

    def __init__(self, axis: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.axis, self.sizes = axis, tuple(sizes)

    def forward(self, x: Tensor) -> Any:
        return torch.split(x, list(self.sizes), self.axis)


@reads("Split")
def split(node: Node) -> Work:
    axis, sizes = int(node.get("axis", 0)) % len(node.shape), node.numbers("split", 1)
    if sizes is None or len(set(sizes)) == 1:
        return partial(torch.chunk, chunks=node.outputs, dim=axis)
    return Parts(axis, sizes)


_MOST_PARTS = 4
"""A range of channels that is a half, a third or a quarter of them stays one."""


class ChannelRange(nn.Module):
    """Channels from one to another, which follow the channels that are left, and parts of the other axes.

    Args:
        start, stop: First channel and the one behind the last; None for the ends.
        others: Parts of the axes behind the channels.
    """

    def __init__(self, start: int | None, stop: int | None, others: Sequence[slice]) -> None:
        super().__init__()
        self.start, self.stop, self._others = start, stop, tuple(others)

    def forward(self, x: Tensor) -> Tensor:
        return x[(slice(None), slice(self.start, self.stop), *self._others)]


@reads("Slice")
def sliced(node: Node) -> Work:
    rank, starts, ends = len(node.shape), node.numbers("starts", 1), node.numbers("ends", 2)
    assert starts is not None
    assert ends is not None
    axes = node.numbers("axes", 3) or list(range(len(starts)))
    steps = node.numbers("steps", 4) or [1] * len(starts)
    if min(steps) < 1:
        raise Unreadable("it goes backwards")
    chosen = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = node.shape[axis % rank]
        chosen[axis % rank] = slice(start or None, None if end >= size else end, step)
    batch, channels, *others = chosen if rank > 1 else (*chosen, slice(None))
    if channels != slice(None, None, 1) and channels.step == 1 and batch in (slice(None), slice(None, None, 1)):
        start, stop, size = channels.start or 0, channels.stop or node.shape[1], node.shape[1]
        parts = size // max(1, stop - start)
        equal = parts <= _MOST_PARTS and parts * (stop - start) == size and start * parts % size == 0
        if equal and others == [slice(None)] * len(others):
            return partial(_part, parts, start * parts // size)
        return ChannelRange(channels.start, channels.stop, others)
    return partial(_chosen, tuple(chosen))


def _part(parts: int, which: int, x: Tensor) -> Tensor:
    return torch.chunk(x, parts, dim=1)[which]


def _chosen(places: tuple[slice, ...], x: Tensor) -> Tensor:
    return x[places]


@reads("Gather")
def gather(node: Node) -> Work:
    axis, index = int(node.get("axis", 0)) % len(node.shape), node.weight(1)
    if index.dim() > 1:
        raise Unreadable("its indices have several axes")
    if index.dim() == 0:
        return partial(torch.select, dim=axis, index=int(index))
    if index.numel() == 1:
        return partial(torch.narrow, dim=axis, start=int(index) % node.shape[axis], length=1)
    raise Unreadable("it takes several places")


class ChannelPad(nn.Module):
    """Constant channels around the others, whose numbers follow the channels that are left.

    Args:
        before, after: Numbers of channels.
        others: Padding of the axes behind the channels, the last axis first.
        value: The constant.
    """

    def __init__(self, before: int, after: int, others: Sequence[int], value: float) -> None:
        super().__init__()
        self.before, self.after, self.value, self._others = before, after, value, tuple(others)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (*self._others, self.before, self.after), value=self.value)


@reads("Pad")
def pad(node: Node) -> Work:
    pads, rank = node.numbers("pads", 1), len(node.shape)
    assert pads is not None
    axes = node.numbers("axes", 3) or list(range(rank))
    mode, value = str(node.get("mode", "constant")), node.scalar("value", 2, 0.0)
    if mode not in ("constant", "reflect", "edge"):
        raise Unreadable(f"its mode is {mode}")
    sides = [[0, 0] for _ in range(rank)]
    for place, axis in enumerate(axes):
        sides[axis % rank] = [pads[place], pads[place + len(axes)]]
    while mode != "constant" and len(sides) > rank - 2 and sides[0] == [0, 0]:
        sides = sides[1:]
    flat = [each for pair in reversed(sides) for each in pair]
    if mode == "constant" and rank > 2 and sides[0] == [0, 0] and min(sides[1]) >= 0 and max(sides[1]) > 0:
        return ChannelPad(sides[1][0], sides[1][1], flat[: 2 * (rank - 2)], value)
    if mode == "constant":
        return partial(F.pad, pad=flat, value=value)
    return partial(F.pad, pad=flat, mode="replicate" if mode == "edge" else mode)


@reads("Resize")
def resize(node: Node) -> Work:
    scales, sizes = node.constant(2 if len(node.inputs) > 2 else 1), node.constant(3)
    mode, way = str(node.get("mode", "nearest")), str(node.get("coordinate_transformation_mode", "half_pixel"))
    if node.get("antialias", 0) or len(node.shape) != 4:
        raise Unreadable("it smooths, or has another number of axes than two")
    if sizes is not None and sizes.numel():
        size = [int(value) for value in sizes.reshape(-1).tolist()][2:]
    elif scales is not None and scales.numel():
        size = [math.floor(each * float(scale)) for each, scale in zip(node.shape[2:], scales[2:], strict=True)]
    else:
        raise Unreadable("its size is computed")
    if mode == "nearest" and way == "asymmetric" and node.get("nearest_mode", "round_prefer_floor") == "floor":
        return partial(F.interpolate, size=size, mode="nearest")
    smooth = {"linear": "bilinear", "cubic": "bicubic"}.get(mode)
    if smooth and way in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        if mode == "cubic" and node.get("cubic_coeff_a", -0.75) != -0.75:
            raise Unreadable("its cubic coefficient is another than -0.75")
        return partial(F.interpolate, size=size, mode=smooth, align_corners=way == "align_corners")
    raise Unreadable(f"its mode is {mode} with {way}")


@reads("DepthToSpace")
def depth_to_space(node: Node) -> Work:
    if str(node.get("mode", "DCR")) != "CRD":
        raise Unreadable("its mode is DCR")
    return partial(F.pixel_shuffle, upscale_factor=int(node.get("blocksize")))
