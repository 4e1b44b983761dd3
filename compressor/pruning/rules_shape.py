"""Rules of operations that reshape, expand or reorder axes."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from compressor.pruning.facts import Axes, Call, Labels
from compressor.pruning.registry import register_rule
from compressor.pruning.trace import Tracer


def positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def ints(call: Call, first: int) -> list[int]:
    """Return the integers among the arguments from index `first` on, with tuples and lists flattened."""
    found: list[int] = []
    for value in [*call.args[first:], *call.kwargs.values()]:
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, int) and not isinstance(item, bool):
                found.append(item)
    return found


def tie_sizes(tracer: Tracer, call: Call, axes: Axes, source: Axes) -> None:
    """Tie attributes that a call uses as the size of a prunable axis."""
    sizes = ints(call, 1)
    if len(sizes) == len(axes):
        for size, labels in zip(sizes, axes, strict=True):
            if labels is not None:
                tracer.tie(size, labels, others=source)


@register_rule("view reshape flatten unflatten ravel _unsafe_view view_as reshape_as")
def reshape(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    target: Tensor = call.out
    if target is source:
        return
    axes = tracer.axes(source)
    new_axes = regroup(tracer, call, axes, tuple(source.shape), tuple(target.shape))
    tracer.mark(target, new_axes, tracer.active(source))
    if call.key in tracer.settings.locks:
        _lock(tracer, new_axes)
    if call.name not in ("flatten", "view_as", "reshape_as"):
        tie_sizes(tracer, call, new_axes, axes)


def _lock(tracer: Tracer, new_axes: Axes) -> None:
    """Tie the result's channels one to one to the module's input, from which the code takes the size."""
    frame = tracer.stack[-1]
    entering = [
        axis for t in frame.inputs if isinstance(t, Tensor) for axis in tracer.axes(t) if axis is not None
    ]
    for labels in new_axes:
        whole = [axis for axis in entering if labels is not None and axis.size % labels.size == 0]
        if labels is not None and whole:
            # The code takes the head size from the input: each head is tied to its part of the input's channels.
            tracer.atoms.unify(np.repeat(labels, whole[0].size // labels.size), whole[0])


def regroup(tracer: Tracer, call: Call, axes: Axes, before: tuple[int, ...], after: tuple[int, ...]) -> Axes:
    """Return the labels after a reshape; axes are matched in blocks of equal size, first to last."""
    new_axes: list[Labels | None] = [None] * len(after)
    ins = [i for i, size in enumerate(before) if size != 1]
    outs = [i for i, size in enumerate(after) if size != 1]
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        while (a := math.prod(before[i] for i in left)) != (b := math.prod(after[i] for i in right)):
            if a < b:
                left.append(ins.pop(0))
            else:
                right.append(outs.pop(0))
        labelled = [i for i in left if axes[i] is not None]
        if not labelled:
            continue
        if len(labelled) > 1:
            # For a weight (channels, height, width), only the first axis can shrink, not the kernel.
            kept = 1 if not tracer.active(call.args[0]) else 0
            for i in labelled[kept:]:
                tracer.fix(axes[i], "a reshape folds two channel axes into one")
            if not kept:
                continue
        flat = _spread(axes, labelled[0], [before[i] for i in left], left.index(labelled[0]))
        if len(right) == 1:
            new_axes[right[0]] = flat
        else:
            # Attention with one head can only lose channels of that head.
            heads = right[-1] == len(after) - 1 and after[right[-1] - 1] != 1
            place, labels = _split_axis(tracer, call, flat.reshape([after[i] for i in right]), heads)
            new_axes[right[place]] = labels
    return tuple(new_axes)


def _spread(axes: Axes, axis: int, sizes: list[int], place: int) -> Labels:
    labels = axes[axis]
    assert labels is not None
    form = [1] * len(sizes)
    form[place] = sizes[place]
    return np.ascontiguousarray(np.broadcast_to(labels.reshape(form), sizes)).reshape(-1)


def _split_axis(tracer: Tracer, call: Call, block: Labels, heads: bool) -> tuple[int, Labels]:
    """Choose the axis of `block` along which its channels are pruned; returns the axis and its labels.

    If the labels vary along one axis only, it is that axis. Otherwise one axis is chosen, and channels across the
    others are tied: the second to last axis if the split is at the end of the tensor (attention: batch, tokens, heads,
    head size), else the last (channel shuffle: batch, groups, channels per group, space).
    """
    for place in range(block.ndim):
        line = _line(block, place)
        if np.array_equal(np.broadcast_to(_stand(line, place, block.ndim), block.shape), block):
            return place, line
    default = block.ndim - 2 if heads else block.ndim - 1
    place = int(tracer.decide(call, str(default), block))
    place = place if place < block.ndim else block.ndim - 1
    line = _line(block, place)
    tracer.atoms.unify(
        np.ascontiguousarray(np.broadcast_to(_stand(line, place, block.ndim), block.shape)), block
    )
    return place, line


def _line(block: Labels, place: int) -> Labels:
    return np.ascontiguousarray(np.moveaxis(block, place, 0).reshape(block.shape[place], -1)[:, 0])


def _stand(line: Labels, place: int, rank: int) -> Labels:
    form = [1] * rank
    form[place] = line.size
    return line.reshape(form)


def even(tracer: Tracer, labels: Labels, parts: int) -> Labels:
    """Tie the channels of `parts` equal parts by position, so that all keep as many; returns one part's labels."""
    block = labels.reshape(parts, -1)
    first = np.ascontiguousarray(block[0])
    for other in block[1:]:
        tracer.atoms.unify(first, np.ascontiguousarray(other))
    return first


@register_rule("expand expand_as broadcast_to")
def expand(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    axes = tracer.axes(source)
    lead = call.out.dim() - source.dim()
    new_axes = (None,) * lead + axes
    tracer.mark(call.out, new_axes, tracer.active(source))
    if call.name == "expand_as":
        other = tracer.axes(call.args[1])
        new_axes = tuple(
            b if a is None and call.out.shape[i] > 1 and source.shape[i - lead] == 1 else a
            for i, (a, b) in enumerate(zip(new_axes, other, strict=True))
        )
        tracer.mark(call.out, new_axes, tracer.active(source))
    else:
        tie_sizes(tracer, call, new_axes, axes)


@register_rule("broadcast_tensors")
def broadcast(tracer: Tracer, call: Call) -> None:
    for source, target in zip(call.tensors, call.out, strict=True):
        lead = target.dim() - source.dim()
        tracer.mark(target, (None,) * lead + tracer.axes(source), tracer.active(source))


@register_rule("repeat tile")
def repeat(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    times = ints(call, 1)
    times = [1] * (source.dim() - len(times)) + times
    axes = (None,) * (len(times) - source.dim()) + tracer.axes(source)
    new_axes = [None if axis is None else np.tile(axis, count) for axis, count in zip(axes, times, strict=True)]
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("repeat_interleave")
def repeat_interleave(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    count, dim = call.arg(1, "repeats"), call.arg(2, "dim")
    if not isinstance(count, int) or dim is None:
        return fix_all(tracer, call, "it is repeated by a tensor of counts")
    new_axes = list(tracer.axes(source))
    dim = positive(dim, source.dim())
    axis = new_axes[dim]
    new_axes[dim] = None if axis is None else np.repeat(axis, count)
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("permute")
def permute(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    order = ints(call, 1)
    axes = tracer.axes(source)
    tracer.mark(call.out, [axes[i] for i in order], tracer.active(source))


@register_rule("transpose swapaxes swapdims")
def transpose(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    a, b = ints(call, 1)
    axes = list(tracer.axes(source))
    axes[a], axes[b] = axes[b], axes[a]
    tracer.mark(call.out, axes, tracer.active(source))


@register_rule("t get:T get:mT adjoint get:H")
def turned(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    axes = list(tracer.axes(source))
    new_axes = axes[::-1] if call.name in ("t", "get:T") else [*axes[:-2], *axes[:-3:-1]]
    tracer.mark(call.out, new_axes, tracer.active(source))


@register_rule("movedim moveaxis")
def movedim(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    rank = source.dim()
    start, end = call.arg(1, "source"), call.arg(2, "destination")
    starts = [positive(i, rank) for i in ([start] if isinstance(start, int) else start)]
    ends = [positive(i, rank) for i in ([end] if isinstance(end, int) else end)]
    axes = tracer.axes(source)
    rest = iter([i for i in range(rank) if i not in starts])
    order = [starts[ends.index(i)] if i in ends else next(rest) for i in range(rank)]
    tracer.mark(call.out, [axes[i] for i in order], tracer.active(source))


@register_rule("unsqueeze")
def unsqueeze(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    axes = list(tracer.axes(source))
    axes.insert(positive(call.arg(1, "dim"), source.dim() + 1), None)
    tracer.mark(call.out, axes, tracer.active(source))


@register_rule("squeeze")
def squeeze(tracer: Tracer, call: Call) -> None:
    source: Tensor = call.args[0]
    dims = [positive(i, source.dim()) for i in ints(call, 1)] or list(range(source.dim()))
    axes = tracer.axes(source)
    new_axes = [axis for i, axis in enumerate(axes) if not (i in dims and source.shape[i] == 1)]
    tracer.mark(call.out, new_axes, tracer.active(source))


def fix_all(tracer: Tracer, call: Call, reason: str) -> None:
    """Keep all channels that this call uses dense."""
    for tensor in call.tensors:
        for axis in tracer.axes(tensor):
            tracer.fix(axis, reason)
