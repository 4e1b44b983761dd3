"""Rules of pointwise operations, pooling, normalisation and lookups, and their multiply-adds in fvcore."""

from __future__ import annotations

from torch import Tensor

from compressor.pruning.facts import Call, Labels
from compressor.pruning.registry import UNKNOWN, maps_axes, register_rule
from compressor.pruning.trace import Attribute, Tracer
from export.convert.trees import tensors_in

Line = list[Labels | None]
"""The labels of each axis of a tensor."""

ELEMENTWISE = """
    relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu celu selu mish softplus softsign
    rrelu logsigmoid tanhshrink softshrink hardshrink threshold dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout feature_dropout clamp clamp_min clamp_max clip abs absolute neg negative exp exp2 expm1 log
    log2 log10 log1p sqrt rsqrt reciprocal square pow float_power add sub subtract mul multiply div divide true_divide
    truediv floordiv floor_divide rsub rdiv rtruediv rpow remainder fmod mod maximum minimum fmax fmin where lerp
    addcmul addcdiv to type float half bfloat16 double int long bool byte contiguous clone detach type_as masked_fill
    round floor ceil trunc frac erf erfc sign sin cos tan atan atan2 sinh cosh asin acos heaviside eq ne lt le gt ge
    less greater logical_and logical_or logical_not logical_xor and or xor invert isnan isinf isfinite nan_to_num fill
    zero zeros_like ones_like empty_like full_like rand_like randn_like bernoulli normal uniform softmax log_softmax
    softmin normalize cumsum cumprod cpu cuda requires_grad requires_grad_ copysign get:data get:real hypot xlogy
    logit positive pos iadd isub imul itruediv idiv ipow radd rmul copy gumbel_softmax logaddexp sinc sgn
"""
SPATIAL = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d lp_pool1d lp_pool2d max_pool2d_with_indices boolean_dispatch adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample upsample_nearest upsample_bilinear fn grid_sample
    grid_sampler
"""
CREATING = """
    new_zeros new_ones new_empty new_full new_tensor zeros ones empty full arange linspace rand randn randint tensor
    as_tensor meshgrid tril_indices triu_indices randperm logspace scalar_tensor one_hot affine_grid
"""


_PIXELS_READ = {"nearest": 1, "upsample_nearest": 1, "bilinear": 4, "upsample_bilinear": 4, "grid_sample": 4}
"""Pixels from which each pixel of a resized image is computed."""


@register_rule(CREATING, "setitem")
def nothing(tracer: Tracer, call: Call) -> None:
    """Creation of tensors: they have no channels."""


@register_rule("eye")
def eye(tracer: Tracer, call: Call) -> None:
    """eye: an identity matrix with an attribute's size, such as the kernel of an identity branch; tie both axes."""
    if len(call.args) == 1 and isinstance(call.args[0], Attribute):
        labels = tracer.atoms.fresh(int(call.args[0]))
        if tracer.tie(call.args[0], labels):
            tracer.mark(call.out, (labels, labels), False)


@register_rule(UNKNOWN)
def unknown(tracer: Tracer, call: Call) -> None:
    """Operation without a rule: all input channels stay dense; without channels there is nothing to do."""
    tracer.fix_all(call, f"the operation '{call.name}' is not known to keep channels apart")


@register_rule(ELEMENTWISE)
def elementwise(tracer: Tracer, call: Call) -> None:
    """Elementwise operation: tie the operands index by index, with broadcasting."""
    tensors = [t for t in call.tensors if t.dim()]
    for out in tensors_in(call.out):
        rank = out.dim()
        new_axes: list[Labels | None] = [None] * rank
        seen = [False] * rank
        for tensor in tensors:
            for i, axis in enumerate(tracer.axes(tensor), start=rank - tensor.dim()):
                if i < 0 or tensor.shape[i - rank] == 1 != out.shape[i]:
                    continue
                new_axes[i] = tracer.merge(new_axes[i], axis) if seen[i] else axis
                seen[i] = True
        live = {id(tensor) for tensor in tensors if tracer.active(tensor)}
        if call.name in ("add", "sub") and len(live) > 1:
            for labels in new_axes:
                if labels is not None:
                    tracer.atoms.couple(labels)
        tracer.mark(out, new_axes, bool(live))


@register_rule(SPATIAL)
def spatial(tracer: Tracer, call: Call) -> None:
    """Pooling and resizing: batch and channels are preserved, only spatial axes change."""
    source: Tensor = call.args[0]
    axes = tracer.axes(source)
    for out in tensors_in(call.out):
        keep = out.dim() - _spatial_rank(call, out)
        for axis in axes[keep:]:
            tracer.fix(axis, "its channels are pooled or resized like space")
        tracer.mark(out, [*axes[:keep], *[None] * (out.dim() - keep)], tracer.active(source))
    if call.name.startswith("adaptive_avg_pool2d"):
        tracer.count(call.name, 1, *tracer.sizes(source))
    elif call.name in ("interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "grid_sample"):
        mode = call.arg(3, "mode", "nearest") if call.name in ("interpolate", "upsample") else call.name
        reads = _PIXELS_READ.get(mode)
        if call.out.dim() == 4 and reads and not call.kwargs.get("antialias", False):
            tracer.count(call.name, reads, *tracer.sizes(call.out))


def _spatial_rank(call: Call, out: Tensor) -> int:
    named = (rank for rank in (1, 2, 3) if f"{rank}d" in call.name)
    return next(named, max(out.dim() - 2, 0))


@maps_axes("prelu")
def prelu(tracer: Tracer, call: Call, axes: Line) -> Line:
    weight = call.arg(1, "weight")
    if weight.numel() > 1:
        channel = 1 if len(axes) > 1 else 0
        axes[channel] = tracer.merge(axes[channel], tracer.axes(weight)[0])
    return axes


@register_rule("batch_norm instance_norm")
def batch_norm(tracer: Tracer, call: Call) -> None:
    """batch_norm and instance_norm: all vectors among the arguments are tied to axis 1."""
    source: Tensor = call.arg(0, "input")
    axes = list(tracer.axes(source))
    vectors = [tensor for tensor in call.tensors if tensor is not source]
    for vector in vectors:
        if vector.numel() == source.shape[1]:
            axes[1] = tracer.merge(axes[1], tracer.axes(vector)[0])
    tracer.mark(call.out, axes, any(map(tracer.active, [source, *vectors])))
    affine = call.arg(3, "weight") is not None
    if call.name == "instance_norm" or call.arg(5, "training", False):
        each = 5 if affine else 4
    else:
        each = 2 if affine else 1
    tracer.count(call.name, each, *tracer.sizes(source))


@maps_axes("layer_norm rms_norm")
def layer_norm(tracer: Tracer, call: Call, axes: Line) -> Line:
    """layer_norm and rms_norm over the last axes; `normalized_shape` follows the kept channels."""
    start = len(axes) - len(call.arg(1, "normalized_shape"))
    _merge_affine(tracer, call, axes, start, bias=call.name == "layer_norm")
    for index, labels in enumerate(axes[start:]):
        if labels is not None and hasattr(tracer.stack[-1].module, "normalized_shape"):
            tracer.tie_attribute("normalized_shape", labels, index)
    if call.name == "layer_norm":
        _count_norm(tracer, call)
    return axes


@maps_axes("group_norm")
def group_norm(tracer: Tracer, call: Call, axes: Line) -> Line:
    """group_norm: all groups keep the same number of channels; with one channel per group whole groups are removed."""
    groups = int(call.arg(1, "num_groups"))
    _merge_affine(tracer, call, axes, 1, bias=True)
    labels = axes[1]
    if labels is not None and groups == labels.size:
        tracer.tie(call.arg(1, "num_groups"), labels)
    elif labels is not None and groups > 1:
        tracer.even(labels, groups)
    _count_norm(tracer, call)
    return axes


def _merge_affine(tracer: Tracer, call: Call, axes: Line, start: int, bias: bool) -> None:
    """Tie weight and bias of a normalisation to the axes from `start` on."""
    for vector in (call.arg(2, "weight"), call.arg(3, "bias") if bias else None):
        if vector is not None:
            for axis, labels in enumerate(tracer.axes(vector), start):
                axes[axis] = tracer.merge(axes[axis], labels)


def _count_norm(tracer: Tracer, call: Call) -> None:
    tracer.count(call.name, 5 if call.arg(2, "weight") is not None else 4, *tracer.sizes(call.args[0]))


@register_rule("embedding")
def embedding(tracer: Tracer, call: Call) -> None:
    index, axes = call.arg(0, "input"), tracer.axes(call.arg(1, "weight"))
    tracer.fix(axes[0], "it is looked up by an index")
    tracer.mark(call.out, [*tracer.axes(index), axes[1]], True)
