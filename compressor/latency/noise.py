"""Timing on a machine that others use too: which runs count, and whether the processor was itself meanwhile."""

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
"""A run whose wall time exceeds the thread's own time by this share was interrupted."""


def timed(runner: OnnxRunner, runs: int) -> Floats:
    """(runs, 2): milliseconds on the wall's clock and on the thread's own."""
    times = np.empty((runs, 2))
    for run in range(runs):
        wall, own = time.perf_counter_ns(), time.thread_time_ns()
        runner.run()
        times[run] = time.perf_counter_ns() - wall, time.thread_time_ns() - own
    return times / 1e6


SLOWED = 0.15
"""A run that takes longer than the fastest tenth of them by this share met a slower processor than they did."""


def undisturbed(times: Floats) -> Floats:
    """The runs that no other process interrupted or slowed down.

    A neighbour on the same core, or one that fills the shared cache, interrupts nothing and makes all runs longer for
    seconds at a time; it never makes one shorter.

    Args:
        times: (runs, 2): wall clock and the thread's own clock, as `timed` gives them.

    Returns:
        The wall times of the runs for which both clocks agree, without those at a lower speed. Where hardly any was
        left alone, the times on the thread's own clock, which stands still while another process runs.
    """
    wall, own = times[:, 0], times[:, 1]
    alone = wall <= own * (1 + INTERRUPTED)
    kept = np.asarray(wall[alone] if alone.sum() >= max(3, len(wall) // 5) else own)
    return np.asarray(kept[at_full_speed(kept)])


def at_full_speed(times: Floats) -> npt.NDArray[np.bool_]:
    """Which of these times (runs,) are no longer than the fastest tenth by more than `SLOWED`."""
    return np.asarray(times <= (1 + SLOWED) * np.quantile(times, 0.1))


def middle(values: Floats) -> float:
    """The mean of the middle half: as steady as a median, without sticking to a clock's whole microseconds."""
    return float(middles(values[:, None])[0])


def middles(values: Floats) -> Floats:
    """`middle` of each column, (columns,) from (runs, columns)."""
    ordered = np.sort(values, axis=0)
    quarter = len(ordered) // 4
    return np.asarray(ordered[quarter : len(ordered) - quarter].mean(axis=0))


class Pace:
    """How fast the processor is now against the fastest it was seen, by two small networks that are always the same.

    A processor slows down for seconds at a time, when its clock falls or a neighbour on the same core is busy, and its
    memory does when others use it; no run is then interrupted, and all are slow. One network computes from the inner
    caches, the other reads 19 MB of weights.
    """

    PROBES = ((64, 64, 16, 40), (512, 1024, 2, 10))
    """(input channels, output channels, pixels, runs) of the two 3x3 convolutions."""

    def __init__(self, threads: int) -> None:
        self._runners = [OnnxRunner(convolution(*shape), threads=threads) for *shape, _ in self.PROBES]
        for runner in self._runners:
            runner.warm_up(0.02)
        self._best = [float("inf")] * len(self._runners)

    def slowdown(self) -> float:
        """0 where the processor is as fast as it was ever seen, 0.1 where it takes a tenth longer."""
        slowest = 0.0
        for place, (runner, (*_, runs)) in enumerate(zip(self._runners, self.PROBES, strict=True)):
            now = float(np.median(undisturbed(timed(runner, runs))))
            self._best[place] = min(self._best[place], now)
            slowest = max(slowest, now / self._best[place] - 1.0)
        return slowest


def convolution(channels_in: int, channels_out: int, pixels: int) -> bytes:
    """An ONNX network of one 3x3 convolution on pixels x pixels, for probing ONNX Runtime."""
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
    """Channels that ONNX Runtime's convolutions compute at once on this CPU: 16 with AVX-512, 8 with AVX2.

    Found without a clock: the optimised form of a convolution with four output channels has its weights padded to a
    block. 1 where the runtime has no blocked convolutions for this CPU.
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
