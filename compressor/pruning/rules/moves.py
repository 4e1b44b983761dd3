"""Rules of operations that move, join, split, select or reduce indices: each says where the channels end up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from compressor.pruning.facts import Axes, Call, Labels, positive
from compressor.pruning.registry import maps_axes, register_rule
from compressor.pruning.rules.pointwise import elementwise
from compressor.pruning.trace import Tracer
from export.convert.trees import tensors_in

Line = list[Labels | None]
"""The labels of each axis of a tensor."""

REDUCING = """
    mean sum amax amin max min var std norm logsumexp argmax argmin any all prod median nanmean nansum vector_norm
    count_nonzero std_mean var_mean
"""
_CHOOSING = frozenset(("argmax", "argmin", "max", "min", "median", "nanmedian"))
"""Those that return the number of an element, beside its value or alone."""


# ---------------------------------------------------------------- reshape
@register_rule("view reshape flatten unflatten ravel _unsafe_view view_as reshape_as")
def reshape(tracer: Tracer, call: Call) -> None:
    source, target = call.args[0], call.out
    if target is source:
        return
    axes = tracer.axes(source)
    new_axes = _regroup(tracer, call, axes, tuple(source.shape), tuple(target.shape))
    tracer.mark(target, new_axes, tracer.active(source))
    if call.key in tracer.settings.locks:
        _lock(tracer, new_axes)
    if call.name not in ("flatten", "view_as", "reshape_as"):
        _tie_sizes(tracer, call, new_axes, axes)


def _regroup(tracer: Tracer, call: Call, axes: Axes, before: tuple[int, ...], after: tuple[int, ...]) -> Axes:
    """Return the labels after a reshape; axes are matched in blocks of equal size, first to last."""
    new_axes: Line = [None] * len(after)
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
            kept = 0 if tracer.active(call.args[0]) else 1
            for i in labelled[kept:]:
                tracer.fix(axes[i], "a reshape folds two channel axes into one")
            if not kept:
                continue
        channels = axes[labelled[0]]
        assert channels is not None
        form = [before[i] if i == labelled[0] else 1 for i in left]
        flat = np.broadcast_to(channels.reshape(form), [before[i] for i in left]).reshape(-1)
        if len(right) == 1:
            new_axes[right[0]] = np.ascontiguousarray(flat)
        else:
            # Attention with one head can only lose channels of that head.
            heads = right[-1] == len(after) - 1 and after[right[-1] - 1] != 1
            axis, labels = _split_axis(tracer, call, flat.reshape([after[i] for i in right]), heads)
            tracer.facts.numbered.append(channels)
            new_axes[right[axis]] = labels
    return tuple(new_axes)


def _split_axis(tracer: Tracer, call: Call, block: Labels, heads: bool) -> tuple[int, Labels]:
    """Choose the axis of `block` along which its channels are pruned; returns the axis and its labels.

    If the labels vary along one axis only, it is that axis. Otherwise one axis is chosen, and channels across the
    others are tied: the second to last axis if the split is at the end of the tensor (attention: batch, tokens, heads,
    head size), else the last (channel shuffle: batch, groups, channels per group, space).
    """
    for axis in range(block.ndim):
        lines = np.moveaxis(block, axis, 0).reshape(block.shape[axis], -1)
        if (lines == lines[:, :1]).all():
            return axis, np.ascontiguousarray(lines[:, 0])
    default = block.ndim - 2 if heads else block.ndim - 1
    axis = min(int(tracer.decide(call, str(default), block)), block.ndim - 1)
    return axis, tracer.fold(block, axis)


def _lock(tracer: Tracer, new_axes: Axes) -> None:
    """Tie the result's channels to the module's input, from which the code takes the size."""
    entering = [t for t in tracer.stack[-1].inputs if isinstance(t, Tensor)]
    inputs = [axis for tensor in entering for axis in tracer.axes(tensor) if axis is not None]
    for labels in new_axes:
        whole = [axis for axis in inputs if labels is not None and axis.size % labels.size == 0]
        if labels is not None and whole:
            # The code takes the head size from the input: each head is tied to its part of the input's channels.
            tracer.atoms.unify(np.repeat(labels, whole[0].size // labels.size), whole[0])


def _tie_sizes(tracer: Tracer, call: Call, axes: Axes, source: Axes) -> None:
    """Tie attributes that a call uses as the size of a prunable axis."""
    sizes = call.ints(1)
    if len(sizes) == len(axes):
        for size, labels in zip(sizes, axes, strict=True):
            if labels is not None:
                tracer.tie(size, labels, others=source)


# ---------------------------------------------------------------- order and size
@maps_axes("permute")
def permute(tracer: Tracer, call: Call, axes: Line) -> Line:
    return [axes[i] for i in call.ints(1)]


@maps_axes("transpose swapaxes swapdims")
def transpose(tracer: Tracer, call: Call, axes: Line) -> Line:
    a, b = call.ints(1)
    axes[a], axes[b] = axes[b], axes[a]
    return axes


@maps_axes("t get:T get:mT adjoint get:H")
def turned(tracer: Tracer, call: Call, axes: Line) -> Line:
    return axes[::-1] if call.name in ("t", "get:T") else [*axes[:-2], *axes[:-3:-1]]


@maps_axes("movedim moveaxis")
def movedim(tracer: Tracer, call: Call, axes: Line) -> Line:
    rank = len(axes)
    start, end = call.arg(1, "source"), call.arg(2, "destination")
    starts = [positive(i, rank) for i in ([start] if isinstance(start, int) else start)]
    ends = [positive(i, rank) for i in ([end] if isinstance(end, int) else end)]
    rest = iter([i for i in range(rank) if i not in starts])
    return [axes[starts[ends.index(i)] if i in ends else next(rest)] for i in range(rank)]


@maps_axes("unsqueeze")
def unsqueeze(tracer: Tracer, call: Call, axes: Line) -> Line:
    axes.insert(positive(call.arg(1, "dim"), len(axes) + 1), None)
    return axes


@maps_axes("squeeze")
def squeeze(tracer: Tracer, call: Call, axes: Line) -> Line:
    rank, shape = len(axes), call.args[0].shape
    dims = [positive(i, rank) for i in call.ints(1)]
    if not dims:
        dims = list(range(rank))
        tracer.facts.numbered += [axis for axis in axes if axis is not None]
    return [axis for i, axis in enumerate(axes) if not (i in dims and shape[i] == 1)]


@maps_axes("expand expand_as broadcast_to")
def expand(tracer: Tracer, call: Call, axes: Line) -> Line:
    lead = call.out.dim() - len(axes)
    new_axes = [None] * lead + axes
    if call.name != "expand_as":
        _tie_sizes(tracer, call, tuple(new_axes), tuple(axes))
        return new_axes
    source = call.args[0]
    for i, other in enumerate(tracer.axes(call.args[1])):
        if new_axes[i] is None and call.out.shape[i] > 1 and source.shape[i - lead] == 1:
            new_axes[i] = other
    return new_axes


@register_rule("broadcast_tensors")
def broadcast(tracer: Tracer, call: Call) -> None:
    for source, target in zip(call.tensors, call.out, strict=True):
        lead = target.dim() - source.dim()
        tracer.mark(target, (None,) * lead + tracer.axes(source), tracer.active(source))


@maps_axes("repeat tile")
def repeat(tracer: Tracer, call: Call, axes: Line) -> Line:
    times = call.ints(1)
    times = [1] * (len(axes) - len(times)) + times
    new: Line = [None] * (len(times) - len(axes))
    new += axes
    return [None if axis is None else np.tile(axis, count) for axis, count in zip(new, times, strict=True)]


@maps_axes("repeat_interleave")
def repeat_interleave(tracer: Tracer, call: Call, axes: Line) -> Line | None:
    count, dim = call.arg(1, "repeats"), call.arg(2, "dim")
    if not isinstance(count, int) or dim is None:
        tracer.fix_all(call, "it is repeated by a tensor of counts")
        return None
    axis = axes[dim]
    axes[dim] = None if axis is None else np.repeat(axis, count)
    return axes


@maps_axes("flip")
def flip(tracer: Tracer, call: Call, axes: Line) -> Line:
    dims = [positive(i, len(axes)) for i in call.ints(1)]
    return [axis[::-1].copy() if axis is not None and i in dims else axis for i, axis in enumerate(axes)]


@maps_axes("roll")
def roll(tracer: Tracer, call: Call, axes: Line) -> Line:
    dims = call.arg(2, "dims", ())
    for dim in [dims] if isinstance(dims, int) else dims or range(len(axes)):
        tracer.fix(axes[dim], "its channels are rolled by a fixed number")
    return axes


@maps_axes("pixel_shuffle")
def pixel_shuffle(tracer: Tracer, call: Call, axes: Line) -> Line:
    labels = axes[-3]
    if labels is not None:
        first = tracer.fold(labels.reshape(-1, int(call.arg(1, "upscale_factor")) ** 2), 0)
        axes[-3] = first if first.size > 1 else None
        if first.size == 1:
            tracer.fix(first, "all of its channels make one channel")
    return axes


@maps_axes("pixel_unshuffle")
def pixel_unshuffle(tracer: Tracer, call: Call, axes: Line) -> Line:
    labels = axes[-3]
    axes[-3] = None if labels is None else np.repeat(labels, int(call.arg(1, "downscale_factor")) ** 2)
    return axes


@maps_axes("channel_shuffle")
def channel_shuffle(tracer: Tracer, call: Call, axes: Line) -> Line:
    labels = axes[1]
    if labels is not None:
        groups = int(call.arg(1, "groups"))
        tracer.even(labels, groups)
        axes[1] = np.ascontiguousarray(labels.reshape(groups, -1).T).reshape(-1)
    return axes


@maps_axes("unfold im2col")
def unfold(tracer: Tracer, call: Call, axes: Line) -> Line:
    """Tensor.unfold takes windows along an axis; torch.nn.functional.unfold lines up the windows of an image."""
    source = call.args[0]
    if (
        isinstance(call.arg(1, "dimension"), int)
        and call.arg(3, "step") is not None
        and call.out.dim() == source.dim() + 1
    ):
        dim = call.axis(1, "dimension")
        tracer.fix(axes[dim], "windows are taken along its channels")
        axes[dim] = None
        return [*axes, None]
    labels = axes[1]
    windows = call.out.shape[1] // source.shape[1] if source.dim() == 4 else 1
    return [axes[0], None if labels is None else np.repeat(labels, windows), None]


@maps_axes("pad")
def pad(tracer: Tracer, call: Call, axes: Line) -> Line:
    """pad: padding of channels (as in a parameter-free shortcut) is tied to attributes or stays dense."""
    amounts = list(call.arg(1, "pad"))
    for i in range(len(amounts) // 2):
        axis = len(axes) - 1 - i
        front, back = amounts[2 * i], amounts[2 * i + 1]
        labels = axes[axis]
        if (front == 0 and back == 0) or labels is None:
            continue
        if front < 0 or back < 0:
            tracer.fix(labels, "a negative padding cuts its channels")
            axes[axis] = None
            continue
        before, behind = tracer.atoms.fresh(front), tracer.atoms.fresh(back)
        axes[axis] = np.concatenate([before, labels, behind])
        if front == back:
            # One number may specify both sides.
            tracer.atoms.unify(before, behind)
        for amount, new in ((front, before), (back, behind)):
            if not tracer.tie(amount, new):
                tracer.fix(new, "channels are padded by a fixed number")
    return axes


# ---------------------------------------------------------------- joining
@register_rule("cat concat concatenate")
def cat(tracer: Tracer, call: Call) -> None:
    parts = [part for part in call.arg(0, "tensors") if part.dim() > 1 or part.numel()]
    dim = positive(call.arg(1, "dim", 0), call.out.dim())
    axes = [tracer.axes(part) for part in parts]
    new_axes: Line = list(axes[0])
    for other in axes[1:]:
        for i, axis in enumerate(other):
            if i != dim:
                new_axes[i] = tracer.merge(new_axes[i], axis)
    new_axes[dim] = None
    if any(part[dim] is not None for part in axes):
        pieces = []
        for part, tensor in zip(axes, parts, strict=True):
            labels = part[dim]
            if labels is None:
                labels = tracer.atoms.fresh(tensor.shape[dim])
                tracer.fix(labels, "it is concatenated with channels that never change")
            pieces.append(labels)
        new_axes[dim] = np.concatenate(pieces)
    tracer.mark(call.out, new_axes, any(map(tracer.active, parts)))


@register_rule("stack")
def stack(tracer: Tracer, call: Call) -> None:
    parts = list(call.arg(0, "tensors"))
    new_axes: Line = list(tracer.axes(parts[0]))
    for part in parts[1:]:
        new_axes = [tracer.merge(a, b) for a, b in zip(new_axes, tracer.axes(part), strict=True)]
    new_axes.insert(positive(call.arg(1, "dim", 0), call.out.dim()), None)
    tracer.mark(call.out, new_axes, any(map(tracer.active, parts)))


# ---------------------------------------------------------------- splitting and selecting
@register_rule("chunk tensor_split split split_with_sizes unsafe_split unsafe_chunk")
def split(tracer: Tracer, call: Call) -> None:
    """chunk and split: parts of equal size stay equal, since the call may specify only their number."""
    source: Tensor = call.args[0]
    dim = call.axis(2, default=0)
    axes = list(tracer.axes(source))
    whole = axes[dim]
    sizes = [part.shape[dim] for part in call.out]
    ends = np.cumsum(sizes)
    pieces: Line = [None] * len(sizes) if whole is None else list(np.split(whole, ends[:-1]))
    if whole is not None and len(sizes) > 1:
        tracer.facts.numbered.append(whole)
        given = call.arg(1, "chunks" if "chunk" in call.name else "split_size_or_sections")
        if len(set(sizes)) == 1 and isinstance(given, int):
            tracer.even(whole, len(sizes))
            tracer.tie(given, whole[: sizes[0]], others=[whole])
        elif isinstance(given, (list, tuple)):
            for piece, size in zip(pieces, given, strict=True):
                assert piece is not None
                tracer.tie(size, piece, others=[whole])
    for part, piece in zip(call.out, pieces, strict=True):
        axes[dim] = piece
        tracer.mark(part, axes, tracer.active(source))


@maps_axes("select unbind iter")
def select(tracer: Tracer, call: Call, axes: Line) -> Line:
    one = call.name == "select"
    axis = axes.pop(call.axis(1, default=0))
    tracer.fix(axis, "one of its channels is taken by number" if one else "its channels are taken one by one")
    return axes


@maps_axes("narrow")
def narrow(tracer: Tracer, call: Call, axes: Line) -> Line:
    dim, start, length = call.axis(1), call.arg(2, "start"), call.arg(3, "length")
    axis = axes[dim]
    if axis is not None:
        axes[dim] = piece = axis[start : start + length]
        tracer.facts.numbered.append(axis)
        tracer.tie(length, piece, others=[axis])
    return axes


@maps_axes("glu")
def glu(tracer: Tracer, call: Call, axes: Line) -> Line:
    dim = call.axis(1, default=-1)
    axis = axes[dim]
    axes[dim] = None if axis is None else tracer.even(axis, 2)
    return axes


@maps_axes("index_select")
def index_select(tracer: Tracer, call: Call, axes: Line) -> Line:
    dim = call.axis(1)
    tracer.fix(axes[dim], "its channels are picked by an index")
    axes[dim] = None
    return axes


@maps_axes("gather take_along_dim topk sort argsort")
def along(tracer: Tracer, call: Call, axes: Line) -> Line | None:
    index = 2 if call.name == "topk" else 1
    dim = call.axis(index, default=-1) if isinstance(call.arg(index, "dim", -1), int) else len(axes) - 1
    tracer.fix(axes[dim], f"its channels are ordered or picked by value ({call.name})")
    axes[dim] = None
    if call.name in ("gather", "take_along_dim"):
        tracer.fix_all(call, "it is gathered by an index")
        return None
    return axes


@maps_axes("getitem")
def getitem(tracer: Tracer, call: Call, axes: Line) -> Line | None:
    key = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(item, (Tensor, list, tuple, np.ndarray, bool)) for item in key):
        return _indexed(tracer, call, axes, key)
    taken = sum(1 for item in key if item is not None and item is not Ellipsis)
    new_axes: Line = []
    at = 0
    for item in key:
        if item is None:
            new_axes.append(None)
        elif item is Ellipsis:
            rest = len(axes) - taken
            new_axes.extend(axes[at : at + rest])
            at += rest
        else:
            if isinstance(item, slice):
                new_axes.append(_sliced(tracer, axes[at], item))
            else:
                tracer.fix(axes[at], "one of its channels is taken by number")
            at += 1
    return [*new_axes, *axes[at:]]


def _sliced(tracer: Tracer, axis: Labels | None, part: slice) -> Labels | None:
    """Return the labels of a part of an axis, and tie the attributes from which its bounds were read."""
    if axis is None:
        return None
    piece = axis[part]
    if piece.size == 1 < axis.size:
        tracer.fix(piece, "one of its channels is taken by number")
        return None
    step = 1 if part.step is None else int(part.step)
    if step > 1:
        whole = (part.start or 0) in range(step) and (part.stop is None or part.stop >= axis.size)
        if whole and axis.size % step == 0:
            # Channels from one to the next that is taken are removed together, so that those behind keep their turn.
            tracer.fold(axis.reshape(-1, step), 0)
        else:
            tracer.fix(axis, "every few of its channels are taken by number")
    elif piece.size < axis.size:
        tracer.facts.numbered.append(axis)
        for bound in (part.start, part.stop):
            if isinstance(bound, int):
                tracer.tie(bound, axis[:bound] if bound >= 0 else axis[bound:], others=[axis])
    return piece


def _indexed(tracer: Tracer, call: Call, axes: Line, key: tuple[Any, ...]) -> Line | None:
    """Index with tensors or lists: indexed axes stay dense; one index tensor before plain slices is supported."""
    if len(key) > 1 or not isinstance(key[0], Tensor) or key[0].dtype.is_floating_point:
        tracer.fix_all(call, "it is indexed by tensors or lists")
        return None
    taken = key[0].dim() if str(key[0].dtype) == "torch.bool" else 1
    for axis in axes[:taken]:
        tracer.fix(axis, "it is indexed by a tensor")
    rest = axes[taken:]
    return [*[None] * (call.out.dim() - len(rest)), *rest]


# ---------------------------------------------------------------- reduction
@maps_axes(REDUCING)
def reduce(tracer: Tracer, call: Call, axes: Line) -> Line | None:
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):  # of two tensors, such as torch.max(a, b)
        elementwise(tracer, call)
        return None
    dims = call.arg(2 if call.name in ("norm", "vector_norm") else 1, "dim", call.kwargs.get("axis"))
    if dims is None or isinstance(dims, bool):
        dims = range(len(axes))
    gone = {positive(i, len(axes)) for i in ([dims] if isinstance(dims, int) else dims)} or set(range(len(axes)))
    results = tensors_in(call.out)
    if call.name in _CHOOSING and (call.name.startswith("arg") or len(results) > 1):
        for i in gone:
            tracer.choose(axes[i], results, call.name)
    keeps_rank = results[0].dim() == len(axes)
    return [None if i in gone else axis for i, axis in enumerate(axes) if keeps_rank or i not in gone]
