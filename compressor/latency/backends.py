"""The GPU backends that `export.device.here` finds on this machine, as devices that time networks.

Backends that report layer times also time the operators.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressor.latency.fused import shares_of_layers
from compressor.latency.ort_profile import Device, NetworkTimes, TaggedNetwork
from compressor.latency.remote_bundle import Precision, in_precision, weighted_nodes
from export.convert.onnx_header import parse_header
from export.device.bundle import Target, write_bundle
from export.device.here import CPU, PROVIDERS, TRTEXEC, USUAL, Backend, find_trtexec
from export.device.results import read_results
from export.engine.bench import OnnxRunner
from export.engine.cuda import find_device
from export.engine.trt import RTX
from export.errors import ExportError

_ONE = "network"


def device_of(backend: Backend, precision: Precision) -> Device:
    """Return the device that measures networks with this backend in this precision."""
    if backend.kind == TRTEXEC:
        return Trtexec(find_trtexec() or USUAL, precision)
    if backend.kind in PROVIDERS:
        return OrtGpu(PROVIDERS[backend.kind], precision)
    return TensorRt(backend.kind, precision)


class TensorRt:
    """TensorRT, or TensorRT-RTX, through its Python module.

    Args:
        module: `tensorrt` or `tensorrt_rtx_bindings`.
        precision: Precision to run in; networks are given in FP32 and converted.
    """

    def __init__(self, module: str, precision: Precision) -> None:
        self.module, self.precision = module, precision

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Build an engine, time it with GPU events, then profile its layers."""
        from export.engine.engine import build_engine
        from export.engine.runner import EngineRunner

        with tempfile.TemporaryDirectory(prefix="compressor-engine-") as folder:
            path, engine = Path(folder) / "network.onnx", Path(folder) / "network.engine"
            path.write_bytes(in_precision(network.model, self.precision, _shape(network)))
            capability = None
            if self.module == RTX and (gpu := find_device()) is not None:
                capability = gpu.compute_capability
            build_engine(path, engine, module=self.module, compute_capability=capability)
            with EngineRunner(engine) as runner:
                times = runner.times_ms(warmup_s=seconds / 4, duration_s=seconds)
                layers = runner.layer_times() if network.operators else []
        return NetworkTimes(np.asarray(times), _operators(layers, network))


class Trtexec:
    """trtexec on this machine, run by the same script that remote devices receive.

    Args:
        program: Path of trtexec.
        precision: Precision to run in; networks are given in FP32 and converted.
    """

    def __init__(self, program: Path, precision: Precision) -> None:
        self.program, self.precision = program, precision

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Write a bundle with this one network and run it on this machine."""
        with tempfile.TemporaryDirectory(prefix="compressor-trtexec-") as name:
            folder = Path(name) / "bundle"
            content = in_precision(network.model, self.precision, _shape(network))
            target = Target("", "GPU", "", 8, 20, True, 0)
            profile = network.operators > 0
            write_bundle(folder, [(_ONE, content)], target=target, profile=profile)
            duration = str(max(1, round(seconds)))
            done = subprocess.run(
                ["sh", str(folder / "run.sh"), "--duration", duration, "--warmup", "1", "--processes", "1"],
                env={**os.environ, "TRTEXEC": str(self.program)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode not in (0, 1):
                lines = done.stderr.strip().splitlines() or [f"its script ended with {done.returncode}"]
                raise ExportError(f"trtexec cannot be used: {lines[-1].replace('error: ', '', 1)}.")
            timings = read_results(folder / "results", folder, "timing")
        timed = timings.networks[_ONE]
        if timed.reason:
            raise ExportError(f"trtexec cannot measure the network: {timed.reason.rstrip('.')}.")
        return NetworkTimes(np.asarray(timed.times_ms), _operators(timed.layers, network))


class OrtGpu:
    """ONNX Runtime with a GPU execution provider.

    Its profiler records when kernels are launched, not how long they run. Operators are therefore not timed one by one.

    Args:
        provider: ONNX Runtime's name of the provider.
        precision: Precision to run in; networks are given in FP32 and converted.
    """

    def __init__(self, provider: str, precision: Precision) -> None:
        self.provider, self.precision = provider, precision

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Time the network end to end.

        Raises:
            ExportError: The provider is installed but unusable, so that ONNX Runtime would fall back to the CPU.
        """
        content = in_precision(network.model, self.precision, _shape(network))
        runner = OnnxRunner(content, providers=(self.provider, "CPUExecutionProvider"))
        active = list(runner.session.get_providers())
        if active[:1] != [self.provider]:
            raise ExportError(
                f"ONNX Runtime has {self.provider}, but cannot use it here.",
                f"Install its dependencies, or use the CPU: export COMPRESSOR_BACKEND={CPU}",
            )
        once = runner.warm_up(seconds / 4)
        times = runner.time(max(7, min(2000, int(seconds * 1e3 / once))))
        return NetworkTimes(np.asarray(times), np.zeros((0, network.operators)))


def _operators(layers: Sequence[tuple[str, float]], network: TaggedNetwork) -> npt.NDArray[np.float64]:
    """Return operator times, (1, operators), or (0, operators) where the layer names do not identify operators."""
    if not network.operators:
        return np.zeros((0, 0))
    shares = shares_of_layers(layers, network.owner, weighted_nodes(network))
    return shares.operators_ms[None] if shares.trusted else np.zeros((0, network.operators))


def _shape(network: TaggedNetwork) -> tuple[int, ...]:
    header = parse_header(network.model, "the network")
    return header.shapes[header.inputs[0]][1:]
