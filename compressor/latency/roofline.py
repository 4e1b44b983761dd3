"""Estimated latency by a roofline model of each operator, for devices without measurements.

An operator's time is the longer of two: its arithmetic at the share of peak throughput that its kind reaches, and its
memory traffic at the reached share of peak bandwidth (Williams, Waterman and Patterson, "Roofline", 2009). A launch
overhead that does not depend on the width is added. Small operators are therefore bound by launches, and halving a
network's arithmetic does not halve its latency. The constants are fitted to published latencies
(benchmarks/latency_estimated_tables.py). The results are estimates and are labelled as such everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.core.errors import CompressorError
from compressor.latency.non_gemm import count_non_gemm
from compressor.latency.schema import RooflineFields
from compressor.pruning.counts import positions_of, weight_elements

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

Floats = npt.NDArray[np.float64]

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
KINDS = ("spatial", "pointwise", "depthwise", "linear")
"""Kinds of operators that reach different shares of the peak."""

SOFTNESS = 4.0
"""Exponent of the smooth maximum of arithmetic time and memory time."""


@dataclass(frozen=True)
class Operators:
    """Properties of operators that do not depend on channels, one element per operator.

    Attributes:
        kind: Index into `KINDS`.
        taps: Kernel height times width.
        groups, group_size: Groups of the convolution, and channels per group where whole groups are removed, as in
            `Layer`.
        in_pixels, out_pixels: Height times width of input and output; 1 for a vector.
        positions: Number of uses of each weight.
        launches: Kernel launches of the operator and of the non-GEMM operators that `count_non_gemm` assigns to it.
        beside: Elements that these non-GEMM operators move per output channel of the operator.
    """

    kind: npt.NDArray[np.int64]
    taps: Floats
    groups: Floats
    group_size: Floats
    in_pixels: Floats
    out_pixels: Floats
    positions: Floats
    launches: Floats
    beside: Floats

    @classmethod
    def of(cls, layers: Sequence[Any], kernels: Floats, beside: Floats) -> Operators:
        """Create the operators of a space's layers.

        Args:
            layers: Objects with kind, kernel, groups, group_size, in_hw and out_hw.
            kernels: Number of non-GEMM kernels of each layer, from `count_non_gemm`.
            beside: Elements that these move, divided by the layer's output channels.
        """
        taps = [float(np.prod(layer.kernel)) if layer.kernel else 1.0 for layer in layers]
        return cls(
            kind=np.asarray(
                [_kind(layer.kind, tap) for layer, tap in zip(layers, taps, strict=True)], dtype=np.int64
            ),
            taps=np.asarray(taps),
            groups=np.asarray([float(layer.groups or 1) for layer in layers]),
            group_size=np.asarray([float(layer.group_size) for layer in layers]),
            in_pixels=np.asarray([float(np.prod(layer.in_hw)) for layer in layers]),
            out_pixels=np.asarray([float(np.prod(layer.out_hw)) for layer in layers]),
            positions=np.asarray(
                [float(positions_of(layer.kind, layer.in_hw, layer.out_hw)) for layer in layers]
            ),
            launches=1.0 + kernels,
            beside=beside,
        )

    def work(self, c_in: Floats, c_out: Floats, block: int) -> tuple[Floats, Floats]:
        """Return computed multiply-adds (channels padded to `block`) and elements moved, both (N, operators)."""
        whole = (self.groups == 1) & (self.group_size == 0)  # kernels of grouped convolutions do not pad to blocks
        padded_in, padded_out = (
            np.where(whole, np.ceil(count / block) * block, count) for count in (c_in, c_out)
        )
        macs = self.positions * weight_elements(
            self.taps, padded_in, padded_out, self.groups, self.group_size
        )
        weights = weight_elements(self.taps, c_in, c_out, self.groups, self.group_size)
        moved = weights + c_in * self.in_pixels + c_out * (self.out_pixels + self.beside)
        return macs, moved


def operator_ms(
    work: tuple[Floats, Floats],
    operators: Operators,
    *,
    tflops: float,
    bandwidth_gbs: float,
    element_bytes: int,
    efficiency: Floats,
    bandwidth_efficiency: float,
    launch_ms: float,
) -> Floats:
    """Return the milliseconds of each operator, (N, operators); `efficiency` has one element for each of `KINDS`."""
    macs, moved = work
    compute = 2e3 * macs / (tflops * 1e12 * efficiency[operators.kind])
    memory = 1e3 * moved * element_bytes / (bandwidth_gbs * 1e9 * bandwidth_efficiency)
    return np.asarray(
        (compute**SOFTNESS + memory**SOFTNESS) ** (1 / SOFTNESS) + launch_ms * operators.launches
    )


def roofline_operators(
    fields: RooflineFields, precision: str, space: PruningSpace
) -> Callable[[Floats, Floats], Floats]:
    """The operators' times of a space, as `LatencyCurve` asks for them; never decreasing in any width."""
    operators = operators_of(space)
    efficiency = np.asarray([fields.efficiency[name] for name in KINDS])

    def milliseconds(c_in: Floats, c_out: Floats) -> Floats:
        return operator_ms(
            operators.work(c_in, c_out, fields.block),
            operators,
            tflops=fields.tflops,
            bandwidth_gbs=fields.bandwidth_gbs,
            element_bytes=ELEMENT_BYTES[precision],
            efficiency=efficiency,
            bandwidth_efficiency=fields.bandwidth_efficiency,
            launch_ms=fields.launch_ms,
        )

    return milliseconds


def operators_of(space: PruningSpace) -> Operators:
    """Return a space's operators, with the non-GEMM kernels of its network."""
    model, dense = space.model, np.asarray(space.dense_widths)[None]
    was_training = model.training
    model.eval()
    try:
        kernels, moved = count_non_gemm(lambda: model(*space.example_input), len(space.layers))
    finally:
        model.train(was_training)
    outputs = np.asarray([float(layer.out_channels(dense)[0]) for layer in space.layers])
    return Operators.of(space.layers, kernels, moved / outputs)


def _kind(kind: str, taps: float) -> int:
    if kind == "linear":
        return KINDS.index("linear")
    if kind == "depthwise":
        return KINDS.index("depthwise")
    if kind in ("conv", "grouped", "conv_transpose"):
        return KINDS.index("pointwise" if taps == 1 else "spatial")
    raise CompressorError(
        f"No estimate is known for operators of the kind {kind!r}.",
        "Use --device local, or a budget in --flops or --params.",
    )
