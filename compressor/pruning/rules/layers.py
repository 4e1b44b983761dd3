"""Rules of operations on weights and of products: convolution, linear, matmul, einsum and attention.

They record the layers, and the multiply-adds that fvcore counts outside of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from compressor.pruning.facts import Call, Labels, LayerCall
from compressor.pruning.registry import register_rule
from compressor.pruning.trace import Tracer, factored

Size = int | Labels
"""A number of channels: constant, or as the labels of an axis."""

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Kernel, stride, padding and dilation of a convolution, one number for each of its axes."""


def _note_layer(
    tracer: Tracer,
    call: Call,
    kind: str,
    weight: Tensor,
    source: Tensor,
    out: Tensor,
    channel: int,
    *,
    ins: Size,
    outs: Size,
    reads: Size,
    positions: Sequence[Size],
    geometry: Geometry = ((1, 1), (1, 1), (0, 0), (1, 1)),
    groups: int = 1,
    images: int = 1,
    name: str = "",
    counted: bool = True,
) -> None:
    """Record a layer.

    Args:
        kind: As in `LayerShape`.
        weight: Its weight, which names it where no module runs.
        source, out: Its input and output, for their height and width.
        channel: The axis of their channels.
        ins, outs: Input and output channels.
        reads: The input channels that one output reads.
        positions: Factors of the number of uses of each weight.
        geometry: Of a convolution.
        groups: Groups of a convolution.
        images: As in `LayerShape`.
        name: Name within the module, which has several.
        counted: Whether fvcore counts it.
    """
    if tracer.uncounted:
        return
    frame = tracer.stack[-1]
    path = frame.path or (tracer.name_of(weight) or "").rpartition(".")[0]
    kernel, stride, padding, dilation = geometry
    if len(kernel) == 1:
        kernel, stride, padding, dilation = (*kernel, 1), (*stride, 1), (*padding, 0), (*dilation, 1)
    tracer.facts.layers.append(
        LayerCall(
            ".".join(filter(None, (path, name))),
            kind,
            frame.kind,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            _hw(source, channel % source.dim(), kind),
            _hw(out, channel % source.dim(), kind),
            images,
            ins,
            outs,
            reads,
            factored(1, positions),
            counted,
        )
    )


def _hw(tensor: Tensor, channel: int, kind: str) -> tuple[int, int]:
    """Return height and width of a tensor; (tokens, 1) for a sequence, (1, 1) without spatial axes.

    Batch axes of a linear layer (such as the windows of an attention) belong to one input and multiply the height;
    those of a convolution are its `images`.
    """
    if kind != "linear":
        height, *rest = tensor.shape[channel + 1 :]
        return (height, math.prod(rest))
    if tensor.dim() < 2:
        return (1, 1)
    batch, *space = [size for i, size in enumerate(tensor.shape) if i != channel]
    height, *rest = space or [1]
    return (height * batch, math.prod(rest))


# ---------------------------------------------------------------- convolution and linear
@register_rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def convolution(tracer: Tracer, call: Call) -> None:
    """conv: weight (out, in / groups, *kernel). conv_transpose: weight (in, out / groups, *kernel)."""
    source, weight = call.arg(0, "input"), call.arg(1, "weight")
    padding, groups = call.arg(4, "padding", 0), int(call.arg(6, "groups", 1))
    rank, transposed = weight.dim() - 2, call.name.startswith("conv_transpose")
    ins, outs = _channels_through(tracer, call, source, weight, groups, transposed)
    kernel = tuple(weight.shape[2:])
    dilation = _per_axis(call.arg(7 if transposed else 5, "dilation", 1), rank)
    if padding == "same":
        pads = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    else:
        pads = (0,) * rank if padding == "valid" else _per_axis(padding, rank)
    reads: Size
    if transposed:
        kind, users = "conv_transpose", source
        reads = tracer.sizes(weight)[0] if groups == 1 else weight.shape[0] // groups
    else:
        kind = "conv" if groups == 1 else "depthwise" if weight.shape[1] == 1 else "grouped"
        users, reads = call.out, tracer.sizes(weight)[1]
    images = users.shape[0] if users.dim() == rank + 2 else 1
    _note_layer(
        tracer,
        call,
        kind,
        weight,
        source,
        call.out,
        -rank - 1,
        ins=ins,
        outs=outs,
        reads=reads,
        # Each weight is used once for each pixel of the output, or of the input where it is transposed.
        positions=[images, *tracer.sizes(users)[-rank:]],
        geometry=(kernel, _per_axis(call.arg(3, "stride", 1), rank), pads, dilation),
        groups=groups,
        images=images,
        # fvcore counts only aten::_convolution, and a padding given by name is traced as another operator.
        counted=not isinstance(padding, str),
    )


def _per_axis(values: Sequence[int] | int, rank: int) -> tuple[int, ...]:
    items = (values,) if isinstance(values, int) else tuple(values)
    return items * rank if len(items) == 1 else items


def _channels_through(
    tracer: Tracer, call: Call, source: Tensor, weight: Tensor, groups: int, transposed: bool
) -> tuple[Size, Size]:
    """Propagate labels through a convolution; returns its input and output channels."""
    axes, filters = list(tracer.axes(source)), tracer.axes(weight)
    channel = source.dim() - (weight.dim() - 2) - 1
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    ins = axes[channel]
    for axis in range(channel + 1, source.dim()):
        # A convolution along the channels (efficient channel attention) runs at any width if it preserves the width.
        if source.shape[axis] != call.out.shape[axis]:
            tracer.fix(axes[axis], "its channels are convolved like space")
            axes[axis] = None
    if groups == 1:
        outs = filters[out_axis]
        if ins is None:
            tracer.fix(filters[in_axis], "it reads the network's input or a fixed axis")
        elif filters[in_axis] is not None:
            tracer.merge(ins, filters[in_axis])
    elif transposed:
        outs = None
        for labels in (ins, filters[0], filters[1]):
            tracer.fix(labels, "transposed convolution with groups")
    else:
        outs = _grouped(tracer, call, ins, filters[0], filters[1], groups)
    bias = call.arg(2, "bias")
    if bias is not None:
        tracer.merge(tracer.axes(bias)[0], outs)
    tracer.producer(weight, out_axis if groups == 1 else 0)
    axes[channel] = outs
    tracer.mark(call.out, axes, tracer.active(source))
    return (source.shape[channel] if ins is None else ins, call.out.shape[channel] if outs is None else outs)


def _grouped(
    tracer: Tracer, call: Call, ins: Labels | None, outs: Labels | None, inner: Labels | None, groups: int
) -> Labels | None:
    """Decide whether a grouped convolution loses whole groups ("rows") or channels of every group ("columns")."""
    if ins is None or outs is None:
        for labels in (ins, outs, inner):
            tracer.fix(labels, "a grouped convolution reads channels of fixed number")
        return None
    width = ins.size // groups
    rows = "rows" if groups >= width else "columns"
    chosen = rows if width == 1 else tracer.decide(call, rows, np.concatenate([ins, outs]))
    if chosen == "rows":
        tracer.fix(inner, "the size of a group of the convolution stays")
        tracer.atoms.unify(tracer.fold(ins.reshape(groups, -1), 0), tracer.fold(outs.reshape(groups, -1), 0))
        tracer.tie(call.arg(6, "groups", 1), ins, block=width)
    else:
        one = tracer.even(ins, groups)
        tracer.even(outs, groups)
        tracer.merge(one, inner)
    return outs


@register_rule("linear")
def linear(tracer: Tracer, call: Call) -> None:
    """linear: weight (out, in) on the last axis; a weight of one axis makes a single output."""
    source, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    axes, filters = tracer.axes(source), tracer.axes(weight)
    matrix = weight.dim() == 2
    outs = filters[0] if matrix else None
    *positions, reads = tracer.sizes(source)
    if matrix and (axes[-1] is not None or filters[1] is not None):
        tracer.merge(axes[-1], filters[1])
    if bias is not None:
        tracer.merge(tracer.axes(bias)[0], outs)
    tracer.producer(weight, 0)
    tracer.mark(call.out, [*axes[:-1], *([outs] if matrix else [])], tracer.active(source))
    made = tracer.sizes(weight)[0] if matrix else 1
    _note_layer(
        tracer, call, "linear", weight, source, call.out, -1, ins=reads, outs=made, reads=reads, positions=positions
    )


# ---------------------------------------------------------------- products
@register_rule("matmul mm bmm rmatmul addmm baddbmm")
def matmul(tracer: Tracer, call: Call) -> None:
    """matmul(a, b) and addmm(added, a, b); fvcore does not count baddbmm."""
    added: Tensor | None = None
    if call.name in ("addmm", "baddbmm"):
        added, a, b = call.args[:3]
    else:
        a, b = call.args[0], call.arg(1, "other", call.kwargs.get("mat2"))
    left, right = tracer.axes(a), tracer.axes(b)
    if call.name != "baddbmm" and a.dim() > 0 and b.dim() > 0:
        tracer.count("matmul", 1, *tracer.sizes(a), tracer.sizes(b)[-1])
    tracer.merge(left[-1], right[-2] if b.dim() > 1 else right[-1])
    if b.dim() > 1 and tracer.name_of(b) and not tracer.active(b):
        tracer.producer(b, b.dim() - 1)  # a weight on the right, as (in, out)
    new_axes: list[Labels | None] = []
    for i in range(-max(a.dim(), b.dim()), -2):
        wide = [axes[i] for t, axes in ((a, left), (b, right)) if -i <= t.dim() and t.shape[i] > 1]
        new_axes.append(tracer.merge(wide[0], wide[1]) if len(wide) == 2 else wide[0] if wide else None)
    if a.dim() > 1:
        new_axes.append(left[-2])
    if b.dim() > 1:
        new_axes.append(right[-1])
    tracer.mark(call.out, new_axes, tracer.active(a) or tracer.active(b))
    if added is not None:
        lead = call.out.dim() - added.dim()
        for i, labels in enumerate(tracer.axes(added)):
            if added.shape[i] != 1:
                tracer.merge(new_axes[lead + i], labels)


@register_rule("einsum")
def einsum(tracer: Tracer, call: Call) -> None:
    equation = str(call.args[0]).replace(" ", "")
    given = call.args[1:]
    operands: list[Tensor] = list(given[0]) if isinstance(given[0], (list, tuple)) else list(given)
    if "." in equation or "->" not in equation:
        return tracer.fix_all(call, "einsum with an ellipsis or without an output")
    left, right = equation.split("->")
    terms = list(zip(left.split(","), operands, strict=True))
    axes: dict[str, Labels | None] = {}
    sizes: dict[str, Size] = {}
    for letters, operand in terms:
        for letter, labels, size in zip(letters, tracer.axes(operand), operand.shape, strict=True):
            axes[letter] = tracer.merge(axes[letter], labels) if letter in axes else labels
            sizes[letter] = size
    tracer.mark(call.out, [axes[letter] for letter in right], any(map(tracer.active, operands)))
    if len(operands) != 2:
        return
    for letters, operand in terms:
        if tracer.name_of(operand) and not tracer.active(operand):
            for axis, letter in enumerate(letters):
                if letter in right and left.count(letter) == 1:
                    tracer.producer(operand, axis)
    sizes.update({letter: labels for letter, labels in axes.items() if labels is not None})
    # fvcore counts two forms exactly; for the others it reads numpy's estimate, printed with four digits.
    order = dict.fromkeys(filter(str.isalpha, equation))
    plain = equation.translate({ord(letter): chr(97 + i) for i, letter in enumerate(order)})
    exact = plain in ("abc,abd->acd", "abc,adc->adb")
    sums = bool(set(left.replace(",", "")) - set(right))
    tracer.count("einsum", 2 if sums and not exact else 1, *sizes.values(), rounded=not exact)


@register_rule("scaled_dot_product_attention")
def attention(tracer: Tracer, call: Call) -> None:
    """scaled_dot_product_attention: (..., L, D), (..., S, D), (..., S, Dv); fvcore does not count it."""
    query, key, value = call.arg(0, "query"), call.arg(1, "key"), call.arg(2, "value")
    axes = [tracer.axes(tensor) for tensor in (query, key, value)]
    for labels in (axes[0][-1], axes[1][-1]):
        tracer.fix(labels, "the size of an attention head sets the scale")
    new_axes = []
    for i in range(query.dim() - 2):
        labels = axes[0][i]
        for other, tensor in ((axes[1], key), (axes[2], value)):
            if tensor.shape[i] == query.shape[i]:
                labels = tracer.merge(labels, other[i])
            else:
                tracer.fix(labels, "heads share keys")
                tracer.fix(other[i], "heads share keys")
                labels = None
        new_axes.append(labels)
    for part in axes:
        tracer.fix(part[-2], "its channels are attended to like tokens")
    mask = call.arg(3, "attn_mask")
    if mask is not None:
        lead = query.dim() - mask.dim()
        for i, labels in enumerate(tracer.axes(mask)[:-2]):
            if mask.shape[i] > 1:
                tracer.merge(new_axes[lead + i], labels)
    tracer.mark(call.out, [*new_axes, None, axes[2][-1]], tracer.active(query))


_MULTI_HEAD = """
    query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p
    out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight
"""
"""Parameters of `torch.nn.functional.multi_head_attention_forward`, in order."""


@register_rule("multi_head_attention_forward")
def multi_head(tracer: Tracer, call: Call) -> None:
    """multi_head_attention_forward (tokens, batch, embedding): whole heads are removed, independently of the embedding.

    torch's module requires that heads times head size equals the embedding size, so a pruned network uses
    `attention.SlimAttention` instead.
    """
    given = {**dict(zip(_MULTI_HEAD.split(), call.args, strict=False)), **call.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    weight, out_weight = given["in_proj_weight"], given["out_proj_weight"]
    frame = tracer.stack[-1]
    plain = (
        weight is not None
        and given["bias_k"] is None
        and not given["add_zero_attn"]
        and query.dim() == 3
        and frame.kind == "MultiheadAttention"
        and given.get("static_k") is None
        and not given.get("is_causal")
    )
    heads = int(given["num_heads"])
    tokens, batch, embed = query.shape if query.dim() == 3 else (query.shape[0], 1, query.shape[1])
    if plain:
        tracer.facts.swaps[frame.path] = "multi_head_attention"
    else:
        tracer.fix_all(call, "this form of multi-head attention is left as it is")
    rows: Labels | None = None
    projections = [("in_proj", weight, query)]
    if weight is not None:
        rows, inner = tracer.axes(weight)
        for source in (query, key, value):
            tracer.merge(tracer.axes(source)[-1], inner)
        if rows is not None:
            tracer.fold(rows.reshape(3, heads, -1), 1)
        if given["in_proj_bias"] is not None:
            tracer.merge(tracer.axes(given["in_proj_bias"])[0], rows)
    else:  # keys or values of another width have projections of their own
        sources = {"q_proj": query, "k_proj": key, "v_proj": value}
        projections = [(name, given[f"{name}_weight"], source) for name, source in sources.items()]
    outs, back = tracer.axes(out_weight)
    if rows is not None and back is not None:
        tracer.atoms.unify(back, np.ascontiguousarray(rows.reshape(3, -1)[0]))
        tracer.tie_attribute("num_heads", rows, block=3 * (embed // heads))
    if given["out_proj_bias"] is not None:
        tracer.merge(tracer.axes(given["out_proj_bias"])[0], outs)
    result = call.out[0]
    tracer.mark(result, [*[None] * (result.dim() - 1), outs], tracer.active(query))
    third: Size = embed if rows is None else rows.reshape(3, -1)[0]
    if given.get("need_weights", True):
        scores = 1 if given.get("attn_mask") is not None else 2
        tracer.count("attention", scores * tokens * batch * key.shape[0], third)
    for name, used, source in [*projections, ("out_proj", out_weight, query)]:
        tracer.producer(used, 0)
        made, read = tracer.sizes(used)
        seen = source.transpose(0, 1) if source.dim() == 3 else source
        _note_layer(
            tracer, call, "linear", used, seen, seen, -1, ins=read, outs=made, reads=read,
            positions=[seen.shape[:-1].numel()], name=name,
        )  # fmt: skip
