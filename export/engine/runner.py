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


class EngineRunner:
    """A loaded engine on the GPU of this machine; on exit, it and its memory are freed.

        with EngineRunner("model.engine") as runner:
            outputs = runner.run_batches(inputs)

    Args:
        engine_path: The engine file, with its description beside it.
        driver: The GPU's driver, which the runner closes; None opens it.

    Raises:
        ExportError: the engine or its description is missing or damaged, it was built for another GPU or version,
            or TensorRT refuses it.
    """

    def __init__(self, engine_path: str | Path, *, driver: Any = None) -> None:
        path = Path(engine_path)
        self.info: EngineInfo = read_sidecar(path)
        trt, self.flavour = load(self.info.module)
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._device: dict[str, int] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
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
        self._context = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            reason = self._messages.last_error()
            raise ExportError(f"{self.flavour.title} cannot load {path}: {reason}.", "Build it again.")
        self.stream = self.driver.stream()
        self._place_tensors(trt)

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the execution context, the engine, the GPU's memory, streams and events, and the driver's context."""
        self._context = self._engine = self._runtime = None  # in this order: each is created from the next
        self._device.clear()
        self.driver.close()

    def _place_tensors(self, trt: Any) -> None:
        """Allocate memory for each input and output; dynamic dimensions take the profile's optimum size."""
        import numpy as np

        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            if -1 in tuple(self._engine.get_tensor_shape(name)):
                self._context.set_input_shape(name, tuple(self._engine.get_tensor_profile_shape(name, 0)[1]))
        for name in names:
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in _TYPES:
                raise ExportError(f"{self.info.engine} has a tensor {name} of the unknown type {kind}.")
            array = np.zeros(tuple(self._context.get_tensor_shape(name)), dtype=_TYPES[kind])
            self._host[name] = array
            self._device[name] = self.driver.allocate(array.nbytes)
            self._context.set_tensor_address(name, self._device[name])
            (self.inputs if name in inputs else self.outputs).append(name)

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
            self.driver.upload(self._device[name], here)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run once and return copies of the outputs, in the engine's order.

        Raises:
            ExportError: an input does not fit, or the run fails.
        """
        self.load_inputs(feeds)
        self._enqueue()
        self.driver.synchronise(self.stream)
        for name in self.outputs:
            self.driver.download(self._host[name], self._device[name])
        return [self._host[name].copy() for name in self.outputs]

    def run_batches(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Compute the first output for any number of inputs (N, C, H, W), in batches of the engine's size."""
        import numpy as np

        name = self.inputs[0]
        size = self.shape(name)[0]
        chunks = (inputs[start : start + size] for start in range(0, len(inputs), size))
        return np.concatenate([self.run({name: padded(chunk, size)})[0][: len(chunk)] for chunk in chunks])

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.stream):
            reason = self._messages.last_error()
            raise ExportError(f"{self.flavour.title} cannot run {self.info.engine}: {reason}.")

    def times_ms(self, *, warmup_s: float = WARMUP_S, duration_s: float = DURATION_S) -> list[float]:
        """Time single runs with CUDA events, without copies of inputs and outputs; return milliseconds."""
        import numpy as np

        generator = np.random.default_rng(0)
        self.load_inputs({name: generator.standard_normal(self.shape(name)) for name in self.inputs})
        end = time.perf_counter() + warmup_s
        while time.perf_counter() < end:
            self._enqueue()
            self.driver.synchronise(self.stream)
        first, second = self.driver.event(), self.driver.event()
        times: list[float] = []
        end = time.perf_counter() + duration_s
        while len(times) < MIN_RUNS or time.perf_counter() < end:
            self.driver.record(first, self.stream)
            self._enqueue()
            self.driver.record(second, self.stream)
            self.driver.synchronise(self.stream)
            times.append(self.driver.elapsed_ms(first, second))
        return times

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

        self._context.profiler = Heard()
        for _ in range(runs):
            self._enqueue()
            self.driver.synchronise(self.stream)
        return [(name, statistics.median(times)) for name, times in seen.items()]

    def measure(self, *, warmup_s: float = WARMUP_S, duration_s: float = DURATION_S) -> LatencyStats:
        """Measure the latency of one run on the GPU: median, p90 and p99."""
        times = self.times_ms(warmup_s=warmup_s, duration_s=duration_s)
        return summarise(times, runtime=self.info.module, version=self.info.version)
