"""Timing on this machine, which may be shared: its processor, its speed at present, and which runs are undisturbed."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from compressor.core.versions import cpu_name
from export.convert.ort import CPU, runtime
from export.engine.bench import OnnxRunner, together

Floats = npt.NDArray[np.float64]

INTERRUPTED = 0.05
"""A run whose wall time exceeds the thread's CPU time by this share was interrupted."""

SLOWED = 0.15
"""A run that exceeds the fastest tenth by this share ran at a lower processor speed."""


def timed(runner: OnnxRunner, runs: int) -> Floats:
    """Time runs; returns milliseconds (runs, 2): wall-clock time and the thread's CPU time."""
    times = np.empty((runs, 2))
    for run in range(runs):
        wall, own = time.perf_counter_ns(), time.thread_time_ns()
        runner.run()
        times[run] = time.perf_counter_ns() - wall, time.thread_time_ns() - own
    return times / 1e6


def timed_together(runners: Sequence[OnnxRunner], runs: int) -> Floats:
    """Time `runs` runs of each of several networks that run at the same time; (networks * runs, 2) as `timed`."""
    return np.concatenate(together(runners, lambda runner: timed(runner, runs)))


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


class Noise(NamedTuple):
    """How far times of one network on this machine differ by what else it does.

    Attributes:
        spread: Distance of the quartiles of the medians of bursts, as a share of their median.
        interrupted: Share of the runs that another process interrupted.
        seconds: How long it was observed.
    """

    spread: float
    interrupted: float
    seconds: float


def noise(seconds: float = 3.0) -> Noise:
    """Time a small fixed network in bursts for some seconds, with one thread."""
    runner = OnnxRunner(convolution(64, 64, 16), threads=1)
    runner.warm_up(0.1)
    began, bursts = time.monotonic(), [timed(runner, 20)]
    while len(bursts) < 10 or time.monotonic() < began + seconds:
        bursts.append(timed(runner, 20))
    medians = np.asarray([np.median(burst[:, 0]) for burst in bursts])
    low, half, high = np.quantile(medians, [0.25, 0.5, 0.75])
    every = np.concatenate(bursts)
    interrupted = np.mean(every[:, 0] > every[:, 1] * (1 + INTERRUPTED))
    return Noise(float((high - low) / half), float(interrupted), time.monotonic() - began)


def convolution(channels_in: int, channels_out: int, pixels: int) -> bytes:
    """Return an ONNX network of one 3x3 convolution on pixels x pixels, to probe ONNX Runtime."""
    from onnx import helper

    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    shapes = [1, channels_in, pixels, pixels], [1, channels_out, pixels, pixels]
    return probe([node], *shapes, w=(channels_out, channels_in, 3, 3))


def probe(nodes: Sequence[Any], given: Sequence[int], returned: Sequence[int], **weights: Sequence[int]) -> bytes:
    """Return an ONNX network of nodes from `x` to `y` with these shapes, and weights of these shapes."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        list(nodes),
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, returned)],
        [numpy_helper.from_array(np.full(shape, 0.01, dtype=np.float32), name) for name, shape in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@functools.cache
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


def cpu_model() -> str:
    """Return the processor's name and core count, such as `Intel(R) Xeon(R) Processor, 2 cores`."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def governor() -> str:
    """Return the CPU frequency governor, such as `performance`; empty if the system does not report it."""
    try:
        return (
            Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
        )
    except OSError:
        return ""


def clocks() -> str:
    """Return the range of the processor's clock, or its present clock; empty if the system reports neither."""
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    try:
        low, high = (
            int((folder / f"cpuinfo_{end}_freq").read_text(encoding="ascii")) // 1000
            for end in ("min", "max")
        )
        return f"{low}-{high} MHz"
    except (OSError, ValueError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return ""
    return f"{max(found):.0f} MHz" if found else ""
