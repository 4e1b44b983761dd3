"""Which back end is taken on a machine with a GPU, by stand-ins: no test here needs one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from compressor.latency import assemble, local
from compressor.latency.backends import gpu as backends
from compressor.latency.backends.gpu import OrtGpu, TensorRt, Trtexec, device_of
from compressor.latency.converted import in_precision
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.request import Turns
from compressor.pruning.space import PruningSpace
from compressor.recipe import parse_recipe
from compressor.run.measure import timed_on_device
from compressor.run.onnx_files import DENSE
from export.device import here
from export.device.here import Backend, available_backends, gpu_backend
from export.engine.cuda import Device
from export.errors import ExportError
from tests.export.device.fake_trtexec import make_trtexec
from tests.latency.test_local_gpu import gpu_table

RTX4090 = Device("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, 2520, "13.0")
HOPPER = Device("NVIDIA H100", "9.0", 80 << 30, 1980, "13.0")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("COMPRESSOR_BACKEND", raising=False)
    monkeypatch.delenv("TRTEXEC", raising=False)
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(here, "USUAL", tmp_path / "none")
    gpu_backend.cache_clear()
    yield
    gpu_backend.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what is on this machine: its GPU, Python modules with versions, and ONNX Runtime's providers."""

    def put(gpu: Device | None, *providers: str, **modules: str) -> None:
        def load(name: str) -> tuple[None, SimpleNamespace]:
            if name not in modules:
                raise ExportError(f"{name} is not installed.")
            return None, SimpleNamespace(version=modules[name])

        ort = SimpleNamespace(get_available_providers=lambda: list(providers), __version__="1.23.0")
        monkeypatch.setattr(here, "find_device", lambda: gpu)
        monkeypatch.setattr(here, "load", load)
        monkeypatch.setattr(here, "runtime", lambda: ort)
        gpu_backend.cache_clear()

    return put


def test_no_gpu_answers(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(None, "CUDAExecutionProvider", "TensorrtExecutionProvider", tensorrt="10.3.0")
    assert gpu_backend() is None
    assert parse_recipe({"model": "resnet18"}, "test").resolved().precision == "fp32"
    monkeypatch.setenv("COMPRESSOR_BACKEND", "tensorrt")
    gpu_backend.cache_clear()
    with pytest.raises(ExportError, match=r"COMPRESSOR_BACKEND=tensorrt cannot be used: no GPU was found"):
        gpu_backend()


def test_the_order(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everything = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    installed(RTX4090, *everything, tensorrt="10.3.0", tensorrt_rtx_bindings="1.7.0")
    assert gpu_backend() == Backend("tensorrt", "10.3.0", RTX4090)
    assert parse_recipe({"model": "resnet18"}, "test").resolved().precision == "fp16"
    assert [*available_backends(RTX4090)] == [
        "tensorrt", "tensorrt_rtx_bindings", "onnxruntime-tensorrt", "onnxruntime-cuda"
    ]  # fmt: skip
    installed(RTX4090, *everything, tensorrt_rtx_bindings="1.7.0")
    assert gpu_backend() == Backend("tensorrt_rtx_bindings", "1.7.0", RTX4090)
    installed(HOPPER, *everything, tensorrt_rtx_bindings="1.7.0")  # TensorRT-RTX does not build for it
    assert gpu_backend() == Backend("onnxruntime-tensorrt", "1.23.0", HOPPER)
    installed(HOPPER, "CUDAExecutionProvider", "CPUExecutionProvider")
    assert gpu_backend() is None  # without TensorRT it is the CPU, unless CUDA is named
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cuda")
    gpu_backend.cache_clear()
    assert gpu_backend() == Backend("onnxruntime-cuda", "1.23.0", HOPPER)
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    gpu_backend.cache_clear()
    assert gpu_backend() is None
    monkeypatch.setenv("TRTEXEC", str(make_trtexec(tmp_path / "bin", "10.3.0")))
    monkeypatch.delenv("COMPRESSOR_BACKEND")
    installed(HOPPER, *everything)
    assert gpu_backend() == Backend("trtexec", "10.3.0", HOPPER)


def test_one_class_each() -> None:
    kinds = {
        kind: type(device_of(Backend(kind, "1", HOPPER), "fp16"))
        for kind in (*here.RUNTIMES, *here.PROVIDERS)
    }
    assert kinds == {
        "tensorrt": TensorRt, "trtexec": Trtexec, "tensorrt_rtx_bindings": TensorRt,
        "onnxruntime-tensorrt": OrtGpu, "onnxruntime-cuda": OrtGpu,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_falls_back_is_refused(space: PruningSpace, example: Tensor) -> None:
    network = assemble.export_candidate(space, space.rank(), example, space.min_widths)
    with pytest.raises(ExportError, match=r"cannot use it here|CUDAExecutionProvider"):
        OrtGpu("CUDAExecutionProvider", "fp32").measure(network, 0.1)


def test_trtexec_here(space: PruningSpace, example: Tensor, tmp_path: Path) -> None:
    network = assemble.export_candidate(space, space.rank(), example, space.min_widths)
    device = Trtexec(make_trtexec(tmp_path / "bin", "10.3.0", rule="named"), "fp16")
    times = device.measure(network, 0.5)
    assert times.operators_ms.shape == (1, len(space.layers))
    assert times.median_ms == pytest.approx(0.05 + 0.9 * times.operators_ms.sum(), rel=1e-3)
    layers = device.layers(network)
    assert [("Reformatting" in name, "@" in name) for name, _ in layers][:2] == [(True, False), (False, True)]
    assert sum(ms for _, ms in layers) == pytest.approx(times.operators_ms.sum(), rel=1e-3)
    broken = Trtexec(make_trtexec(tmp_path / "bad", "10.3.0", fail="build"), "fp16")
    with pytest.raises(ExportError, match=r"cannot measure the network: .*Could not find any implementation"):
        broken.measure(network, 0.5)


class _Rule:
    """Takes a launch for each operator and a time for its channels; does not tell operators apart."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        import onnx

        graph = onnx.load_model_from_string(network.model).graph
        shapes = [tuple(item.dims) for item in graph.initializer if len(item.dims) >= 2]
        total = 0.02 + sum(0.01 + 1e-6 * np.prod(shape) for shape in shapes)
        return NetworkTimes(np.full(11, total), np.zeros((0, network.operators)))


def test_a_table_of_the_gpu_says_what_it_is(
    space: PruningSpace, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[_Rule] = []
    monkeypatch.setattr(local, "device_of", lambda backend, precision, streams: made.append(_Rule()) or made[-1])
    backend = Backend("tensorrt_rtx_bindings", "1.7.0", RTX4090)
    table = gpu_table(space, example, backend, "fp16", time_limit_s=0.0)
    fields = table.fields
    assert (fields.device.name, fields.device.sku, fields.device.compute_capability) == (
        "local",
        RTX4090.name,
        "8.9",
    )
    assert (fields.runtime.name, fields.runtime.version, fields.precision) == (
        "tensorrt-rtx",
        "1.7.0",
        "fp16",
    )
    assert fields.device.clocks == "GPU at most 2520 MHz"
    assert "by a fit" in fields.protocol
    assert table.covers(space)
    assert gpu_table(space, example, backend, "fp16").to_json() == table.to_json()
    assert len(made) == 2  # the second came from the cache, after a look at the dense network
    newer = Backend("tensorrt_rtx_bindings", "1.8.0", RTX4090)
    gpu_table(space, example, newer, "fp16", time_limit_s=0.0)
    assert len(made) == 3
    assert backends.CPU == "onnxruntime-cpu"


def test_a_gpu_times_what_is_delivered(
    space: PruningSpace, example: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed: list[bytes] = []

    class Device:
        def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
            timed.append(network.model)
            return NetworkTimes(np.full(9, float(len(timed))), np.zeros((0, 0)))

    monkeypatch.setattr(here, "gpu_backend", lambda: Backend("tensorrt", "10.3.0", RTX4090))
    monkeypatch.setattr(local, "device_of", lambda backend, precision, streams: Device())
    network = assemble.export_candidate(space, space.rank(), example, space.min_widths).model
    for name in (DENSE, "model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(network)
    delivered = in_precision(network, "fp16")
    (tmp_path / "model.fp16.onnx").write_bytes(b"as delivered")
    recipe = parse_recipe({"model": "resnet18", "precision": "fp16", "contract": {"repeats": 1}}, "test")
    data = SimpleNamespace(input_shape=(3, 16, 16))
    job: Any = SimpleNamespace(recipe=recipe, data=data, space=space, table=None)
    run: Any = SimpleNamespace(file=lambda name: tmp_path / name)
    found = timed_on_device(run, job, tmp_path / "model.onnx", Turns(repeats=1))
    dense, slim = found.dense, found.slim
    assert timed == [delivered, b"as delivered"]
    assert (dense.median_ms, slim.median_ms, slim.version) == (1.0, 2.0, "10.3.0")
