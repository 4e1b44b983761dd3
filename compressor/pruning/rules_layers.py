"""Rules of convolutions and linear layers: their channels, their multiply-adds in fvcore, and the layer records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from compressor.pruning.facts import Call, Labels, LayerCall
from compressor.pruning.registry import register_rule
from compressor.pruning.rules_shape import even
from compressor.pruning.trace import Tracer, factored


def _pair(values: Sequence[int] | int | str, rank: int) -> tuple[int, ...]:
    if isinstance(values, str):
        return (0,) * rank
    items = (values,) * rank if isinstance(values, int) else tuple(values)
    return items * rank if len(items) == 1 < rank else items


def _hw(tensor: Tensor, channel: int, kind: str) -> tuple[int, int]:
    """Return height and width of a tensor; (tokens, 1) for a sequence, (1, 1) without spatial axes.

    Batch axes of a linear layer (such as the windows of an attention) belong to one input and multiply the height.
    """
    if tensor.dim() < 2:
        return (1, 1)
    batch, *space = [size for i, size in enumerate(tensor.shape) if i != channel]
    height, *rest = space or [1]
    return (height * (batch if kind == "linear" else 1), math.prod(rest))


def note_layer(
    tracer: Tracer,
    call: Call,
    kind: str,
    weight: Tensor,
    source: Tensor,
    channel: int,
    ins: Any,
    outs: Any,
    reads: Any,
    positions: Sequence[int | Labels],
    geometry: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (0, 0), (1, 1)),
    groups: int = 1,
    name: str = "",
    out: Tensor | None = None,
    counted: bool = True,
) -> None:
    """Record a layer: its channels, the inputs that one output `reads`, and the `positions` that use each weight."""
    frame = tracer.stack[-1]
    known = tracer.name_of(weight)
    path = frame.path or (known.rpartition(".")[0] if known else "")
    kernel, stride, padding, dilation = geometry
    if len(kernel) == 1:
        kernel, stride, padding, dilation = (*kernel, 1), (*stride, 1), (*padding, 0), (*dilation, 1)
    if tracer.uncounted:
        return
    tracer.facts.layers.append(
        LayerCall(
            f"{path}.{name}" if name and path else name or path,
            kind,
            frame.kind,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            _hw(source, channel % source.dim(), kind),
            _hw(call.out if out is None else out, channel % source.dim(), kind),
            ins,
            outs,
            reads,
            factored(1, positions),
            counted,
        )
    )


@register_rule("conv1d conv2d conv3d")
def convolution(tracer: Tracer, call: Call) -> None:
    """conv1d/2d/3d: weight (out, in / groups, *kernel)."""
    source, weight = call.arg(0, "input"), call.arg(1, "weight")
    rank = weight.dim() - 2
    groups = int(call.arg(6, "groups", 1))
    padding = call.arg(4, "padding", 0)
    ins, outs = _channels_through(tracer, call, source, weight, groups, out_axis=0, in_axis=1, rank=rank)
    batch = call.out.shape[0] if source.dim() == rank + 2 else 1
    geometry = (
        tuple(weight.shape[2:]),
        _pair(call.arg(3, "stride", 1), rank),
        _pair(padding, rank),
        _pair(call.arg(5, "dilation", 1), rank),
    )
    if isinstance(padding, str) and padding == "same":
        geometry = (
            geometry[0],
            geometry[1],
            tuple(d * (k - 1) // 2 for k, d in zip(geometry[0], geometry[3], strict=True)),
            geometry[3],
        )
    kind = "conv" if groups == 1 else "depthwise" if weight.shape[1] == 1 else "grouped"
    note_layer(
        tracer,
        call,
        kind,
        weight,
        source,
        -rank - 1,
        ins,
        outs,
        tracer.sizes(weight)[1],
        [batch, *tracer.sizes(call.out)[-rank:]],
        geometry,
        groups,
        # fvcore counts only aten::_convolution, and a padding given by name is traced as another operator.
        counted=not isinstance(padding, str),
    )


@register_rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def transposed_convolution(tracer: Tracer, call: Call) -> None:
    """conv_transpose1d/2d/3d: weight (in, out / groups, *kernel)."""
    source, weight = call.arg(0, "input"), call.arg(1, "weight")
    rank = weight.dim() - 2
    groups = int(call.arg(6, "groups", 1))
    ins, outs = _channels_through(tracer, call, source, weight, groups, out_axis=1, in_axis=0, rank=rank)
    batch = source.shape[0] if source.dim() == rank + 2 else 1
    geometry = (
        tuple(weight.shape[2:]),
        _pair(call.arg(3, "stride", 1), rank),
        _pair(call.arg(4, "padding", 0), rank),
        _pair(call.arg(7, "dilation", 1), rank),
    )
    note_layer(
        tracer,
        call,
        "conv_transpose",
        weight,
        source,
        -rank - 1,
        ins,
        outs,
        tracer.sizes(weight)[0] if groups == 1 else weight.shape[0] // groups,
        [batch, *tracer.sizes(source)[-rank:]],
        geometry,
        groups,
    )


def _channels_through(
    tracer: Tracer,
    call: Call,
    source: Tensor,
    weight: Tensor,
    groups: int,
    out_axis: int,
    in_axis: int,
    rank: int,
) -> tuple[Any, Any]:
    """Propagate labels through a convolution; returns (in, out) channels as labels or constants."""
    axes, filters = list(tracer.axes(source)), tracer.axes(weight)
    channel = source.dim() - rank - 1
    ins: Labels | None = axes[channel]
    new_axes: list[Labels | None] = []
    for before, after, axis in zip(
        source.shape[channel + 1 :], call.out.shape[channel + 1 :], axes[channel + 1 :], strict=True
    ):
        # A convolution along the channels (efficient channel attention) runs at any width if it preserves the width.
        if before != after:
            tracer.fix(axis, "its channels are convolved like space")
        new_axes.append(axis if before == after else None)
    if groups == 1:
        outs = filters[out_axis]
        if ins is None:
            tracer.fix(filters[in_axis], "it reads the network's input or a fixed axis")
        elif filters[in_axis] is not None:
            tracer.merge(ins, filters[in_axis])
    elif out_axis == 1:
        outs = None
        for axis in (ins, filters[0], filters[1]):
            tracer.fix(axis, "transposed convolution with groups")
    else:
        outs = _grouped(tracer, call, ins, filters[0], filters[1], groups)
    bias = call.arg(2, "bias")
    if bias is not None:
        tracer.merge(tracer.axes(bias)[0], outs)
    tracer.producer(weight, out_axis)
    axes[channel] = outs
    tracer.mark(call.out, [*axes[: channel + 1], *new_axes], tracer.active(source))
    return (
        source.shape[channel] if ins is None else ins,
        call.out.shape[channel] if outs is None else outs,
    )


def _grouped(
    tracer: Tracer, call: Call, ins: Labels | None, outs: Labels | None, inner: Labels | None, groups: int
) -> Labels | None:
    """Decide whether a grouped convolution loses whole groups ("rows") or channels of every group ("columns")."""
    if ins is None or outs is None:
        for axis in (ins, outs, inner):
            tracer.fix(axis, "a grouped convolution reads channels of fixed number")
        return None
    width = ins.size // groups
    rows = "rows" if groups >= width else "columns"
    chosen = rows if width == 1 else tracer.decide(call, rows, np.concatenate([ins, outs]))
    if chosen == "rows":
        tracer.fix(inner, "the size of a group of the convolution stays")
        before, after = ins.reshape(groups, -1), outs.reshape(groups, -1)
        for block in (before, after):
            if block.shape[1] > 1:
                tracer.atoms.unify(np.repeat(block[:, 0], block.shape[1]), block)
        tracer.atoms.unify(np.ascontiguousarray(before[:, 0]), np.ascontiguousarray(after[:, 0]))
        tracer.tie(call.arg(6, "groups", 1), ins, block=width)
        return outs
    one = even(tracer, ins, groups)
    even(tracer, outs, groups)
    tracer.merge(one, inner)
    return outs


@register_rule("linear")
def linear(tracer: Tracer, call: Call) -> None:
    """linear: weight (out, in) on the last axis."""
    source, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    axes, filters = tracer.axes(source), tracer.axes(weight)
    outs = filters[0] if weight.dim() == 2 else None
    out_features: Any = 1 if weight.dim() < 2 else weight.shape[0] if outs is None else outs
    *positions, read = tracer.sizes(source)
    if weight.dim() == 2 and (axes[-1] is not None or filters[1] is not None):
        tracer.merge(axes[-1], filters[1])
    if bias is not None:
        tracer.merge(tracer.axes(bias)[0], outs)
    tracer.producer(weight, 0)
    tracer.mark(call.out, [*axes[:-1], *([outs] if weight.dim() == 2 else [])], tracer.active(source))
    ins: Any = source.shape[-1] if axes[-1] is None else axes[-1]
    note_layer(tracer, call, "linear", weight, source, -1, ins, out_features, read, positions)
