"""Peak rates of this machine, against which an operator's time is compared.

They are measured through ONNX Runtime in about two seconds: multiply-adds of large convolutions and of a large matrix
product, bandwidth of tensors of several sizes that are read and written once, and the overhead of an operator with
hardly any work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor.latency.backends.cpu import profiled_runs
from compressor.latency.machine import convolution, probe, timed, undisturbed
from export.engine.bench import OnnxRunner

if TYPE_CHECKING:
    from compressor.latency.schema import RooflineFields


COMPUTE = ((256, 256, 28), (512, 512, 14))
"""(input channels, output channels, pixels per side) of the 3x3 convolutions that measure the compute peak."""

TENSOR_KB = (128, 1024, 8192, 49152)
"""Tensor sizes of the bandwidth measurement: from within the inner caches to far beyond the last-level cache."""

CHAINS = (8, 40)
"""Lengths of the two chains of tiny operators: the difference of their times gives the overhead per operator."""


@dataclass(frozen=True)
class Machine:
    """Peak rates of a device.

    Attributes:
        macs_per_ms: Multiply-adds per millisecond.
        sizes: Transfer sizes in bytes, ascending.
        bytes_per_ms: Bytes per millisecond for transfers of these sizes.
        launch_ms: Overhead per operator, in milliseconds.
        how: Origin of the numbers, as text.
    """

    macs_per_ms: float
    sizes: tuple[float, ...]
    bytes_per_ms: tuple[float, ...]
    launch_ms: float
    how: str

    def compute_ms(self, macs: float) -> float:
        """Return the minimum time of this many multiply-adds."""
        return macs / self.macs_per_ms

    def transfer_ms(self, count: float, among: float | None = None) -> float:
        """Return the minimum time of moving `count` bytes.

        Args:
            count: Bytes moved.
            among: Bytes of the working set, which determines the cache level; None for `count`.
        """
        if count <= 0:
            return 0.0
        size = count if among is None else max(among, count)
        speed = np.interp(np.log(size), np.log(self.sizes), self.bytes_per_ms)
        return float(count / speed)


def calibrate(threads: int = 1) -> Machine:
    """Measure this machine through ONNX Runtime."""
    speeds = [
        c_in * c_out * 9 * pixels**2 / _median_ms(convolution(c_in, c_out, pixels), threads)
        for c_in, c_out, pixels in COMPUTE
    ]
    speeds.append(512**3 / _median_ms(_product(512), threads))
    sizes = [2.0 * 1024 * kilobytes for kilobytes in TENSOR_KB]
    moved = [size / _kernel_ms(_copy(int(size) // 8), threads) for size in sizes]
    short, long = (_median_ms(_chain(count), threads) for count in CHAINS)
    launch = max((long - short) / (CHAINS[1] - CHAINS[0]), 1e-4)
    return Machine(
        macs_per_ms=max(speeds),
        sizes=tuple(sizes),
        bytes_per_ms=tuple(moved),
        launch_ms=launch,
        how=f"measured here with {threads} thread(s): the fastest of two large 3x3 convolutions and a matrix "
        f"product, tensors of {TENSOR_KB[0]} kB to {TENSOR_KB[-1] // 1024} MB read and written once, and a chain of "
        "tiny convolutions",
    )


def estimated_machine(fields: RooflineFields, device: str) -> Machine:
    """Return the peak rates of an estimated table; they are estimates too."""
    reached = max(fields.efficiency.values())
    return Machine(
        macs_per_ms=fields.tflops * reached / 2 * 1e9,
        sizes=(1.0, 1e12),
        bytes_per_ms=(fields.bandwidth_gbs * fields.bandwidth_efficiency * 1e6,) * 2,
        launch_ms=fields.launch_ms,
        how=f"estimated for {device}, not measured",
    )


def _median_ms(model: bytes, threads: int) -> float:
    runner = OnnxRunner(model, threads=threads)
    once = runner.warm_up(0.05)
    runs = int(np.clip(150 / once, 7, 200))
    return float(np.median(undisturbed(timed(runner, runs))))


def _kernel_ms(model: bytes, threads: int) -> float:
    """Return the time of the one kernel that does the work, without the runtime's overhead around it."""
    runs = profiled_runs(model, threads, 15)
    return float(np.median([sum(kernel["dur"] for kernel in run) for run in runs])) / 1e3


def _product(size: int) -> bytes:
    from onnx import helper

    return probe([helper.make_node("MatMul", ["x", "w"], ["y"])], [size, size], [size, size], w=(size, size))


def _copy(elements: int) -> bytes:
    """Return a network that reads `elements` 4-byte numbers and writes as many."""
    from onnx import helper

    return probe([helper.make_node("Neg", ["x"], ["y"])], [1, elements], [1, elements])


def _chain(count: int) -> bytes:
    """Return a network of `count` convolutions with 16 channels on one pixel."""
    from onnx import helper

    names = ["x", *(f"t{place}" for place in range(1, count)), "y"]
    nodes = [helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]]) for i in range(count)]
    weights = {f"w{place}": (16, 16, 1, 1) for place in range(count)}
    return probe(nodes, [1, 16, 1, 1], [1, 16, 1, 1], **weights)
