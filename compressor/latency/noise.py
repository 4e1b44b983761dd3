"""Timing on a shared machine: selects undisturbed runs and checks the processor's speed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.convert.ort import CPU, runtime
from export.engine.bench import OnnxRunner

Floats = npt.NDArray[np.float64]

INTERRUPTED = 0.05
"""A run whose wall time exceeds the thread's CPU time by this share was interrupted."""


def timed(runner: OnnxRunner, runs: int) -> Floats:
    """Time runs; returns milliseconds (runs, 2): wall-clock time and the thread's CPU time."""
    times = np.empty((runs, 2))
    for run in range(runs):
        wall, own = time.perf_counter_ns(), time.thread_time_ns()
        runner.run()
        times[run] = time.perf_counter_ns() - wall, time.thread_time_ns() - own
    return times / 1e6


SLOWED = 0.15
"""A run that exceeds the fastest tenth by this share ran at a lower processor speed."""


def undisturbed(times: Floats) -> Floats:
    """Select the runs that no other process interrupted or slowed down.

    Another process on the same core, or one that fills the shared cache, interrupts no run but lengthens all runs for
    seconds at a time. It never shortens a run.

    Args:
        times: (runs, 2): wall-clock time and the thread's CPU time, from `timed`.

    Returns:
        Wall times of the runs for which both clocks agree, without those at a lower speed. If hardly any run is
        left, the CPU times, which exclude time spent in other processes.
    """
    wall, own = times[:, 0], times[:, 1]
    alone = wall <= own * (1 + INTERRUPTED)
    kept = np.asarray(wall[alone] if alone.sum() >= max(3, len(wall) // 5) else own)
    return np.asarray(kept[at_full_speed(kept)])


def at_full_speed(times: Floats) -> npt.NDArray[np.bool_]:
    """Return a mask (runs,) of the times that exceed the fastest tenth by no more than `SLOWED`."""
    return np.asarray(times <= (1 + SLOWED) * np.quantile(times, 0.1))


def middle(values: Floats) -> float:
    """Return the mean of the middle half: as robust as the median, but finer than a clock's whole microseconds."""
    return float(middles(values[:, None])[0])


def middles(values: Floats) -> Floats:
    """Return the `middle` of each column, (columns,) from (runs, columns)."""
    ordered = np.sort(values, axis=0)
    quarter = len(ordered) // 4
    return np.asarray(ordered[quarter : len(ordered) - quarter].mean(axis=0))


class ProcessorSpeed:
    """Compares the processor's present speed with the fastest seen so far, by two small fixed networks.

    A processor slows down for seconds at a time when its clock drops or another process uses the same core. Memory
    slows down when other processes use it. No run is interrupted then, but all are slow. One network computes from
    the inner caches, the other reads 19 MB of weights.
    """

    PROBES = ((64, 64, 16, 40), (512, 1024, 2, 10))
    """(input channels, output channels, pixels per side, runs) of the two 3x3 convolutions."""

    def __init__(self, threads: int) -> None:
        self._runners = [OnnxRunner(convolution(*shape), threads=threads) for *shape, _ in self.PROBES]
        for runner in self._runners:
            runner.warm_up(0.02)
        self._best = [float("inf")] * len(self._runners)

    def slowdown(self) -> float:
        """Measure the slowdown: 0 at the fastest speed seen so far, 0.1 where runs take a tenth longer."""
        slowest = 0.0
        for place, (runner, (*_, runs)) in enumerate(zip(self._runners, self.PROBES, strict=True)):
            now = float(np.median(undisturbed(timed(runner, runs))))
            self._best[place] = min(self._best[place], now)
            slowest = max(slowest, now / self._best[place] - 1.0)
        return slowest


def convolution(channels_in: int, channels_out: int, pixels: int) -> bytes:
    """Return an ONNX network of one 3x3 convolution on pixels x pixels, to probe ONNX Runtime."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((channels_out, channels_in, 3, 3), 0.01, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels_in, pixels, pixels])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels_out, pixels, pixels])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def channel_block() -> int:
    """Return the channel block of ONNX Runtime's convolutions on this CPU: 16 with AVX-512, 8 with AVX2.

    It is read from the optimised form of a convolution with four output channels, whose weights are padded to a block.
    It is 1 where the runtime has no blocked convolutions for this CPU.
    """
    import onnx

    onnxruntime = runtime()
    with tempfile.TemporaryDirectory(prefix="compressor-block-") as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(convolution(3, 4, 8), options, providers=list(CPU))
        optimised = onnx.load(str(path))
    padded = max(
        (int(item.dims[0]) for item in optimised.graph.initializer if len(item.dims) == 4), default=4
    )
    return padded if padded > 4 else 1
