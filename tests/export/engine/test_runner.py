"""The engine runner's calls, with a dict for the GPU's memory and ONNX Runtime for the engine."""

from __future__ import annotations

import enum
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export.convert.ort import onnx_outputs
from export.convert.to_onnx import export_onnx
from export.engine import cuda, engine
from export.engine.cuda import Device, Driver, find_device
from export.engine.engine import build_engine
from export.engine.runner import EngineRunner
from export.engine.trt import Messages
from export.errors import ExportError
from tests.export.engine.fake_trt import make_module
from tests.export.nets import SmallNet

ORIN = Device("Orin", "8.7", 8 << 30, 1020, "12.6")
INPUTS = np.random.default_rng(2).standard_normal((3, 3, 16, 16)).astype(np.float32)


LIVE: set[str] = set()
"""The objects of TensorRT that exist."""


class FakeDriver:
    """The calls of `Driver`, with bytes in a dict for memory and a clock of 2 ms a run."""

    def __init__(self) -> None:
        self.memory: dict[int, bytes] = {}
        self.handles: set[int] = set()
        self.closed = 0
        self.numbers = itertools.count(1)
        self.recorded: dict[int, float] = {}
        self.clock = 0.0

    def device(self) -> Device:
        return ORIN

    def allocate(self, size: int) -> int:
        address = next(self.numbers) << 8
        self.memory[address] = bytes(size)
        return address

    def close(self) -> None:
        assert not LIVE  # what TensorRT holds goes first
        self.memory.clear()
        self.handles.clear()
        self.closed += 1

    def upload(self, address: int, array: Any) -> None:
        assert len(self.memory[address]) == array.nbytes
        self.memory[address] = array.tobytes()

    def download(self, array: Any, address: int) -> None:
        array[...] = np.frombuffer(self.memory[address], array.dtype).reshape(array.shape)

    def stream(self) -> int:
        self.handles.add(next(self.numbers))
        return max(self.handles)

    event = stream

    def synchronise(self, stream: int) -> None:
        pass

    def record(self, event: int, stream: int) -> None:
        self.recorded[event] = self.clock

    def reached(self, event: int) -> bool:
        return True

    def elapsed_ms(self, start: int, end: int) -> float:
        return self.recorded[end] - self.recorded[start]


SHAPES = {"input": (1, 3, 16, 16), "output": (1, 10)}


def with_runtime(
    module: Any, driver: FakeDriver, net: Path, *, loads: bool = True, runs: bool = True, **types: str
) -> Any:
    """Give the stand-in module a runtime whose engine computes with ONNX Runtime."""

    class TensorIOMode(enum.Enum):
        NONE, INPUT, OUTPUT = range(3)

    class Living:
        def __init__(self) -> None:
            LIVE.add(type(self).__name__)

        def __del__(self) -> None:
            LIVE.discard(type(self).__name__)

    class Context(Living):
        def __init__(self) -> None:
            super().__init__()
            self.addresses: dict[str, int] = {}

        def set_tensor_address(self, name: str, address: int) -> None:
            self.addresses[name] = address

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return SHAPES[name]

        def execute_async_v3(self, stream: int) -> bool:
            if not runs:
                return False
            given = np.frombuffer(driver.memory[self.addresses["input"]], np.float32).reshape(1, 3, 16, 16)
            driver.memory[self.addresses["output"]] = onnx_outputs(net, given)[0].tobytes()
            driver.clock += 2.0
            return True

    class Engine(Living):
        num_io_tensors = 2

        def get_tensor_name(self, index: int) -> str:
            return ("input", "output")[index]

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode.INPUT if name == "input" else TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return SHAPES[name]

        def get_tensor_dtype(self, name: str) -> Any:
            return SimpleNamespace(name=types.get(name, "FLOAT"))

        def create_execution_context(self) -> Context:
            return Context()

    class Runtime(Living):
        def __init__(self, logger: Any) -> None:
            super().__init__()
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            if not loads:
                self.logger.log(1, "Serialization (Version tag does not match.\n Note: Current Version: 240)")
            return Engine() if loads else None

    module.TensorIOMode, module.Runtime = TensorIOMode, Runtime
    return module


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    monkeypatch.setattr(engine, "find_device", lambda: ORIN)
    monkeypatch.setattr(Messages, "_loggers", {})
    module = make_module("10.3.0.30")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    net = tmp_path / "net.onnx"
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), net)
    build_engine(net, tmp_path / "net.engine", module="tensorrt")
    return net, module


def test_runs_and_measures(built: tuple[Path, Any]) -> None:
    net, module = built
    driver = FakeDriver()
    with_runtime(module, driver, net)
    with EngineRunner(net.with_suffix(".engine"), driver=driver) as runner:
        assert (runner.inputs, runner.outputs) == (["input"], ["output"])
        assert np.array_equal(runner.run_batches(INPUTS), onnx_outputs(net, INPUTS)[0])
        stats = runner.measure(warmup_s=0.0, duration_s=0.0)
        assert (stats.median_ms, stats.runs, stats.runtime, stats.version) == (2.0, 10, "tensorrt", "10.3.0.30")
        with pytest.raises(ExportError, match=r"Input input has the shape \[1, 3, 16, 16\], got \[1, 3, 8, 8\]"):
            runner.run({"input": np.zeros((1, 3, 8, 8))})
        with pytest.raises(ExportError, match="got nothing"):
            runner.run({})
        assert (len(driver.memory), len(driver.handles), len(LIVE)) == (2, 3, 3)
    assert (driver.memory, driver.handles, LIVE, driver.closed) == ({}, set(), set(), 1)


def test_several_contexts_run_at_the_same_time(built: tuple[Path, Any]) -> None:
    """Each has a stream and memory of its own, and starts again when its run has ended."""
    net, module = built
    driver = FakeDriver()
    with_runtime(module, driver, net)
    with EngineRunner(net.with_suffix(".engine"), driver=driver, streams=2) as runner:
        stats = runner.measure(warmup_s=0.0, duration_s=0.0)
        assert (stats.median_ms, stats.runs, stats.batch, stats.streams) == (2.0, 10, 1, 2)
        assert stats.inputs_per_s == pytest.approx(1000.0)
        assert (len(driver.memory), len(driver.handles)) == (4, 6)
        assert np.array_equal(runner.run_batches(INPUTS), onnx_outputs(net, INPUTS)[0])
    assert (driver.memory, LIVE) == ({}, set())
    with pytest.raises(ExportError, match="takes batches of 1, not of 2"):
        EngineRunner(net.with_suffix(".engine"), driver=driver, batch=2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"loads": False}, "cannot load"),
        ({"output": "FLOAT8"}, "a tensor output of the unknown type FLOAT8"),
        ({"runs": False}, "cannot run net.engine"),
    ],
)
def test_everything_is_freed_after_an_exception(built: tuple[Path, Any], how: Any, message: str) -> None:
    net, module = built
    driver = FakeDriver()
    with_runtime(module, driver, net, **how)
    def run() -> None:
        with EngineRunner(net.with_suffix(".engine"), driver=driver) as runner:
            runner.times_ms(warmup_s=0.0, duration_s=0.0)

    with pytest.raises(ExportError, match=message):
        run()
    assert (driver.memory, driver.handles, LIVE, driver.closed) == ({}, set(), set(), 1)


def test_an_engine_that_does_not_load(built: tuple[Path, Any]) -> None:
    net, module = built
    driver = FakeDriver()
    with_runtime(module, driver, net, loads=False)
    with pytest.raises(ExportError, match=r"cannot load .*net\.engine: Serialization \(Version tag does not"):
        EngineRunner(net.with_suffix(".engine"), driver=driver)


def test_an_engine_of_another_version(built: tuple[Path, Any]) -> None:
    net, module = built
    module.__version__ = "10.13.2.6"
    with pytest.raises(ExportError, match=r"built with version 10\.3\.0\.30; this machine has TensorRT 10\.13\.2\.6"):
        EngineRunner(net.with_suffix(".engine"), driver=FakeDriver())


CREATED = {
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease_v2", "cuMemAlloc_v2": "cuMemFree_v2",
    "cuStreamCreate": "cuStreamDestroy_v2", "cuEventCreate": "cuEventDestroy_v2",
}  # fmt: skip


class FakeLibrary:
    """The driver's library for what `Driver` asks it; `fails` names a call that returns an error."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.held: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.fails:
                return 100
            if name in CREATED:
                self.held.append(CREATED[name])
            elif name in self.held:
                self.held.remove(name)
            if name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            elif name == "cuDeviceTotalMem_v2":
                arguments[0]._obj.value = 8 << 30
            elif name == "cuDriverGetVersion":
                arguments[0]._obj.value = 12060
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 7, 13: 1_020_000}[arguments[1]]
            elif name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_NO_DEVICE"
            return 0

        return call


def test_the_driver_describes_its_device() -> None:
    assert Driver(FakeLibrary()).device() == ORIN
    with pytest.raises(ExportError, match=r"refused cuInit: error 100 \(CUDA_ERROR_NO_DEVICE\)"):
        Driver(FakeLibrary(fails="cuInit"))


def test_an_event_is_reached_or_not_yet() -> None:
    for result, reached in ((0, True), (600, False)):
        library = FakeLibrary()
        library.cuEventQuery = lambda *_, result=result: result
        assert Driver(library).reached(1) is reached
    with pytest.raises(ExportError, match="refused cuEventQuery: error 100"):
        Driver(FakeLibrary(fails="cuEventQuery")).reached(1)


def test_the_driver_frees_what_it_allocated() -> None:
    library = FakeLibrary()

    def use() -> None:
        with Driver(library) as driver:
            driver.allocate(100)
            driver.stream()
            driver.event()
            assert sorted(library.held) == sorted(CREATED.values())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        use()
    assert library.held == []
    failing = FakeLibrary(fails="cuCtxSetCurrent")
    with pytest.raises(ExportError, match="refused cuCtxSetCurrent"):
        Driver(failing)
    assert failing.held == []


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARIES", ("libno-such-driver.so",))
    assert find_device() is None
    with pytest.raises(ExportError, match="No NVIDIA driver was found"):
        Driver()
