"""Rules of operations that join, split, select, pad or reduce indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from compressor.pruning.facts import Call, Labels
from compressor.pruning.registry import register_rule
from compressor.pruning.rules_shape import even, fix_all, ints, positive
from compressor.pruning.trace import Tracer

REDUCING = """
    mean sum amax amin max min var std norm logsumexp argmax argmin any all prod median nanmean nansum vector_norm
    count_nonzero std_mean var_mean
"""


@register_rule("cat concat concatenate")
def cat(tracer: Tracer, call: Call) -> None:
    parts = [part for part in call.arg(0, "tensors") if part.dim() > 1 or part.numel()]
    dim = positive(call.arg(1, "dim", 0), call.out.dim())
    axes = [tracer.axes(part) for part in parts]
    new_axes: list[Labels | None] = list(axes[0])
    for other in axes[1:]:
        for i, axis in enumerate(other):
            if i != dim:
                new_axes[i] = tracer.merge(new_axes[i], axis)
    if any(part[dim] is not None for part in axes):
        pieces = []
        for part, tensor in zip(axes, parts, strict=True):
            labels = part[dim]
            if labels is None:
                labels = tracer.atoms.fresh(tensor.shape[dim])
                tracer.fix(labels, "it is concatenated with channels that never change")
            pieces.append(labels)
        new_axes[dim] = np.concatenate(pieces)
    else:
        new_axes[dim] = None
    tracer.mark(call.out, new_axes, any(tracer.active(part) for part in parts))


@register_rule("stack")
def stack(tracer: Tracer, call: Call) -> None:
    parts = list(call.arg(0, "tensors"))
    dim = positive(call.arg(1, "dim", 0), call.out.dim())
    new_axes = list(tracer.axes(parts[0]))
    for part in parts[1:]:
        new_axes = [tracer.merge(a, b) for a, b in zip(new_axes, tracer.axes(part), strict=True)]
    new_axes.insert(dim, None)
    tracer.mark(call.out, new_axes, any(tracer.active(part) for part in parts))


@register_rule("chunk tensor_split split split_with_sizes unsafe_split unsafe_chunk")
def split(tracer: Tracer, call: Call) -> None:
    """chunk and split: parts of equal size stay equal, since the call may specify only their number."""
    source: Tensor = call.args[0]
    dim = positive(call.arg(2, "dim", 0), source.dim())
    axes = tracer.axes(source)
    whole = axes[dim]
    sizes = [part.shape[dim] for part in call.out]
    if whole is not None and len(sizes) > 1:
        size_or_count = call.arg(1, "chunks" if "chunk" in call.name else "split_size_or_sections")
        if len(set(sizes)) == 1 and isinstance(size_or_count, int):
            even(tracer, whole, len(sizes))
            tracer.tie(size_or_count, whole[: sizes[0]], others=[whole])
        elif isinstance(size_or_count, (list, tuple)):
            start = 0
            for size, given in zip(sizes, size_or_count, strict=True):
                tracer.tie(given, whole[start : start + size], others=[whole])
                start += size
    start = 0
    for part, size in zip(call.out, sizes, strict=True):
        new_axes = list(axes)
        new_axes[dim] = None if whole is None else whole[start : start + size]
        start += size
        tracer.mark(part, new_axes, tracer.active(source))


@register_rule("unbind iter")
def unbind(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dim = positive(call.arg(1, "dim", 0), source.dim())
    axes = tracer.axes(source)
    tracer.fix(axes[dim], "its channels are taken one by one")
    parts = call.out if isinstance(call.out, (list, tuple)) else ()
    for part in parts:
        tracer.mark(part, [axis for i, axis in enumerate(axes) if i != dim], tracer.active(source))


@register_rule("select")
def select(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dim = positive(call.arg(1, "dim"), source.dim())
    axes = tracer.axes(source)
    tracer.fix(axes[dim], "one of its channels is taken by number")
    tracer.mark(call.out, [axis for i, axis in enumerate(axes) if i != dim], tracer.active(source))


@register_rule("narrow")
def narrow(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dim = positive(call.arg(1, "dim"), source.dim())
    start, length = call.arg(2, "start"), call.arg(3, "length")
    new_axes = list(tracer.axes(source))
    axis = new_axes[dim]
    if axis is not None:
        new_axes[dim] = axis[start : start + length]
        tracer.tie(length, axis[start : start + length], others=[axis])
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("glu")
def glu(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dim = positive(call.arg(1, "dim", -1), source.dim())
    new_axes = list(tracer.axes(source))
    axis = new_axes[dim]
    new_axes[dim] = None if axis is None else even(tracer, axis, 2)
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("getitem")
def getitem(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    key = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    taken = sum(1 for item in key if item is not None and item is not Ellipsis)
    if any(isinstance(item, (Tensor, list, tuple, np.ndarray, bool)) for item in key):
        return _indexed(tracer, call, source, key)
    axes = tracer.axes(source)
    new_axes: list[Labels | None] = []
    at = 0
    for item in key:
        if item is None:
            new_axes.append(None)
        elif item is Ellipsis:
            rest = source.dim() - taken
            new_axes.extend(axes[at : at + rest])
            at += rest
        elif isinstance(item, slice):
            axis = axes[at]
            piece = None if axis is None else axis[item]
            if piece is not None and axis is not None and piece.size == 1 < axis.size:
                tracer.fix(piece, "one of its channels is taken by number")
                piece = None
            new_axes.append(piece)
            if axis is not None and piece is not None and piece.size < axis.size:
                for bound in (item.start, item.stop):
                    if isinstance(bound, int):
                        front = axis[:bound] if bound >= 0 else axis[bound:]
                        tracer.tie(bound, front, others=[axis])
            at += 1
        else:
            tracer.fix(axes[at], "one of its channels is taken by number")
            at += 1
    new_axes.extend(axes[at:])
    tracer.mark(call.out, new_axes, tracer.active(source))


def _indexed(tracer: Tracer, call: Call, source: Tensor, key: tuple[Any, ...]) -> None:
    """Index with tensors or lists: indexed axes stay dense; one index tensor before plain slices is supported."""
    axes = tracer.axes(source)
    if len(key) == 1 and isinstance(key[0], Tensor) and not key[0].dtype.is_floating_point:
        index = key[0]
        taken = index.dim() if str(index.dtype) == "torch.bool" else 1
        for axis in axes[:taken]:
            tracer.fix(axis, "it is indexed by a tensor")
        lead = call.out.dim() - (source.dim() - taken)
        tracer.mark(call.out, [*[None] * lead, *axes[taken:]], tracer.active(source))
    else:
        fix_all(tracer, call, "it is indexed by tensors or lists")


@register_rule("index_select")
def index_select(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dim = positive(call.arg(1, "dim"), source.dim())
    new_axes = list(tracer.axes(source))
    tracer.fix(new_axes[dim], "its channels are picked by an index")
    new_axes[dim] = None
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("gather take_along_dim topk sort argsort")
def along(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    place = 2 if call.name == "topk" else 1
    dim = call.arg(place, "dim", -1)
    axes = list(tracer.axes(source))
    where = positive(dim if isinstance(dim, int) else -1, source.dim())
    tracer.fix(axes[where], f"its channels are ordered or picked by value ({call.name})")
    axes[where] = None
    if call.name in ("gather", "take_along_dim"):
        return fix_all(tracer, call, "it is gathered by an index")
    for out in call.out if isinstance(call.out, (list, tuple)) else [call.out]:
        tracer.mark(out, axes, tracer.active(source))


@register_rule("flip")
def flip(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dims = [positive(i, source.dim()) for i in ints(call, 1)]
    new_axes = [
        axis[::-1].copy() if axis is not None and i in dims else axis
        for i, axis in enumerate(tracer.axes(source))
    ]
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("roll")
def roll(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dims = call.arg(2, "dims", ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    axes = tracer.axes(source)
    for dim in dims or range(source.dim()):
        tracer.fix(axes[dim], "its channels are rolled by a fixed number")
    tracer.mark(call.out, axes, tracer.active(source))


@register_rule("pad")
def pad(tracer: Tracer, call: Call) -> None:
    """pad: padding of channels (as in a parameter-free shortcut) is tied to attributes or stays dense."""
    source: Tensor = call.args[0]
    amounts = list(call.arg(1, "pad"))
    new_axes = list(tracer.axes(source))
    for i in range(len(amounts) // 2):
        axis = source.dim() - 1 - i
        front, back = amounts[2 * i], amounts[2 * i + 1]
        labels = new_axes[axis]
        if (front == 0 and back == 0) or labels is None:
            continue
        if front < 0 or back < 0:
            tracer.fix(labels, "a negative padding cuts its channels")
            new_axes[axis] = None
            continue
        before, behind = tracer.atoms.fresh(front), tracer.atoms.fresh(back)
        new_axes[axis] = np.concatenate([before, labels, behind])
        if front == back:
            # One number may specify both sides.
            tracer.atoms.unify(before, behind)
        for amount, new in ((front, before), (back, behind)):
            if not tracer.tie(amount, new):
                tracer.fix(new, "channels are padded by a fixed number")
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("pixel_shuffle")
def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    axes = list(tracer.axes(source))
    labels, square = axes[-3], int(call.arg(1, "upscale_factor")) ** 2
    if labels is not None:
        block = labels.reshape(-1, square)
        first = np.ascontiguousarray(block[:, 0])
        for i in range(1, square):
            tracer.atoms.unify(first, np.ascontiguousarray(block[:, i]))
        axes[-3] = first if first.size > 1 else None
        if first.size == 1:
            tracer.fix(first, "all of its channels make one channel")
    tracer.mark(call.out, axes, tracer.active(source))


@register_rule("pixel_unshuffle")
def pixel_unshuffle(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    axes = list(tracer.axes(source))
    labels = axes[-3]
    axes[-3] = None if labels is None else np.repeat(labels, int(call.arg(1, "downscale_factor")) ** 2)
    tracer.mark(call.out, axes, tracer.active(source))


@register_rule("channel_shuffle")
def channel_shuffle(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    axes = list(tracer.axes(source))
    labels = axes[1]
    if labels is not None:
        groups = int(call.arg(1, "groups"))
        even(tracer, labels, groups)
        axes[1] = np.ascontiguousarray(labels.reshape(groups, -1).T).reshape(-1)
    tracer.mark(call.out, axes, tracer.active(source))


@register_rule("unfold im2col")
def unfold(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    axes = list(tracer.axes(source))
    if (
        isinstance(call.arg(1, "dimension"), int)
        and call.arg(3, "step") is not None
        and call.out.dim() == source.dim() + 1
    ):
        dim = positive(call.args[1], source.dim())
        tracer.fix(axes[dim], "windows are taken along its channels")
        axes[dim] = None
        return tracer.mark(call.out, [*axes, None], tracer.active(source))
    labels = axes[1]
    windows = call.out.shape[1] // source.shape[1] if source.dim() == 4 else 1
    new_axes = None if labels is None else np.repeat(labels, windows)
    tracer.mark(call.out, [axes[0], new_axes, None], tracer.active(source))


@register_rule(REDUCING)
def reduce(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    second = call.args[1] if len(call.args) > 1 else None
    if isinstance(second, Tensor):
        from compressor.pruning.rules_pointwise import elementwise

        return elementwise(tracer, call)
    place = 2 if call.name in ("norm", "vector_norm") else 1
    dims = call.arg(place, "dim", call.kwargs.get("axis"))
    if isinstance(dims, bool):
        dims = None
    results = call.out if isinstance(call.out, (list, tuple)) else [call.out]
    chosen = range(source.dim()) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    gone = {positive(i, source.dim()) for i in chosen} or set(range(source.dim()))
    axes = tracer.axes(source)
    for result in results:
        kept = result.dim() == source.dim()
        new_axes = [None if i in gone else axis for i, axis in enumerate(axes) if kept or i not in gone]
        tracer.mark(result, new_axes, tracer.active(source))
