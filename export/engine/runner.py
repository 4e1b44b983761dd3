"""Loads, runs and times an engine.

It needs only TensorRT, numpy and the GPU's driver, and uses only API names that TensorRT 8.5 to 11 and TensorRT-RTX
share.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.ort import padded
from export.engine.bench import LatencyStats, summarise
from export.engine.cuda import Driver
from export.engine.engine_info import EngineInfo, read_sidecar, require_loadable
from export.engine.trt import Messages, load
from export.errors import ExportError
from export.files import read_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

WARMUP_S = 2.0
DURATION_S = 15.0
MIN_RUNS = 10

_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


class _Lane:
    """An execution context with its stream, and its own memory on the GPU for inputs and outputs."""

    def __init__(self) -> None:
        self.context: Any = None
        self.memory: dict[str, int] = {}
        self.stream = self.started = self.ended = 0  # the latter two are events


class EngineRunner:
    """A loaded engine on the GPU of this machine; on exit, it and its memory are freed.

        with EngineRunner("model.engine") as runner:
            outputs = runner.run_batches(inputs)

    Args:
        engine_path: The engine file, with its description beside it.
        driver: The GPU's driver, which the runner closes; None opens it.
        streams: Execution contexts, each with a stream of its own, that are timed at the same time.
        batch: Batch of an engine with an open one; None for the usual one of its profile.

    Attributes:
        batch: Inputs of one run.

    Raises:
        ExportError: the engine or its description is missing or damaged, it was built for another GPU or version,
            or TensorRT refuses it; or it has an open batch and several streams are requested, for which it would need
            as many profiles.
    """

    def __init__(
        self, engine_path: str | Path, *, driver: Any = None, streams: int = 1, batch: int | None = None
    ) -> None:
        path = Path(engine_path)
        self.info: EngineInfo = read_sidecar(path)
        trt, self.flavour = load(self.info.module)
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._lanes: list[_Lane] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self._runtime: Any = None
        self._engine: Any = None
        self._streams, self._wanted = streams, batch
        self.driver = driver if driver is not None else Driver()
        try:
            self._load(trt, path)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any, path: Path) -> None:
        require_loadable(self.info, self.flavour, self.driver.device())
        self._messages = Messages(trt, self.flavour.module)
        # no local variables: the traceback of an error would keep what `close` frees
        self._runtime = trt.Runtime(self._messages.logger)
        if self.info.settings.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(read_bytes(path, "engine"))
        for _ in range(self._streams):
            self._lanes.append(_Lane())
            if self._engine is not None:
                self._lanes[-1].context = self._engine.create_execution_context()
            if self._lanes[-1].context is None:
                reason = self._messages.last_error()
                raise ExportError(f"{self.flavour.title} cannot load {path}: {reason}.", "Build it again.")
            self._lanes[-1].stream = self.driver.stream()
            self._place_tensors(trt, self._lanes[-1])
        self.batch = self.shape(self.inputs[0])[0] if self.inputs and self.shape(self.inputs[0]) else 1

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the execution context, the engine, the GPU's memory, streams and events, and the driver's context."""
        for lane in self._lanes:  # the traceback of an error may still hold them
            lane.context = None
        self._engine = self._runtime = None  # in this order: each is created from the next
        self.driver.close()

    def _place_tensors(self, trt: Any, lane: _Lane) -> None:
        """Allocate memory for each input and output of a context."""
        import numpy as np

        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            self._choose_shape(lane, name)
        for name in names:
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in _TYPES:
                raise ExportError(f"{self.info.engine} has a tensor {name} of the unknown type {kind}.")
            array = np.zeros(tuple(lane.context.get_tensor_shape(name)), dtype=_TYPES[kind])
            lane.memory[name] = self.driver.allocate(array.nbytes)
            lane.context.set_tensor_address(name, lane.memory[name])
            if name not in self._host:
                self._host[name] = array
                (self.inputs if name in inputs else self.outputs).append(name)

    def _choose_shape(self, lane: _Lane, name: str) -> None:
        """Give an input with dynamic dimensions the usual size of its profile, or the wanted batch."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            if self._wanted is not None and shape[:1] != (self._wanted,):
                raise ExportError(f"{self.info.engine} takes batches of {shape[0]}, not of {self._wanted}.")
            return
        if self._streams > 1:
            raise ExportError(
                f"{self.info.engine} has an open batch, and runs in one stream only.", "Build one with a fixed batch."
            )
        least, usual, most = (tuple(each) for each in self._engine.get_tensor_profile_shape(name, 0))
        size = usual[0] if self._wanted is None else self._wanted
        if not least[0] <= size <= most[0]:
            raise ExportError(f"{self.info.engine} takes batches of {least[0]} to {most[0]}, not of {size}.")
        lane.context.set_input_shape(name, (size, *usual[1:]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an input or output."""
        return tuple(self._host[name].shape)

    def load_inputs(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy the inputs to the GPU.

        Raises:
            ExportError: an input is missing or has another shape.
        """
        import numpy as np

        for name in self.inputs:
            here = self._host[name]
            if name not in feeds or tuple(feeds[name].shape) != here.shape:
                given = list(feeds[name].shape) if name in feeds else "nothing"
                raise ExportError(f"Input {name} has the shape {list(here.shape)}, got {given}.")
            here[...] = np.asarray(feeds[name]).astype(here.dtype)
            for lane in self._lanes:
                self.driver.upload(lane.memory[name], here)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run once and return copies of the outputs, in the engine's order.

        Raises:
            ExportError: an input does not fit, or the run fails.
        """
        lane = self._lanes[0]
        self.load_inputs(feeds)
        self.run_once()
        for name in self.outputs:
            self.driver.download(self._host[name], lane.memory[name])
        return [self._host[name].copy() for name in self.outputs]

    def run_batches(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Compute the first output for any number of inputs (N, C, H, W), in batches of the engine's size."""
        import numpy as np

        name = self.inputs[0]
        size = self.shape(name)[0]
        chunks = (inputs[start : start + size] for start in range(0, len(inputs), size))
        return np.concatenate([self.run({name: padded(chunk, size)})[0][: len(chunk)] for chunk in chunks])

    def run_once(self) -> None:
        """Run once with the inputs that are loaded, and wait for the end."""
        self._enqueue(self._lanes[0])
        self.driver.synchronise(self._lanes[0].stream)

    def load_noise(self) -> None:
        """Copy random inputs to the GPU."""
        import numpy as np

        generator = np.random.default_rng(0)
        self.load_inputs({name: generator.standard_normal(self.shape(name)) for name in self.inputs})

    def _enqueue(self, lane: _Lane) -> None:
        if not lane.context.execute_async_v3(lane.stream):
            reason = self._messages.last_error()
            raise ExportError(f"{self.flavour.title} cannot run {self.info.engine}: {reason}.")

    def times_ms(self, *, warmup_s: float = WARMUP_S, duration_s: float = DURATION_S) -> list[float]:
        """Time single runs with CUDA events, without copies of inputs and outputs; return milliseconds.

        With several streams each context starts its next run as soon as its last one has ended, so that every run meets
        the load of the others; the runs of all are returned.
        """
        self.load_noise()
        end = time.perf_counter() + warmup_s
        while time.perf_counter() < end:
            for lane in self._lanes:
                self._enqueue(lane)
            for lane in self._lanes:
                self.driver.synchronise(lane.stream)
        for lane in self._lanes:
            lane.started, lane.ended = self.driver.event(), self.driver.event()
            self._start(lane)
        times: list[float] = []
        end = time.perf_counter() + duration_s
        while len(times) < MIN_RUNS or time.perf_counter() < end:
            for lane in self._lanes:
                if self._ended(lane):
                    times.append(self.driver.elapsed_ms(lane.started, lane.ended))
                    self._start(lane)
        for lane in self._lanes:
            self.driver.synchronise(lane.stream)
        return times

    def _start(self, lane: _Lane) -> None:
        """Enqueue a run between two events."""
        self.driver.record(lane.started, lane.stream)
        self._enqueue(lane)
        self.driver.record(lane.ended, lane.stream)

    def _ended(self, lane: _Lane) -> bool:
        """Whether a context's run has ended; a single one is waited for."""
        if len(self._lanes) > 1:
            return bool(self.driver.reached(lane.ended))
        self.driver.synchronise(lane.stream)
        return True

    def layer_times(self, runs: int = 30) -> list[tuple[str, float]]:
        """Profile the layers: (name, median milliseconds) of each; [] if TensorRT does not report them.

        The runs are separate from `times_ms`, because profiling slows them.
        """
        import statistics

        trt: Any = load(self.info.module)[0]
        seen: dict[str, list[float]] = {}

        class Heard(trt.IProfiler):  # type: ignore[misc]  # the base class comes from the chosen module
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                seen.setdefault(layer_name, []).append(ms)

        self._lanes[0].context.profiler = Heard()
        for _ in range(runs):
            self.run_once()
        return [(name, statistics.median(times)) for name, times in seen.items()]

    def measure(self, *, warmup_s: float = WARMUP_S, duration_s: float = DURATION_S) -> LatencyStats:
        """Measure the latency of one run on the GPU: median, p90 and p99."""
        return self.summarise(self.times_ms(warmup_s=warmup_s, duration_s=duration_s))

    def summarise(self, times_ms: list[float]) -> LatencyStats:
        """Summarise run times of this engine."""
        return summarise(
            times_ms,
            runtime=self.info.module,
            version=self.info.version,
            batch=self.batch,
            streams=len(self._lanes),
        )
