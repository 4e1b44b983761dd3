"""The layers of a recorded network whose weights can be refitted: how they read their input, and what follows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.pruning.moves import Moves
from compressor.pruning.replay import Call, Recording, Value

CONVOLUTIONS = {f"conv{rank}d": rank for rank in (1, 2, 3)}
DROPOUT = ("dropout", "dropout2d", "dropout3d")
TRANSPOSED = {f"conv_transpose{rank}d": rank for rank in (1, 2, 3)}


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input: `rank` spatial axes (0 for a linear layer), and the arguments of the convolution."""

    rank: int
    transposed: bool
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, call: Call, weight: Tensor) -> Geometry:
        """Read the geometry from a recorded call."""
        if call.name == "linear":
            return cls(0, False, 1, (), (), (), (), ())
        rank = weight.dim() - 2
        transposed = call.name in TRANSPOSED
        kernel = tuple(weight.shape[2:])
        stride = _each(call.arg(3, "stride", 1), rank)
        dilation = _each(call.arg(7 if transposed else 5, "dilation", 1), rank)
        groups = int(call.arg(6, "groups", 1))
        padding = call.arg(4, "padding", 0)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same":
            before = tuple(r // 2 for r in reach)
            after = tuple(r - r // 2 for r in reach)
        else:
            before = after = _each(0 if padding == "valid" else padding, rank)
        if transposed:
            # A transposed convolution is a convolution of the input with zeros between its elements.
            extra = _each(call.arg(5, "output_padding", 0), rank)
            before = tuple(r - b for r, b in zip(reach, before, strict=True))
            after = tuple(b + e for b, e in zip(before, extra, strict=True))
        return cls(rank, transposed, groups, kernel, stride, before, after, dilation)

    def with_groups(self, groups: int) -> Geometry:
        """Return the geometry of a layer that lost whole groups."""
        return replace(self, groups=groups)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as (groups, p, o)."""
        if self.transposed:
            parts = weight.reshape(self.groups, -1, *weight.shape[1:])  # (g, i, o, *k)
            parts = parts.flip(tuple(range(3, parts.dim()))) if self.rank else parts
            return parts.flatten(3).transpose(2, 3).flatten(1, 2)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).transpose(1, 2)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Inverse of `matrix`."""
        if self.transposed:
            shape = (self.groups, like.shape[0] // self.groups, math.prod(self.kernel), like.shape[1])
            parts = matrix.reshape(shape).transpose(2, 3).reshape(*shape[:2], like.shape[1], *self.kernel)
            return parts.flip(tuple(range(3, parts.dim()))).reshape(like.shape)
        return matrix.transpose(1, 2).reshape(like.shape)

    def patches(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Return the inputs of output positions, (groups, n, p); of all positions, or of those with numbers `places`.

        The order of positions is that of `rows`.
        """
        if not self.rank:
            flat = x.reshape(-1, x.shape[-1])
            return (flat if places is None else flat[places])[None]
        if self.transposed:
            x = _spaced(x, self.stride)
        if any(self.before) or any(self.after):
            amounts = [each for pair in zip(self.before, self.after, strict=True) for each in pair]
            x = F.pad(x, [each for i in reversed(range(self.rank)) for each in amounts[2 * i : 2 * i + 2]])
        stride = (1,) * self.rank if self.transposed else self.stride
        for axis, (k, s, d) in enumerate(zip(self.kernel, stride, self.dilation, strict=True)):
            x = x.unfold(axis + 2, d * (k - 1) + 1, s)[..., ::d]
        count, channels = x.shape[:2]
        space = tuple(x.shape[2 : 2 + self.rank])
        if places is not None:
            index: tuple[Any, ...] = (slice(None), slice(None), *torch.unravel_index(places, space))
            x = x[index]
        else:
            x = x.flatten(2, 1 + self.rank)
        x = x.reshape(count, self.groups, channels // self.groups, x.shape[2], -1)
        return x.permute(1, 0, 3, 2, 4).reshape(self.groups, count * x.shape[3], -1)

    def rows(self, y: Tensor, places: Tensor | None = None) -> Tensor:
        """Return the outputs at the same positions, (groups, n, o)."""
        if not self.rank:
            flat = y.reshape(-1, y.shape[-1])
            return (flat if places is None else flat[places])[None]
        y = y.flatten(2)
        y = y if places is None else y[:, :, places]
        return y.reshape(y.shape[0], self.groups, -1, y.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)

    @property
    def taps(self) -> int:
        """Number of kernel positions; 1 for a linear layer."""
        return math.prod(self.kernel)

    def positions(self, y: Tensor) -> int:
        """Return the number of output positions of one image; of the whole batch for a linear layer."""
        return y.shape[:-1].numel() if not self.rank else y.shape[2:].numel()


def _each(value: Any, rank: int) -> tuple[int, ...]:
    items = (value,) * rank if isinstance(value, int) else tuple(int(each) for each in value)
    return items * rank if len(items) == 1 < rank else items


def _spaced(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Insert zeros between the elements of the spatial axes."""
    wide = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return wide


@dataclass(frozen=True)
class Norm:
    """Names of the tensors of a batch norm in eval mode; None for those that it lacks."""

    mean: str
    variance: str
    weight: str | None
    bias: str | None
    eps: float

    def affine(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return its scale and shift, (C,), float64."""
        scale = (tensors[self.variance].double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * tensors[self.weight].double()
        shift = -tensors[self.mean].double() * scale
        return scale, shift if self.bias is None else shift + tensors[self.bias].double()


@dataclass(frozen=True)
class Site:
    """A call of a layer whose weights can be refitted.

    Args:
        number: Of the call in the recording.
        weight, bias: Names of its parameters.
        source: Value that it reads.
        norm: The batch norm after it.
        constant: Name of the tensor that holds the fitted constant: the bias, or the mean of the batch norm.
        end: Number of the call whose result is fitted: the layer, its batch norm or the addition.
        shortcut: The other operand of the addition that ends its residual branch.
        path: Numbers of the calls before this addition that move the elements of the output, see `moves`.
        gain: Name of the parameter that scales the channels there (layer scale).
        limits: Values at which the activation after it cuts.
    """

    number: int
    weight: str
    bias: str | None
    source: int
    geometry: Geometry
    norm: Norm | None
    constant: str | None
    end: int
    shortcut: int | None
    path: tuple[int, ...]
    gain: str | None
    limits: tuple[float, float] | None

    @property
    def layer(self) -> str:
        """Name of the layer, as `PruningSpace.layers` has it."""
        return layer_of(self.weight)

    @property
    def axis(self) -> int:
        """Axis of the output's channels."""
        return 1 if self.geometry.rank else -1


def layer_of(weight: str) -> str:
    """Return the name of a layer from that of its weight: "conv1.weight", "attention.in_proj_weight"."""
    return weight.removesuffix("weight").rstrip("._")


def shortcuts_first(recording: Recording) -> list[int]:
    """Move the calls of each shortcut before the last layer of its branch, in place; returns the order of calls."""
    order = list(range(len(recording.calls)))
    additions: list[Call] = []
    for layer in [call for call in recording.calls if _is_layer(call)]:
        number = recording.calls.index(layer)
        after = _after(recording, number)
        if after.shortcut is None or recording.calls[after.end] in additions:
            continue
        additions.append(recording.calls[after.end])
        if recording.maker.get(after.shortcut, -1) > number:
            moved = recording.hoisted(after.shortcut, number)
            if moved is not None:
                recording.order(moved)
                order = [order[each] for each in moved]
    return order


def find_sites(recording: Recording) -> tuple[list[Site], dict[str, str]]:
    """Return the layers that can be refitted in order of execution, and layer -> reason for others."""
    uses: dict[str, int] = {}
    for call in recording.calls:
        for name in _parameters(recording, call):
            uses[name] = uses.get(name, 0) + 1
    sites, left = [], {}
    for number, call in enumerate(recording.calls):
        if not _is_layer(call):
            continue
        weight, source, bias = call.arg(1, "weight"), call.arg(0, "input"), call.arg(2, "bias")
        names = [recording.names.get(id(each)) for each in (weight, bias) if isinstance(each, Tensor)]
        if names and names[0] is not None and any(name is None or uses[name] > 1 for name in names):
            left[layer_of(names[0])] = "several calls share its parameters"
        elif names and names[0] is not None and isinstance(source, Value) and not isinstance(bias, Value):
            after = _after(recording, number)
            if after.shortcut is not None and recording.maker.get(after.shortcut, -1) > number:
                after = _after(recording, number, additions=False)
            own = names[1] if len(names) > 1 else None
            norm = after.norm
            held = norm.mean if norm is not None and uses[norm.mean] == 1 else None
            found = (names[0], own, source.index, Geometry.of(call, weight), norm, own or held)
            sites.append(
                Site(number, *found, after.end, after.shortcut, after.path, after.gain, after.limits)
            )
    return sites, left


def _is_layer(call: Call) -> bool:
    return call.name == "linear" or call.name in CONVOLUTIONS or call.name in TRANSPOSED


def _parameters(recording: Recording, call: Call) -> list[str]:
    given = (*call.args, *call.kwargs.values())
    return [recording.names[id(each)] for each in given if isinstance(each, Tensor) and id(each) in recording.names]


@dataclass(frozen=True)
class _After:
    """What follows a layer; the names are those of `Site`."""

    norm: Norm | None = None
    end: int = 0
    shortcut: int | None = None
    path: tuple[int, ...] = ()
    gain: str | None = None
    limits: tuple[float, float] | None = None


def _after(recording: Recording, number: int, additions: bool = True) -> _After:
    """Follow a layer's output: its batch norm, what moves it, the addition, and the activation's limits.

    What moves and scales the output belongs to the fit only if an addition follows.
    """
    found, moved = _After(end=number), Moves(recording, number)
    value, at = recording.calls[number].outs[0], number
    while (following := recording.only_reader(value, at)) is not None:
        call = recording.calls[following]
        if call.name == "batch_norm" and found.norm is None and found.shortcut is None and not moved.path:
            norm = _norm(recording, call)
            if norm is None:
                break
            found = replace(found, norm=norm, end=following)
        elif call.name == "add" and additions and found.shortcut is None and len(call.args) == 2 and not call.kwargs:
            others = [each.index for each in call.args if isinstance(each, Value) and each.index != value]
            if len(others) != 1 or not moved.whole or moved.shape != call.shapes[0]:
                break
            found = replace(found, end=following, shortcut=others[0], path=tuple(moved.path), gain=moved.gain)
        elif call.name in DROPOUT:
            if not moved.path:
                found = replace(found, end=following)
        elif found.shortcut is not None or not moved.follow(following, value):
            return found if moved.path and found.shortcut is None else replace(found, limits=_limits(call))
        value, at = call.outs[0], following
    return found


def _limits(call: Call) -> tuple[float, float] | None:
    if call.name in ("relu", "relu6"):
        return 0.0, math.inf if call.name == "relu" else 6.0
    if call.name == "hardtanh":
        return float(call.arg(1, "min_val", -1.0)), float(call.arg(2, "max_val", 1.0))
    return None


def _norm(recording: Recording, call: Call) -> Norm | None:
    given = (call.arg(place, name) for place, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1))
    mean, variance, weight, bias = (None if each is None else recording.names.get(id(each)) for each in given)
    if mean is None or variance is None or call.arg(5, "training", False):
        return None
    return Norm(mean, variance, weight, bias, float(call.arg(7, "eps", 1e-5)))
