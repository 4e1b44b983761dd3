"""Rules of tensor products and attention: their channels, and their multiply-adds in fvcore."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from compressor.pruning.facts import Call, Labels
from compressor.pruning.registry import register_rule
from compressor.pruning.rules_layers import note_layer
from compressor.pruning.rules_shape import fix_all
from compressor.pruning.trace import Tracer


@register_rule("matmul mm bmm rmatmul")
def matmul(tracer: Tracer, call: Call) -> None:
    a, b = (
        call.args[0],
        call.args[1] if len(call.args) > 1 else call.kwargs.get("other", call.kwargs.get("mat2")),
    )
    _product(tracer, call, a, b, counted=True)


@register_rule("addmm baddbmm")
def addmm(tracer: Tracer, call: Call) -> None:
    """addmm and baddbmm; fvcore counts only addmm."""
    _product(tracer, call, call.args[1], call.args[2], counted=call.name == "addmm")
    new_axes = tracer.axes(call.out)
    added: Tensor = call.args[0]
    for i, axis in enumerate(tracer.axes(added), start=call.out.dim() - added.dim()):
        if added.shape[i - call.out.dim()] != 1:
            tracer.merge(new_axes[i], axis)


def _product(tracer: Tracer, call: Call, a: Tensor, b: Tensor, counted: bool) -> None:
    left, right = list(tracer.axes(a)), list(tracer.axes(b))
    if counted and a.dim() > 0 and b.dim() > 0:
        last: int | Labels = b.shape[-1] if right[-1] is None else right[-1]
        tracer.count("matmul", 1, *tracer.sizes(a), last)
    inner = right[-2] if b.dim() > 1 else right[-1]
    tracer.merge(left[-1], inner)
    if b.dim() > 1:
        # A weight on the right, as (in, out).
        tracer.producer(b, b.dim() - 1) if tracer.name_of(b) and not tracer.active(b) else None
    new_axes: list[Labels | None] = []
    batch = max(a.dim(), b.dim()) - 2
    for i in range(-batch - 2, -2):
        x = left[i] if -i <= a.dim() else None
        y = right[i] if -i <= b.dim() else None
        wide = [
            t
            for t, ok in ((x, -i <= a.dim() and a.shape[i] > 1), (y, -i <= b.dim() and b.shape[i] > 1))
            if ok
        ]
        new_axes.append(tracer.merge(wide[0], wide[1]) if len(wide) == 2 else wide[0] if wide else None)
    if a.dim() > 1:
        new_axes.append(left[-2])
    if b.dim() > 1:
        new_axes.append(right[-1])
    tracer.mark(call.out, new_axes, tracer.active(a) or tracer.active(b))


@register_rule("einsum")
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
        names = {
            letter: chr(97 + i) for i, letter in enumerate(dict.fromkeys(c for c in equation if c.isalpha()))
        }
        plain = "".join(names.get(c, c) for c in equation)
        inner = set(left.replace(",", "")) - set(right)
        # fvcore counts two forms exactly; for the others it reads numpy's estimate, printed with four digits.
        for letters, operand in zip(left.split(","), operands, strict=True):
            if tracer.name_of(operand) and not tracer.active(operand):
                for place, letter in enumerate(letters):
                    if letter in right and left.count(letter) == 1:
                        tracer.producer(operand, place)
        exact = plain in ("abc,abd->acd", "abc,adc->adb")
        tracer.count("einsum", 1 if exact else 2 if inner else 1, *factors, rounded=not exact)


@register_rule("scaled_dot_product_attention")
def attention(tracer: Tracer, call: Call) -> None:
    """scaled_dot_product_attention: (..., L, D), (..., S, D), (..., S, Dv); fvcore does not count it."""
    query, key, value = call.arg(0, "query"), call.arg(1, "key"), call.arg(2, "value")
    axes = [list(tracer.axes(t)) for t in (query, key, value)]
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
    for i in (-2,):
        for part in axes:
            tracer.fix(part[i], "its channels are attended to like tokens")
    mask = call.arg(3, "attn_mask")
    if mask is not None:
        lead = query.dim() - mask.dim()
        for i, axis in enumerate(tracer.axes(mask)[:-2], start=lead):
            if mask.shape[i - lead] > 1:
                tracer.merge(new_axes[i], axis)
    tracer.mark(call.out, [*new_axes, None, axes[2][-1]], tracer.active(query))


@register_rule("multi_head_attention_forward")
def multi_head(tracer: Tracer, call: Call) -> None:
    """multi_head_attention_forward (tokens, batch, embedding): whole heads are removed, independently of the embedding.

    torch's module requires that heads times head size equals the embedding size, so a pruned network uses
    `attention.SlimAttention` instead.
    """
    names = [
        "query",
        "key",
        "value",
        "embed_dim_to_check",
        "num_heads",
        "in_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "add_zero_attn",
        "dropout_p",
        "out_proj_weight",
        "out_proj_bias",
        "training",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "use_separate_proj_weight",
    ]
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
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
        tracer.atoms.unify(
            np.ascontiguousarray(np.broadcast_to(head_axis[None, :, None], block.shape)), block
        )
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
    projected: Any = weight.shape[0] if rows is None else rows
    third: Any = embed if rows is None else rows.reshape(3, -1)[0]
    final: Any = out_weight.shape[0] if outs is None else outs
    if given.get("need_weights", True):
        scores = (1 if given.get("attn_mask") is None else 0) + 1
        tracer.count("attention", scores * tokens * batch * key.shape[0], third)
    seen = query.transpose(0, 1) if query.dim() == 3 else query
    for name, used, ins, outs in (("in_proj", weight, wide, projected), ("out_proj", out_weight, third, final)):
        note_layer(
            tracer, call, "linear", used, seen, -1, ins, outs, ins, [tokens * batch], name=name, out=seen
        )


@register_rule("embedding")
def embedding(tracer: Tracer, call: Call) -> None:
    index, weight = call.arg(0, "input"), call.arg(1, "weight")
    axes = tracer.axes(weight)
    tracer.fix(axes[0], "it is looked up by an index")
    tracer.mark(call.out, [*tracer.axes(index), axes[1]], True)
