"""What this machine can do at its best: the peaks that an operator's time is held against.

Measured through ONNX Runtime itself in about two seconds: multiply-adds of large convolutions and a large product of
matrices, bytes of tensors of several sizes that are read and written once, and what an operator costs that
hardly computes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.latency.noise import convolution, timed, undisturbed
from compressor.latency.ort_profile import profiled_runs
from export.engine.bench import OnnxRunner

if TYPE_CHECKING:
    from compressor.latency.schema import RooflineFields

COMPUTE = ((256, 256, 28), (512, 512, 14))
"""(input channels, output channels, pixels) of the 3x3 convolutions whose multiply-adds are counted."""

TENSOR_KB = (128, 1024, 8192, 49152)
"""Sizes of the tensors that are read and written: within the inner caches up to far beyond the outer one."""

CHAINS = (8, 40)
"""Operators in the two chains of tiny ones: what the longer takes more is the start of an operator."""


@dataclass(frozen=True)
class Machine:
    """Peaks of a device.

    Attributes:
        macs_per_ms: Multiply-adds in a millisecond.
        sizes: Bytes of a transfer, ascending.
        bytes_per_ms: Bytes moved in a millisecond by transfers of these sizes.
        launch_ms: What an operator costs besides its work.
        how: Where the numbers come from, in words.
    """

    macs_per_ms: float
    sizes: tuple[float, ...]
    bytes_per_ms: tuple[float, ...]
    launch_ms: float
    how: str

    def compute_ms(self, macs: float) -> float:
        """The least time of so many multiply-adds."""
        return macs / self.macs_per_ms

    def transfer_ms(self, count: float, among: float | None = None) -> float:
        """The least time of moving `count` bytes that are part of `among`, which decides the cache they come from."""
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
        how=f"measured here with {threads} thread(s): the fastest of two large 3x3 convolutions and a product of "
        f"matrices, tensors of {TENSOR_KB[0]} kB to {TENSOR_KB[-1] // 1024} MB read and written once, and a chain of "
        "tiny convolutions",
    )


def estimated_machine(fields: RooflineFields, device: str) -> Machine:
    """The peaks that an estimated table gives a device: they too are estimates."""
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
    """The time of the only kernel that bears the work, without the runtime's own costs around it."""
    runs = profiled_runs(model, threads, 15)
    return float(np.median([sum(kernel["dur"] for kernel in run) for run in runs])) / 1e3


def _product(size: int) -> bytes:
    return _model("MatMul", [size, size], [size, size])


def _copy(elements: int) -> bytes:
    """Reads `elements` 4-byte numbers and writes as many."""
    return _model("Neg", [1, elements], None)


def _model(op: str, shape: Sequence[int], weight: Sequence[int] | None) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    constants = (
        [numpy_helper.from_array(np.full(weight, 0.01, dtype=np.float32), "w")] if weight is not None else []
    )
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *(item.name for item in constants)], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    return _bytes(graph)


def _chain(count: int) -> bytes:
    """`count` convolutions of 16 channels on one pixel."""
    from onnx import TensorProto, helper, numpy_helper

    shape = [1, 16, 1, 1]
    weights = [
        numpy_helper.from_array(np.full((16, 16, 1, 1), 0.01, dtype=np.float32), f"w{place}")
        for place in range(count)
    ]
    nodes = [helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"]) for i in range(count)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("t0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"t{count}", TensorProto.FLOAT, shape)],
        weights,
    )
    return _bytes(graph)


def _bytes(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
