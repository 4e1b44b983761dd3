"""Which rule says what a call of the torch API means for channels, by the call's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compressor.pruning import rules_join as join
from compressor.pruning import rules_layers as layers
from compressor.pruning import rules_pointwise as pointwise
from compressor.pruning import rules_products as products
from compressor.pruning import rules_shape as shape
from compressor.pruning.facts import Call
from compressor.pruning.trace import Tracer

Rule = Callable[[Tracer, Call], None]

#: Calls that return no tensor, or one that carries no channels.
SILENT = """
    size dim numel ndimension stride storage_offset is_contiguous is_floating_point is_complex is_nested get_device
    element_size nelement data_ptr is_tensor is_grad_enabled _assert __bool__ item tolist __int__ __float__ __index__
    __len__ __repr__ __format__ __hash__ __contains__ get:shape get:dtype get:device get:is_nested get:requires_grad
    get:ndim get:layout get:is_cuda get:grad get:grad_fn get:is_meta get:is_sparse get:is_quantized get:is_leaf
    get:names get:_is_view get:itemsize get:nbytes get:is_cpu get:_version is_same_size broadcast_shapes
    get_default_dtype is_inference has_names is_autocast_enabled promote_types can_cast result_type finfo iinfo numpy
    untyped_storage is_shared
"""
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
REDUCING = """
    mean sum amax amin max min var std norm logsumexp argmax argmin any all prod median nanmean nansum vector_norm
    count_nonzero std_mean var_mean
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


def _names(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rules.items() for name in names.split()}


_SILENT = frozenset(SILENT.split())
_RULES = _names(
    {
        ELEMENTWISE: pointwise.elementwise,
        REDUCING: join.reduce,
        SPATIAL: pointwise.spatial,
        CREATING: pointwise.nothing,
        "eye": pointwise.eye,
        "conv1d conv2d conv3d": layers.convolution,
        "conv_transpose1d conv_transpose2d conv_transpose3d": layers.transposed_convolution,
        "linear": layers.linear,
        "prelu": pointwise.prelu,
        "batch_norm instance_norm": pointwise.batch_norm,
        "layer_norm rms_norm": pointwise.layer_norm,
        "group_norm": pointwise.group_norm,
        "matmul mm bmm rmatmul": products.matmul,
        "addmm baddbmm": products.addmm,
        "einsum": products.einsum,
        "scaled_dot_product_attention": products.attention,
        "multi_head_attention_forward": products.multi_head,
        "embedding": products.embedding,
        "view reshape flatten unflatten ravel _unsafe_view view_as reshape_as": shape.reshape,
        "expand expand_as broadcast_to": shape.expand,
        "broadcast_tensors": shape.broadcast,
        "repeat tile": shape.repeat,
        "repeat_interleave": shape.repeat_interleave,
        "permute": shape.permute,
        "transpose swapaxes swapdims": shape.transpose,
        "t get:T get:mT adjoint get:H": shape.turned,
        "movedim moveaxis": shape.movedim,
        "unsqueeze": shape.unsqueeze,
        "squeeze": shape.squeeze,
        "cat concat concatenate": join.cat,
        "stack": join.stack,
        "chunk tensor_split split split_with_sizes unsafe_split unsafe_chunk": join.split,
        "unbind iter": join.unbind,
        "select": join.select,
        "narrow": join.narrow,
        "glu": join.glu,
        "getitem": join.getitem,
        "index_select": join.index_select,
        "gather take_along_dim topk sort argsort": join.along,
        "flip": join.flip,
        "roll": join.roll,
        "pad": join.pad,
        "pixel_shuffle": join.pixel_shuffle,
        "pixel_unshuffle": join.pixel_unshuffle,
        "channel_shuffle": join.channel_shuffle,
        "unfold im2col": join.unfold,
    }
)

_known: dict[Any, tuple[str, Rule | None]] = {}


def rule_of(func: Any) -> tuple[str, Rule | None]:
    """The plain name of a torch function or tensor method, and its rule; None where it says nothing of channels."""
    found = _known.get(func)
    if found is None:
        name = _plain_name(func)
        if name == "setitem":
            found = (name, pointwise.nothing)
        else:
            found = (name, None if name in _SILENT else _RULES.get(name, pointwise.unknown))
        _known[func] = found
    return found


def _plain_name(func: Any) -> str:
    name = str(getattr(func, "__name__", type(func).__name__))
    if name in ("__get__", "__set__"):
        return f"get:{getattr(func.__self__, '__name__', '')}" if name == "__get__" else "__set__"
    if name in _SILENT or name in _RULES:
        return name
    bare = name.strip("_")
    if name.startswith("__") and bare not in _RULES and bare.startswith(("i", "r")) and bare[1:] in _RULES:
        return bare[1:]
    # An overload of a registered operator is called "name.overload".
    return bare.partition(".")[0]


def works_in_place(func: Any) -> bool:
    """Whether a tensor method changes its tensor: `add_`, `__iadd__`."""
    name = str(getattr(func, "__name__", ""))
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")
