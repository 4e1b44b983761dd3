"""What operations that compute say about channels, what fvcore counts for them, and which layers they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from compressor.pruning.atoms import Labels
from compressor.pruning.rules_shape import even, fix_all
from compressor.pruning.trace import Call, LayerCall, Tracer


def nothing(tracer: Tracer, call: Call) -> None:
    """New tensors carry no channels."""


def unknown(tracer: Tracer, call: Call) -> None:
    """An operation without a rule: harmless where no channels go in, else they all stay as they are."""
    fix_all(tracer, call, f"the operation '{call.name}' is not known to keep channels apart")


def elementwise(tracer: Tracer, call: Call) -> None:
    """Tensors meet index by index, with broadcasting."""
    tensors = [t for t in call.tensors if t.dim()]
    for out in [call.out] if isinstance(call.out, Tensor) else call.out:
        rank = out.dim()
        made: list[Labels | None] = [None] * rank
        seen = [False] * rank
        for tensor in tensors:
            for i, axis in enumerate(tracer.axes(tensor), start=rank - tensor.dim()):
                if i < 0 or tensor.shape[i - rank] == 1 != out.shape[i]:
                    continue
                made[i] = tracer.merge(made[i], axis) if seen[i] else axis
                seen[i] = True
        live = [t for t in tensors if tracer.active(t)]
        if call.name in ("add", "sub") and len(live) > 1 and len({id(t) for t in live}) > 1:
            for labels in made:
                if labels is not None:
                    tracer.atoms.couple(labels)
        tracer.mark(out, made, bool(live))


def spatial(tracer: Tracer, call: Call) -> None:
    """Pooling and resizing keep batch and channels and change space only."""
    source: Tensor = call.args[0]
    for out in call.out if isinstance(call.out, (tuple, list)) else [call.out]:
        keep = out.dim() - _spatial_rank(call, out)
        axes = tracer.axes(source)
        for axis in axes[keep:]:
            tracer.fix(axis, "its channels are pooled or resized like space")
        made = [*axes[:keep], *[None] * (out.dim() - keep)]
        tracer.mark(out, made, tracer.active(source))
    if call.name.startswith("adaptive_avg_pool2d"):
        tracer.count(1, *tracer.sizes(source))
    elif call.name in ("interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "grid_sample"):
        mode = call.arg(3, "mode", "nearest") if call.name in ("interpolate", "upsample") else call.name
        price = {"nearest": 1, "upsample_nearest": 1, "bilinear": 4, "upsample_bilinear": 4, "grid_sample": 4}.get(mode, 0)
        if call.out.dim() == 4 and price and not call.kwargs.get("antialias", False):
            tracer.count(price, *tracer.sizes(call.out))


def _spatial_rank(call: Call, out: Tensor) -> int:
    for rank in (1, 2, 3):
        if f"{rank}d" in call.name:
            return rank
    return max(out.dim() - 2, 0)


# -------------------------------------------------------------------- layers
def _pair(values: Sequence[int] | int | str, rank: int) -> tuple[int, ...]:
    if isinstance(values, str):
        return (0,) * rank
    items = (values,) * rank if isinstance(values, int) else tuple(values)
    return items * rank if len(items) == 1 < rank else items


def _hw(tensor: Tensor, channel: int) -> tuple[int, int]:
    """Height and width of a tensor; (tokens, 1) where it is a sequence, (1, 1) where it has no space."""
    space = [size for i, size in enumerate(tensor.shape) if i not in (0, channel)] if tensor.dim() > 1 else []
    if not space:
        return (1, 1)
    return (space[0], 1) if len(space) == 1 else (space[0], math.prod(space[1:]))


def _layer(
    tracer: Tracer, call: Call, kind: str, weight: Tensor, source: Tensor, channel: int, ins: Any, outs: Any,
    geometry: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (0, 0), (1, 1)), groups: int = 1, name: str = "",
    out: Tensor | None = None,
) -> None:
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
            f"{path}.{name}" if name and path else name or path, kind, frame.kind, kernel, stride, padding, dilation,
            groups, _hw(source, channel % source.dim()), _hw(call.out if out is None else out, channel % source.dim()), ins, outs,
        )
    )


def convolution(tracer: Tracer, call: Call) -> None:
    """conv1d/2d/3d: weight (out, in / groups, *kernel)."""
    source, weight = call.arg(0, "input"), call.arg(1, "weight")
    rank = weight.dim() - 2
    groups = int(call.arg(6, "groups", 1))
    padding = call.arg(4, "padding", 0)
    ins, outs = _channels_through(tracer, call, source, weight, groups, out_axis=0, in_axis=1, rank=rank)
    if not isinstance(padding, str):
        # fvcore knows aten::_convolution only, and a padding given by name is traced as another operator.
        batch = call.out.shape[0] if source.dim() == rank + 2 else 1
        tracer.count(batch, *tracer.sizes(weight), *_space(tracer, call.out, rank))
    geometry = (
        tuple(weight.shape[2:]), _pair(call.arg(3, "stride", 1), rank), _pair(padding, rank),
        _pair(call.arg(5, "dilation", 1), rank),
    )
    if isinstance(padding, str) and padding == "same":
        geometry = (geometry[0], geometry[1], tuple(d * (k - 1) // 2 for k, d in zip(geometry[0], geometry[3], strict=True)), geometry[3])
    kind = "conv" if groups == 1 else "depthwise" if weight.shape[1] == 1 else "grouped"
    _layer(tracer, call, kind, weight, source, -rank - 1, ins, outs, geometry, groups)


def transposed_convolution(tracer: Tracer, call: Call) -> None:
    """conv_transpose1d/2d/3d: weight (in, out / groups, *kernel)."""
    source, weight = call.arg(0, "input"), call.arg(1, "weight")
    rank = weight.dim() - 2
    groups = int(call.arg(6, "groups", 1))
    ins, outs = _channels_through(tracer, call, source, weight, groups, out_axis=1, in_axis=0, rank=rank)
    tracer.count(source.shape[0], *tracer.sizes(weight), *_space(tracer, source, rank))
    geometry = (
        tuple(weight.shape[2:]), _pair(call.arg(3, "stride", 1), rank), _pair(call.arg(4, "padding", 0), rank),
        _pair(call.arg(7, "dilation", 1), rank),
    )
    _layer(tracer, call, "conv_transpose", weight, source, -rank - 1, ins, outs, geometry, groups)


def _space(tracer: Tracer, tensor: Tensor, rank: int) -> list[int | Labels]:
    return tracer.sizes(tensor)[-rank:]


def _channels_through(
    tracer: Tracer, call: Call, source: Tensor, weight: Tensor, groups: int, out_axis: int, in_axis: int, rank: int
) -> tuple[Any, Any]:
    """Labels through a convolution; returns (in, out) channels as labels or constants."""
    axes, filters = list(tracer.axes(source)), tracer.axes(weight)
    channel = source.dim() - rank - 1
    ins: Labels | None = axes[channel]
    made: list[Labels | None] = []
    for before, after, axis in zip(source.shape[channel + 1 :], call.out.shape[channel + 1 :], axes[channel + 1 :], strict=True):
        # A convolution along the channels (efficient channel attention) runs at any width that it leaves as it is.
        if before != after:
            tracer.fix(axis, "its channels are convolved like space")
        made.append(axis if before == after else None)
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
    tracer.mark(call.out, [*axes[: channel + 1], *made], tracer.active(source))
    return (
        source.shape[channel] if ins is None else ins,
        call.out.shape[channel] if outs is None else outs,
    )


def _grouped(
    tracer: Tracer, call: Call, ins: Labels | None, outs: Labels | None, inner: Labels | None, groups: int
) -> Labels | None:
    """A grouped convolution loses whole groups ("rows"), or every group loses as many channels ("columns")."""
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


def linear(tracer: Tracer, call: Call) -> None:
    """linear: weight (out, in) on the last axis."""
    source, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    axes, filters = tracer.axes(source), tracer.axes(weight)
    outs = filters[0] if weight.dim() == 2 else None
    tracer.count(1, *tracer.sizes(source), *([weight.shape[0] if outs is None else outs] if weight.dim() == 2 else []))
    if weight.dim() == 2 and (axes[-1] is not None or filters[1] is not None):
        tracer.merge(axes[-1], filters[1])
    if bias is not None:
        tracer.merge(tracer.axes(bias)[0], outs)
    tracer.producer(weight, 0)
    tracer.mark(call.out, [*axes[:-1], *([outs] if weight.dim() == 2 else [])], tracer.active(source))
    ins: Any = source.shape[-1] if axes[-1] is None else axes[-1]
    _layer(tracer, call, "linear", weight, source, -1, ins, weight.shape[0] if outs is None else outs)


def prelu(tracer: Tracer, call: Call) -> None:
    source, weight = call.arg(0, "input"), call.arg(1, "weight")
    axes = list(tracer.axes(source))
    if weight.numel() > 1:
        channel = 1 if source.dim() > 1 else 0
        axes[channel] = tracer.merge(axes[channel], tracer.axes(weight)[0])
    tracer.mark(call.out, axes, tracer.active(source))


# -------------------------------------------------------------------- normalisation
def batch_norm(tracer: Tracer, call: Call) -> None:
    """batch_norm and instance_norm: every vector among the arguments goes with axis 1."""
    source: Tensor = call.arg(0, "input")
    axes = list(tracer.axes(source))
    vectors = [t for t in call.tensors if t is not source]
    for vector in vectors:
        if vector.numel() == source.shape[1]:
            axes[1] = tracer.merge(axes[1], tracer.axes(vector)[0])
    tracer.mark(call.out, axes, tracer.active(source) or any(tracer.active(v) for v in vectors))
    if call.name == "instance_norm":
        tracer.count(5 if call.arg(3, "weight") is not None else 4, *tracer.sizes(source))
    else:
        trains = bool(call.arg(5, "training", False))
        affine = call.arg(3, "weight") is not None
        tracer.count((5 if trains else 2) if affine else (4 if trains else 1), *tracer.sizes(source))


def layer_norm(tracer: Tracer, call: Call) -> None:
    """layer_norm and rms_norm over the last axes; `normalized_shape` follows the kept channels."""
    source: Tensor = call.arg(0, "input")
    shape = tuple(call.arg(1, "normalized_shape"))
    axes = list(tracer.axes(source))
    start = source.dim() - len(shape)
    for weight in (call.arg(2, "weight"), call.arg(3, "bias") if call.name == "layer_norm" else None):
        if weight is not None:
            for i, axis in enumerate(tracer.axes(weight)):
                axes[start + i] = tracer.merge(axes[start + i], axis)
    for i in range(len(shape)):
        labels = axes[start + i]
        if labels is not None and hasattr(tracer.stack[-1].module, "normalized_shape"):
            tracer.tie_attribute("normalized_shape", labels, i)
    tracer.mark(call.out, axes, tracer.active(source))
    if call.name == "layer_norm":
        tracer.count(5 if call.arg(2, "weight") is not None else 4, *tracer.sizes(source))


def group_norm(tracer: Tracer, call: Call) -> None:
    """group_norm: every group keeps as many channels; one channel a group loses whole groups."""
    source: Tensor = call.arg(0, "input")
    groups = int(call.arg(1, "num_groups"))
    axes = list(tracer.axes(source))
    for vector in (call.arg(2, "weight"), call.arg(3, "bias")):
        if vector is not None:
            axes[1] = tracer.merge(axes[1], tracer.axes(vector)[0])
    labels = axes[1]
    if labels is not None and groups == labels.size:
        tracer.tie(call.arg(1, "num_groups"), labels)
    elif labels is not None and groups > 1:
        even(tracer, labels, groups)
    tracer.mark(call.out, axes, tracer.active(source))
    tracer.count(5 if call.arg(2, "weight") is not None else 4, *tracer.sizes(source))


# -------------------------------------------------------------------- products
def matmul(tracer: Tracer, call: Call) -> None:
    a, b = call.args[0], call.args[1] if len(call.args) > 1 else call.kwargs.get("other", call.kwargs.get("mat2"))
    _product(tracer, call, a, b, counted=True)


def addmm(tracer: Tracer, call: Call) -> None:
    """addmm is counted by fvcore, baddbmm is not."""
    _product(tracer, call, call.args[1], call.args[2], counted=call.name == "addmm")
    made = tracer.axes(call.out)
    added: Tensor = call.args[0]
    for i, axis in enumerate(tracer.axes(added), start=call.out.dim() - added.dim()):
        if added.shape[i - call.out.dim()] != 1:
            tracer.merge(made[i], axis)


def _product(tracer: Tracer, call: Call, a: Tensor, b: Tensor, counted: bool) -> None:
    left, right = list(tracer.axes(a)), list(tracer.axes(b))
    if counted and a.dim() > 0 and b.dim() > 0:
        last: int | Labels = b.shape[-1] if right[-1] is None else right[-1]
        tracer.count(1, *tracer.sizes(a), last)
    inner = right[-2] if b.dim() > 1 else right[-1]
    tracer.merge(left[-1], inner)
    if b.dim() > 1:
        # A weight on the right, as (in, out).
        tracer.producer(b, b.dim() - 1) if tracer.name_of(b) and not tracer.active(b) else None
    made: list[Labels | None] = []
    batch = max(a.dim(), b.dim()) - 2
    for i in range(-batch - 2, -2):
        x = left[i] if -i <= a.dim() else None
        y = right[i] if -i <= b.dim() else None
        wide = [t for t, ok in ((x, -i <= a.dim() and a.shape[i] > 1), (y, -i <= b.dim() and b.shape[i] > 1)) if ok]
        made.append(tracer.merge(wide[0], wide[1]) if len(wide) == 2 else wide[0] if wide else None)
    if a.dim() > 1:
        made.append(left[-2])
    if b.dim() > 1:
        made.append(right[-1])
    tracer.mark(call.out, made, tracer.active(a) or tracer.active(b))


def einsum(tracer: Tracer, call: Call) -> None:
    equation = str(call.args[0]).replace(" ", "")
    given = call.args[1:]
    operands: list[Tensor] = list(given[0]) if isinstance(given[0], (list, tuple)) else list(given)
    if "." in equation or "->" not in equation:
        return fix_all(tracer, call, "einsum with an ellipsis or without an output")
    left, right = equation.split("->")
    by_letter: dict[str, Labels | None] = {}
    sizes: dict[str, int] = {}
    for letters, operand in zip(left.split(","), operands, strict=True):
        for letter, axis, size in zip(letters, tracer.axes(operand), operand.shape, strict=True):
            by_letter[letter] = tracer.merge(by_letter[letter], axis) if letter in by_letter else axis
            sizes[letter] = size
    tracer.mark(call.out, [by_letter[c] for c in right], any(tracer.active(t) for t in operands))
    if len(operands) == 2:
        factors: list[int | Labels] = []
        for letter, size in sizes.items():
            labels = by_letter[letter]
            factors.append(size if labels is None else labels)
        names = {letter: chr(97 + i) for i, letter in enumerate(dict.fromkeys(c for c in equation if c.isalpha()))}
        plain = "".join(names.get(c, c) for c in equation)
        inner = set(left.replace(",", "")) - set(right)
        # fvcore counts two forms exactly; of the others it reads numpy's estimate, which is printed with four digits.
        for letters, operand in zip(left.split(","), operands, strict=True):
            if tracer.name_of(operand) and not tracer.active(operand):
                for axis, letter in enumerate(letters):
                    if letter in right and left.count(letter) == 1:
                        tracer.producer(operand, axis)
        exact = plain in ("abc,abd->acd", "abc,adc->adb")
        tracer.count(1 if exact else 2 if inner else 1, *factors, rounded=not exact)


def attention(tracer: Tracer, call: Call) -> None:
    """scaled_dot_product_attention: (..., L, D), (..., S, D), (..., S, Dv); fvcore does not count it."""
    query, key, value = call.arg(0, "query"), call.arg(1, "key"), call.arg(2, "value")
    axes = [list(tracer.axes(t)) for t in (query, key, value)]
    for labels in (axes[0][-1], axes[1][-1]):
        tracer.fix(labels, "the size of an attention head sets the scale")
    made = []
    for i in range(query.dim() - 2):
        labels = axes[0][i]
        for other, tensor in ((axes[1], key), (axes[2], value)):
            if tensor.shape[i] == query.shape[i]:
                labels = tracer.merge(labels, other[i])
            else:
                tracer.fix(labels, "heads share keys")
                tracer.fix(other[i], "heads share keys")
                labels = None
        made.append(labels)
    for i in (-2,):
        for part in axes:
            tracer.fix(part[i], "its channels are attended to like tokens")
    mask = call.arg(3, "attn_mask")
    if mask is not None:
        lead = query.dim() - mask.dim()
        for i, axis in enumerate(tracer.axes(mask)[:-2], start=lead):
            if mask.shape[i - lead] > 1:
                tracer.merge(made[i], axis)
    tracer.mark(call.out, [*made, None, axes[2][-1]], tracer.active(query))


def multi_head(tracer: Tracer, call: Call) -> None:
    """multi_head_attention_forward (tokens, batch, embedding): heads go whole, the embedding is free of them.

    torch's own module needs heads times their size to be the embedding, so a pruned network runs
    `attention.SlimAttention` in its place.
    """
    names = (
        "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
        "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight"
    ).split()
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    weight, out_weight = given["in_proj_weight"], given["out_proj_weight"]
    frame = tracer.stack[-1]
    plain = (
        weight is not None and given["bias_k"] is None and not given["add_zero_attn"] and query.dim() == 3
        and frame.kind == "MultiheadAttention" and given.get("static_k") is None and not given.get("is_causal")
    )
    heads = int(given["num_heads"])
    tokens, batch, embed = query.shape if query.dim() == 3 else (query.shape[0], 1, query.shape[1])
    if not plain:
        fix_all(tracer, call, "this form of multi-head attention is left as it is")
    else:
        tracer.facts.swaps[frame.path] = "multi_head_attention"
    inner, rows = tracer.axes(weight)[1], tracer.axes(weight)[0]
    for source in (query, key, value):
        tracer.merge(tracer.axes(source)[-1], inner)
    head_axis: Any = None
    if rows is not None:
        block = rows.reshape(3, heads, -1)
        head_axis = np.ascontiguousarray(block[0, :, 0])
        tracer.atoms.unify(np.ascontiguousarray(np.broadcast_to(head_axis[None, :, None], block.shape)), block)
    if given["in_proj_bias"] is not None:
        tracer.merge(tracer.axes(given["in_proj_bias"])[0], rows)
    back = tracer.axes(out_weight)
    if rows is not None and back[1] is not None:
        tracer.atoms.unify(back[1], np.ascontiguousarray(rows.reshape(3, -1)[0]))
        tracer.tie_attribute("num_heads", rows, block=3 * (embed // heads))
    outs = back[0]
    if given["out_proj_bias"] is not None:
        tracer.merge(tracer.axes(given["out_proj_bias"])[0], outs)
    tracer.producer(weight, 0)
    tracer.producer(out_weight, 0)
    result = call.out[0]
    tracer.mark(result, [*[None] * (result.dim() - 1), outs], tracer.active(query))
    wide: Any = embed if inner is None else inner
    made: Any = weight.shape[0] if rows is None else rows
    third: Any = embed if rows is None else rows.reshape(3, -1)[0]
    final: Any = out_weight.shape[0] if outs is None else outs
    tracer.count(tokens * batch, wide, made)
    tracer.count(tokens * batch, third, final)
    if given.get("need_weights", True):
        scores = (1 if given.get("attn_mask") is None else 0) + 1
        tracer.count(scores * tokens * batch * key.shape[0], third)
    seen = query.transpose(0, 1) if query.dim() == 3 else query
    _layer(tracer, call, "linear", weight, seen, -1, wide, made, name="in_proj", out=seen)
    _layer(tracer, call, "linear", out_weight, seen, -1, third, final, name="out_proj", out=seen)


def embedding(tracer: Tracer, call: Call) -> None:
    index, weight = call.arg(0, "input"), call.arg(1, "weight")
    axes = tracer.axes(weight)
    tracer.fix(axes[0], "it is looked up by an index")
    tracer.mark(call.out, [*tracer.axes(index), axes[1]], True)
