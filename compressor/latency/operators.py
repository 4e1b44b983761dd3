"""Weight-bearing operators: what they cost as functions of their channels, and the keys by which tables know them.

    conv k3x3 s1x1 p1x1 d1x1 g1 in32x32 +relu

Two layers with the same key are the same operator for the runtime and share their measurements. The part after `+`
lists what is computed together with the operator (activation, residual addition, pooling, layout change).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.core.errors import CompressorError
from compressor.pruning.counts import OperatorCost, operator_cost, positions_of

if TYPE_CHECKING:
    from compressor.pruning.counts import Affine
    from compressor.pruning.space import PruningSpace

Floats = npt.NDArray[np.float64]

Widths = npt.NDArray[np.int64]
"""Channels of every group: (G,) for one candidate, (N, G) for many."""

_KEY = re.compile(
    r"(?P<kind>\w+) k(?P<kernel>\d+x\d+) s(?P<stride>\d+x\d+) p(?P<padding>\d+x\d+) d(?P<dilation>\d+x\d+) "
    r"g(?P<groups>\d+|c(?:/\d+)?) in(?P<in_hw>\d+x\d+)(?: n(?P<images>\d+))?(?: \+(?P<epilogue>[\w+]+))?"
)


class Operators:
    """The operators of a network, whose costs `operator_cost` counts; channels and costs are arrays (..., operators).

    Args:
        layers: The operators: layers of a `PruningSpace`, `OpSignature`s, or objects with the same attributes `kind`,
            `kernel`, `groups`, `group_size`, `in_hw`, `out_hw` and `images`.

    Attributes:
        kinds: Kind of each operator, as in `Layer`.
        taps: Kernel height times width of each.
        in_pixels: Pixels of each one's input, those of all its images.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.kinds = tuple(layer.kind for layer in layers)
        self.taps = _floats(np.prod(layer.kernel) if layer.kernel else 1 for layer in layers)
        self.in_pixels = _floats(layer.images * np.prod(layer.in_hw) for layer in layers)
        self._out_pixels = _floats(layer.images * np.prod(layer.out_hw) for layer in layers)
        self._groups = _floats(layer.groups or 1 for layer in layers)
        self._group_size = _floats(layer.group_size for layer in layers)
        self._positions = _floats(
            layer.images * positions_of(layer.kind, layer.in_hw, layer.out_hw) for layer in layers
        )

    @classmethod
    def of_keys(cls, keys: Sequence[str]) -> Operators:
        """Return the operators with these keys; a transposed convolution's output size is not known."""
        return cls([OpSignature.from_key(key) for key in keys])

    @property
    def ungrouped(self) -> npt.NDArray[np.bool_]:
        """Whether each operator reads all input channels for each output, (operators,)."""
        return np.asarray((self._groups == 1) & (self._group_size == 0))

    def cost(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike, beside: npt.ArrayLike = 0.0) -> OperatorCost:
        """Return multiply-adds, weight elements and elements moved.

        Args:
            c_in, c_out: Channels.
            beside: Further elements that are moved for each output channel.
        """
        return operator_cost(
            c_in,
            c_out,
            taps=self.taps,
            positions=self._positions,
            in_pixels=self.in_pixels,
            out_pixels=self._out_pixels + np.asarray(beside),
            groups=self._groups,
            group_size=self._group_size,
        )


def padded(channels: npt.ArrayLike, block: int) -> Floats:
    """Return channel counts, rounded up to whole blocks."""
    return np.asarray(np.ceil(np.asarray(channels) / block) * block)


@dataclass(frozen=True)
class OpSignature:
    """An operator without its channel counts.

    Attributes:
        kind: `conv`, `depthwise`, `grouped`, `linear`, `conv_transpose`, ...
        kernel, stride, padding, dilation: (height, width); (1, 1), (1, 1), (0, 0), (1, 1) for a linear layer.
        groups: Groups of the convolution if their number is the same at all widths, else 0.
        group_size: Input channels per group if these are the same at all widths (1: depthwise), else 0.
        in_hw: Height and width of the input in pixels; (1, 1) for a vector.
        epilogue: ONNX operators computed together with it, in order, joined by `+`; empty if there are none.
        images: Images that it computes for one input of the network.
    """

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    group_size: int
    in_hw: tuple[int, int]
    epilogue: str = ""
    images: int = 1

    @property
    def key(self) -> str:
        """The signature as one line, as in table files."""
        groups = str(self.groups) if self.groups else "c" if self.group_size == 1 else f"c/{self.group_size}"
        line = (
            f"{self.kind} k{_x(self.kernel)} s{_x(self.stride)} p{_x(self.padding)} d{_x(self.dilation)} "
            f"g{groups} in{_x(self.in_hw)}"
        )
        line += f" n{self.images}" if self.images != 1 else ""
        return f"{line} +{self.epilogue}" if self.epilogue else line

    @property
    def out_hw(self) -> tuple[int, int]:
        """Height and width of a convolution's output, with rounding down."""
        size = zip(self.in_hw, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = (
            max(1, (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
            for extent, kernel, stride, padding, dilation in size
        )
        return height, width

    @classmethod
    def from_key(cls, key: str) -> OpSignature:
        """Parse a key.

        Raises:
            CompressorError: The line is not a key.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise CompressorError(
                f"{key!r} is not an operator signature, such as 'conv k3x3 s1x1 p1x1 d1x1 g1 in32x32 +Relu'."
            )
        part = match.groupdict()
        pairs = {name: _pair(part[name]) for name in ("kernel", "stride", "padding", "dilation", "in_hw")}
        whole, _, size = part["groups"].partition("/")
        groups, group_size = (0, int(size or 1)) if whole == "c" else (int(whole), 0)
        return cls(
            kind=part["kind"], groups=groups, group_size=group_size, epilogue=part["epilogue"] or "",
            images=int(part["images"] or 1), **pairs,
        )  # fmt: skip


def signature_of(layer: Any, epilogue: str = "") -> OpSignature:
    """Return the signature of one of a space's layers."""
    return OpSignature(
        kind=layer.kind,
        kernel=_two(layer.kernel, 1),
        stride=_two(layer.stride, 1),
        padding=_two(layer.padding, 0),
        dilation=_two(layer.dilation, 1),
        groups=0 if layer.group_size else int(layer.groups or 1),
        group_size=layer.group_size,
        in_hw=_two(layer.in_hw, 1),
        epilogue=epilogue,
        images=layer.images,
    )


def network_signature(space: PruningSpace) -> str:
    """Return a checksum of the network's layers and of how their channels depend on the groups.

    Two spaces have the same checksum if they have the same operators, input size and groups. It does not depend on
    weights, minimum widths and granularity.
    """

    def terms(channels: Affine) -> list[Any]:
        return [int(channels.constant), sorted([int(group), int(times)] for group, times in channels.terms)]

    layers = [
        [signature_of(layer).key, terms(layer.in_channels), terms(layer.out_channels)] for layer in space.layers
    ]
    groups = [int(group.width) for group in space.groups]
    text = json.dumps([layers, groups], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def channels(space: PruningSpace, widths: Widths) -> tuple[Widths, Widths]:
    """Return input and output channels of every layer: two arrays (N, layers) from widths (N, G).

    Layers of removed blocks have none, if the rows have a column for each block.
    """
    inputs = np.empty((len(widths), len(space.layers)), dtype=np.int64)
    outputs = np.empty_like(inputs)
    for index, layer in enumerate(space.layers):
        inputs[:, index] = layer.in_channels(widths)
        outputs[:, index] = layer.out_channels(widths)
    if widths.shape[1] == len(space.groups):
        return inputs, outputs
    present = space.present(widths)
    return inputs * present, outputs * present


class LatencyCurve:
    """Predicted milliseconds of any candidate of one space.

    Args:
        space: Its layers define how channels follow from widths.
        operators: Milliseconds of each operator from the input and output channels, all (N, layers).
        total: Milliseconds of whole networks (N,) from the sum of the operators' times (N,) and the input and output
            channels, each (N, layers).
    """

    def __init__(
        self,
        space: PruningSpace,
        operators: Callable[[Floats, Floats], Floats],
        total: Callable[[Floats, Floats, Floats], Floats],
    ) -> None:
        self._inputs = _matrix([layer.in_channels for layer in space.layers], len(space.groups))
        self._outputs = _matrix([layer.out_channels for layer in space.layers], len(space.groups))
        self._space, self._operators, self._total = space, operators, total
        self.names: tuple[str, ...] = tuple(layer.name for layer in space.layers)

    def __call__(self, widths: npt.ArrayLike) -> Floats:
        """Milliseconds (N,) from widths (N, G), or from rows that go on with 1 or 0 for each block."""
        c_in, c_out = self._channels(widths)
        return self._total(self._operators(c_in, c_out).sum(axis=1), c_in, c_out)

    def operators(self, widths: npt.ArrayLike) -> Floats:
        """Milliseconds of each operator before the whole-network correction, (N, layers) from (N, G)."""
        return self._operators(*self._channels(widths))

    def _channels(self, widths: npt.ArrayLike) -> tuple[Floats, ...]:
        rows = np.atleast_2d(np.asarray(widths, dtype=np.float64))
        groups = len(self._space.groups)
        counts = tuple(
            rows[:, :groups] @ matrix + constant for matrix, constant in (self._inputs, self._outputs)
        )
        if rows.shape[1] == groups:
            return counts
        present = self._space.present(rows)
        return tuple(count * present for count in counts)


def _matrix(counts: Sequence[Affine], groups: int) -> tuple[Floats, Floats]:
    """Return channel counts as one matrix (G, layers) and one constant (layers,), evaluated faster together."""
    matrix, constant = np.zeros((groups, len(counts))), np.zeros(len(counts))
    for layer, count in enumerate(counts):
        constant[layer] = count.constant
        for group, times in count.terms:
            matrix[group, layer] += times
    return matrix, constant


def _floats(values: Any) -> Floats:
    return np.asarray([float(value) for value in values])


def _x(pair: Sequence[int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def _two(value: Any, default: int) -> tuple[int, int]:
    """Return a height-width pair from a number, a pair, a one-dimensional layer's singleton or None."""
    if value is None or value == ():
        return (default, default)
    if isinstance(value, int):
        return (value, value)
    if len(value) == 1:
        return (int(value[0]), default)
    return (int(value[0]), int(value[1]))
