"""Replaces operations that the tracing exporter cannot write, or writes wrongly, by equivalent ones.

    with Writable(13, model):
        torch.onnx.export(model, ...)

Sizes are known while a module is traced, but the exporter loses them after some operations, such as padding. Each
rewrite is therefore applied while the module runs: pooling and resizing between two sizes become products with constant
matrices, or windows of constant size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ALWAYS = 1000  # no opset has a form that the exporter can write
Tensor = torch.Tensor


class Writable(TorchFunctionMode):
    """A mode in which operations that the exporter cannot write for `opset` are replaced by equivalent ones.

    Weights that a layer computes only from parameters (weight standardisation, branches fused in forward) become
    constants: the exporter cannot write a convolution with a kernel of unknown shape, and a device should not compute
    them for each input.

    Args:
        opset: Opset of the file.
        model: The traced network.
    """

    def __init__(self, opset: int, model: nn.Module) -> None:
        super().__init__()
        self._opset = opset
        held = [*model.parameters(), *model.buffers()]
        self._held = {id(tensor) for tensor in held}
        self._constant: dict[int, Tensor] = {}  # a reference, so that no other tensor gets its id
        self._sharing: dict[int, list[int]] = {}  # memory -> ids of the constants in it
        self._hold(held)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        constant = all(id(tensor) in self._constant for tensor in _tensors((*args, *kwargs.values())))
        if func in _LAYERS and not constant:
            args = [self._number(value) for value in args]
            kwargs = {name: self._number(value) for name, value in kwargs.items()}
        rewrite, below = _REWRITES.get(func, (None, 0))
        result = NotImplemented
        if rewrite is not None and self._opset < below:
            result = rewrite(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if constant:
            self._hold(_tensors((result,)))
        elif args and isinstance(args[0], Tensor) and _writes(func):
            for key in self._sharing.pop(_storage(args[0]), ()):  # its views, and the tensor that it is a view of
                self._constant.pop(key, None)
        return result

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors that were computed only from parameters."""
        for tensor in tensors:
            self._constant[id(tensor)] = tensor
            self._sharing.setdefault(_storage(tensor), []).append(id(tensor))

    def _number(self, value: Any) -> Any:
        """Turn a tensor that was computed only from parameters into a constant of the file."""
        if id(value) in self._held or id(value) not in self._constant:
            return value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant in the trace is intended
            return torch.from_numpy(value.detach().cpu().numpy().copy())


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument in place."""
    name = str(getattr(func, "__name__", ""))
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor shares with its views."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _wanted(size: Any, given: Sequence[int]) -> tuple[int, ...]:
    """The output sizes of an adaptive pooling: one for all axes or one for each; None is the input's size."""
    sizes = list(size) if isinstance(size, (tuple, list)) else [size] * len(given)
    if len(sizes) == 1:
        sizes *= len(given)
    return tuple(int(own if each is None else each) for each, own in zip(sizes, given))


def _products(x: Tensor, resized: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A separable linear operation on height and width, as two products with constant matrices.

    Args:
        x: (N, C, H, W).
        resized: The operation along one axis of `x`, 2 or 3, on (1, C, size, 2); the result is (1, C, new size, 2).
    """
    rows, columns = (
        # width 2: antialiased resizing is wrong for width 1
        resized(torch.eye(int(x.shape[axis]))[None, :, :, None].repeat(1, 1, 1, 2), axis)[0, :, :, 0]
        for axis in (2, 3)
    )
    return torch.matmul(torch.matmul(rows.T.contiguous(), x), columns)


def _average_pool(x: Tensor, output_size: Any) -> Any:
    given = tuple(int(size) for size in x.shape[2:])
    wanted = _wanted(output_size, given)
    if x.dim() != 4 or wanted == (1, 1):
        return NotImplemented
    if not any(size % part for size, part in zip(given, wanted)):
        return F.avg_pool2d(x, tuple(size // part for size, part in zip(given, wanted)))
    return _products(x, lambda basis, axis: F.adaptive_avg_pool2d(basis, (wanted[axis - 2], 2)))


def _average_pool_1d(x: Tensor, output_size: Any) -> Any:
    if x.dim() != 3:
        return NotImplemented
    (wanted,) = _wanted(output_size, x.shape[2:])
    pooled = _average_pool(x.unsqueeze(3), (wanted, 1))
    return F.adaptive_avg_pool1d(x, 1) if pooled is NotImplemented else pooled.squeeze(3)


def _max_pool(x: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    given = tuple(int(size) for size in x.shape[2:])
    wanted = _wanted(output_size, given)
    if x.dim() != 4 or return_indices or wanted == (1, 1):
        return NotImplemented
    if not any(size % part for size, part in zip(given, wanted)):
        return F.max_pool2d(x, tuple(size // part for size, part in zip(given, wanted)))
    for axis, (size, parts) in enumerate(zip(given, wanted), 2):
        bounds = [(place * size // parts, -(-(place + 1) * size // parts)) for place in range(parts)]
        x = torch.cat(
            [x.narrow(axis, start, end - start).amax(axis, keepdim=True) for start, end in bounds], axis
        )
    return x


def _interpolate(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Area, nearest-exact and antialiased resizing; the exporter can write the other modes."""
    if x.dim() != 4 or not (antialias or mode in ("area", "nearest-exact")):
        return NotImplemented

    def resized(basis: Tensor, axis: int) -> Tensor:
        def own(value: Any, other: float) -> Any:
            each = value[axis - 2] if isinstance(value, (tuple, list)) else value
            return None if value is None else (type(other)(each), other)

        return F.interpolate(
            basis,
            own(size, 2),
            own(scale_factor, 1.0),
            mode,
            align_corners,
            recompute_scale_factor,
            antialias,
        )

    return _products(x, resized)


def _average_pool_divided(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Average pooling with `divisor_override`, which the exporter ignores without an error."""
    if divisor_override is None or ceil_mode:
        return NotImplemented
    height, width = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    return F.avg_pool2d(x, kernel_size, stride, padding) * (height * width / divisor_override)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Convolution with `padding="same"`: ONNX Runtime refuses the exporter's form of it for dilated kernels."""
    if padding != "same":
        return NotImplemented
    kernel = weight.shape[2:]
    steps = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * len(kernel)
    totals = [int(step) * (int(size) - 1) for step, size in zip(steps, kernel)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [part for total in reversed(totals) for part in (total // 2, total - total // 2)])
        totals = [0] * len(totals)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    return convolve(x, weight, bias, stride, tuple(total // 2 for total in totals), dilation, groups)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Instance norm with running statistics, which is a batch norm."""
    if use_input_stats or running_mean is None or running_var is None:
        return NotImplemented
    return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)


def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    channels, height, width = (int(size) for size in x.shape[1:])
    apart = x.reshape(-1, groups, channels // groups, height, width)
    return apart.transpose(1, 2).reshape(-1, channels, height, width)


def _threshold(x: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    return torch.where(x > threshold, x, torch.tensor(float(value)))


def _rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    axes = list(range(-len(normalized_shape), 0))
    least = torch.finfo(x.dtype).eps if eps is None else eps
    scaled = x / (x.pow(2).mean(axes, keepdim=True) + least).sqrt()
    return scaled if weight is None else scaled * weight


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if is_causal or enable_gqa or dropout_p:
        return NotImplemented
    factor = int(query.shape[-1]) ** -0.5 if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if attn_mask is not None:
        hidden = torch.tensor(float("-inf"))
        scores = (
            torch.where(attn_mask, scores, hidden) if attn_mask.dtype == torch.bool else scores + attn_mask
        )
    return torch.matmul(scores.softmax(-1), value)


def _affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Any:
    if len(size) != 4:
        return NotImplemented
    height, width = int(size[2]), int(size[3])
    base = F.affine_grid(
        torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]), [1, 1, height, width], align_corners
    )
    points = torch.cat([base[0].reshape(-1, 2), torch.ones(height * width, 1)], 1)
    return torch.matmul(points, theta.transpose(1, 2)).reshape(-1, height, width, 2)


_LAYERS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
}  # fmt: skip
"""Functions of layers with weights."""

_REWRITES: dict[Any, tuple[Callable[..., Any], int]] = {
    F.adaptive_avg_pool2d: (_average_pool, ALWAYS),
    F.adaptive_avg_pool1d: (_average_pool_1d, ALWAYS),
    F.adaptive_max_pool2d: (_max_pool, ALWAYS),
    F.interpolate: (_interpolate, ALWAYS),
    F.avg_pool2d: (_average_pool_divided, ALWAYS),
    F.conv1d: (_convolution, ALWAYS),
    F.conv2d: (_convolution, ALWAYS),
    F.conv3d: (_convolution, ALWAYS),
    F.instance_norm: (_instance_norm, ALWAYS),
    F.channel_shuffle: (_channel_shuffle, ALWAYS),
    F.threshold: (_threshold, ALWAYS),
    torch.threshold: (_threshold, ALWAYS),
    F.rms_norm: (_rms_norm, ALWAYS),
    F.affine_grid: (_affine_grid, 20),
    F.scaled_dot_product_attention: (_attention, 14),
}
"""Function -> its replacement, and the first opset that does not need it."""
