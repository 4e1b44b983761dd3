"""Signatures of operators without their channel counts: the keys of a latency table's entries.

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
from compressor.pruning import counts

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

Widths = npt.NDArray[np.int64]
"""Channels of every group: (G,) for one candidate, (N, G) for many."""

_KEY = re.compile(
    r"(?P<kind>\w+) k(?P<kernel>\d+x\d+) s(?P<stride>\d+x\d+) p(?P<padding>\d+x\d+) d(?P<dilation>\d+x\d+) "
    r"g(?P<groups>\d+|c(?:/\d+)?) in(?P<in_hw>\d+x\d+)(?: \+(?P<epilogue>[\w+]+))?"
)


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

    @property
    def key(self) -> str:
        """The signature as one line, as in table files."""
        groups = str(self.groups) if self.groups else "c" if self.group_size == 1 else f"c/{self.group_size}"
        line = (
            f"{self.kind} k{_x(self.kernel)} s{_x(self.stride)} p{_x(self.padding)} d{_x(self.dilation)} "
            f"g{groups} in{_x(self.in_hw)}"
        )
        return f"{line} +{self.epilogue}" if self.epilogue else line

    def macs(self, c_in: int, c_out: int) -> float:
        """Return the multiply-adds with these channels; a lower bound if the signature lacks the output size."""
        size = zip(self.in_hw, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out_hw = [
            max(1, (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
            for extent, kernel, stride, padding, dilation in size
        ]
        taps = self.kernel[0] * self.kernel[1]
        weights = counts.weight_elements(taps, c_in, c_out, self.groups, self.group_size)
        return counts.positions_of(self.kind, self.in_hw, out_hw) * float(weights)

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
            kind=part["kind"], groups=groups, group_size=group_size, epilogue=part["epilogue"] or "", **pairs
        )


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
    )


def network_signature(space: PruningSpace) -> str:
    """Return a checksum of the network's layers and of how their channels depend on the groups.

    Two spaces have the same checksum if they have the same operators, input size and groups. It does not depend on
    weights, minimum widths and granularity.
    """
    layers = [
        [signature_of(layer).key, _affine(layer.in_channels), _affine(layer.out_channels)]
        for layer in space.layers
    ]
    groups = [int(group.width) for group in space.groups]
    text = json.dumps([layers, groups], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def channels(space: PruningSpace, widths: Widths) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return input and output channels of every layer: two arrays (N, layers) from widths (N, G)."""
    layers = space.layers
    inputs = np.empty((len(widths), len(layers)), dtype=np.int64)
    outputs = np.empty_like(inputs)
    for index, layer in enumerate(layers):
        inputs[:, index] = layer.in_channels(widths)
        outputs[:, index] = layer.out_channels(widths)
    return inputs, outputs


def weight_elements(
    keys: Sequence[str],
) -> Callable[[npt.ArrayLike, npt.ArrayLike], npt.NDArray[np.float64]]:
    """Return a function (c_in, c_out), each (N, operators), -> number of weight elements of the network, (N,).

    Args:
        keys: The signature of each operator.
    """
    signatures = [OpSignature.from_key(key) for key in keys]
    taps = np.asarray([float(each.kernel[0] * each.kernel[1]) for each in signatures])
    groups = np.asarray([each.groups for each in signatures])
    sizes = np.asarray([each.group_size for each in signatures])

    def elements(c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.asarray(counts.weight_elements(taps, c_in, c_out, groups, sizes).sum(axis=-1))

    return elements


def _affine(function: Any) -> list[Any]:
    return [int(function.constant), sorted([int(group), int(times)] for group, times in function.terms)]


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
