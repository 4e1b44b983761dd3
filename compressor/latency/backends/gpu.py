"""The GPU backends that `export.device.here` finds on this machine, and what their layers' times say of the operators.

TensorRT fuses nodes and names the result after them: `@5. + @6.` for a convolution with its activation. Where the
names identify operators, each operator gets the time of its layers. Newer versions compile whole regions of a network
into one kernel with a name of its own. Operators then get shares of the whole network's time from a fit over all
measured networks, with arithmetic of each kind, memory traffic and launches as terms.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from compressor.latency.converted import in_precision
from compressor.latency.networks import TAG, Device, NetworkTimes, TaggedNetwork
from compressor.latency.operators import Floats, Operators, Widths, padded
from compressor.latency.remote_bundle import weighted_nodes
from compressor.latency.schema import FASTEST_MS, Precision
from export.device.bundle import Target, write_bundle
from export.device.here import CPU, PROVIDERS, TRTEXEC, USUAL, Backend, find_trtexec
from export.device.results import read_results
from export.engine.bench import OnnxRunner, merged, together
from export.engine.cuda import find_device
from export.engine.trt import RTX
from export.errors import ExportError

if TYPE_CHECKING:
    from compressor.pruning.counts import Layer
    from export.device.results import NetworkResult
    from export.engine.runner import EngineRunner


_ONE = "network"

UNSURE = 0.10
"""Largest share of the time without a known operator at which a profile is used."""


@runtime_checkable
class EngineDevice(Device, Protocol):
    """A device that builds engines and profiles their layers."""

    def layers(self, network: TaggedNetwork) -> list[tuple[str, float]]:
        """Build an engine; return the name and the milliseconds of each of its layers."""


def device_of(backend: Backend, precision: Precision, streams: int = 1) -> Device:
    """Return the device that measures networks with this backend in this precision, `streams` of them at a time."""
    if backend.kind == TRTEXEC:
        return Trtexec(find_trtexec() or USUAL, precision, streams)
    if backend.kind in PROVIDERS:
        return OrtGpu(PROVIDERS[backend.kind], precision, streams)
    return TensorRt(backend.kind, precision, streams)


class TensorRt:
    """TensorRT, or TensorRT-RTX, through its Python module.

    Args:
        module: `tensorrt` or `tensorrt_rtx_bindings`.
        precision: Precision to run in; networks are given in FP32 and converted.
        streams: Execution contexts of an engine that run at the same time.
    """

    def __init__(self, module: str, precision: Precision, streams: int = 1) -> None:
        self.module, self.precision, self.streams = module, precision, streams

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Build an engine, time it with GPU events, then profile its layers."""
        with self.opened(network) as runner:
            times = runner.times_ms(warmup_s=seconds / 4, duration_s=seconds)
            layers = runner.layer_times() if network.operators else []
        return NetworkTimes(np.asarray(times), _operators(layers, network))

    def layers(self, network: TaggedNetwork) -> list[tuple[str, float]]:
        """See `EngineDevice`."""
        with self.opened(network) as runner:
            runner.times_ms(warmup_s=1.0, duration_s=0.0)
            return runner.layer_times()

    @contextmanager
    def opened(self, network: TaggedNetwork) -> Iterator[EngineRunner]:
        """Build the engine of a network and load it."""
        from export.engine.engine import build_engine
        from export.engine.runner import EngineRunner

        with tempfile.TemporaryDirectory(prefix="compressor-engine-") as folder:
            path, engine = Path(folder) / "network.onnx", Path(folder) / "network.engine"
            path.write_bytes(in_precision(network.model, self.precision))
            capability = None
            if self.module == RTX and (gpu := find_device()) is not None:
                capability = gpu.compute_capability
            build_engine(path, engine, module=self.module, compute_capability=capability)
            with EngineRunner(engine, streams=self.streams) as runner:
                yield runner


class Trtexec:
    """trtexec on this machine, run by the same script that remote devices receive.

    Args:
        program: Path of trtexec.
        precision: Precision to run in; networks are given in FP32 and converted.
        streams: Execution contexts of an engine that run at the same time.
    """

    def __init__(self, program: Path, precision: Precision, streams: int = 1) -> None:
        self.program, self.precision, self.streams = program, precision, streams

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Write a bundle with this one network and run it on this machine."""
        timed = self._timed(network, seconds, profile=network.operators > 0)
        return NetworkTimes(np.asarray(timed.times_ms), _operators(timed.layers, network))

    def layers(self, network: TaggedNetwork) -> list[tuple[str, float]]:
        """See `EngineDevice`."""
        return list(self._timed(network, 1.0, profile=True).layers)

    def _timed(self, network: TaggedNetwork, seconds: float, *, profile: bool) -> NetworkResult:
        with tempfile.TemporaryDirectory(prefix="compressor-trtexec-") as name:
            folder = Path(name) / "bundle"
            content = in_precision(network.model, self.precision)
            target = Target("", "GPU", "", 8, 20, True, 0)
            write_bundle(folder, [(_ONE, content)], target=target, profile=profile, streams=self.streams)
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
        return timed


class OrtGpu:
    """ONNX Runtime with a GPU execution provider.

    Its profiler records when kernels are launched, not how long they run. Operators are therefore not timed one by one.

    Args:
        provider: ONNX Runtime's name of the provider.
        precision: Precision to run in; networks are given in FP32 and converted.
        streams: Sessions that run a network at the same time.
    """

    def __init__(self, provider: str, precision: Precision, streams: int = 1) -> None:
        self.provider, self.precision, self.streams = provider, precision, streams

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Time the network end to end."""
        runners = self.opened(network)
        once = max(together(runners, lambda runner: runner.warm_up(seconds / 4)))
        runs = max(7, min(2000, int(seconds * 1e3 / once)))
        times = merged(together(runners, lambda runner: runner.time(runs)))
        return NetworkTimes(np.asarray(times), np.zeros((0, network.operators)))

    def opened(self, network: TaggedNetwork) -> list[OnnxRunner]:
        """Load the network, once for each stream.

        Raises:
            ExportError: The provider is installed but unusable, so that ONNX Runtime would fall back to the CPU.
        """
        content = in_precision(network.model, self.precision)
        providers = (self.provider, "CPUExecutionProvider")
        runners = [OnnxRunner(content, providers=providers) for _ in range(self.streams)]
        active = list(runners[0].session.get_providers())
        if active[:1] != [self.provider]:
            raise ExportError(
                f"ONNX Runtime has {self.provider}, but cannot use it here.",
                f"Install its dependencies, or use the CPU: export COMPRESSOR_BACKEND={CPU}",
            )
        return runners


@contextmanager
def loaded(backend: Backend, precision: Precision, model: bytes) -> Iterator[Callable[[], object]]:
    """Load an FP32 ONNX file with a backend in a precision; yields what runs it once, and waits for its end.

    Raises:
        ExportError: The backend runs networks in processes of their own, or cannot run this one.
    """
    network = TaggedNetwork(model, (), ())
    device = device_of(backend, precision)
    if isinstance(device, TensorRt):
        with device.opened(network) as runner:
            runner.load_noise()
            yield runner.run_once
    elif isinstance(device, OrtGpu):
        yield device.opened(network)[0].run
    else:
        raise ExportError(f"{backend.kind} runs networks in processes of their own.")


def _operators(layers: Sequence[tuple[str, float]], network: TaggedNetwork) -> Floats:
    """Return operator times, (1, operators), or (0, operators) where the layer names do not identify operators."""
    if not network.operators:
        return np.zeros((0, 0))
    shares = shares_of_layers(layers, network.owner, weighted_nodes(network))
    return shares.operators_ms[None] if shares.trusted else np.zeros((0, network.operators))


@dataclass(frozen=True)
class Shares:
    """Milliseconds of each operator, (operators,), and the share of the time without a known operator."""

    operators_ms: Floats
    unsure: float

    @property
    def trusted(self) -> bool:
        """Whether the profile is usable: most of the time has a known operator, and every operator has a time."""
        return self.unsure <= UNSURE and bool((self.operators_ms > 0).all())


def shares_of_layers(
    layers: Sequence[tuple[str, float]], owner: Sequence[int], weighted: Sequence[int]
) -> Shares:
    """Assign each layer's time to the operator that its name identifies.

    A layer with one weight-bearing node belongs to that operator. A layer without weights belongs to the operator
    that owns its nodes; layout changes carry the name of the node that they serve. The time of a layer with several
    operators, or with none, is assigned to the operator of the preceding layer and counted as unsure.

    Args:
        layers: (name, milliseconds), in execution order.
        owner: Operator that owns each node of the file.
        weighted: Node with the weight of each operator.
    """
    times = np.zeros(len(weighted))
    bearing = {node: operator for operator, node in enumerate(weighted)}
    current, unsure = 0, 0.0
    for name, milliseconds in layers:
        nodes = [int(found) for found in TAG.findall(name) if int(found) < len(owner)]
        operators = {bearing[node] for node in nodes if node in bearing} or {
            owner[node] for node in nodes[-1:]
        }
        if len(operators) == 1:
            (current,) = operators
        else:
            unsure += milliseconds
        times[current] += milliseconds
    total = float(times.sum())
    return Shares(times, unsure / total if total > 0 else 1.0)


def fitted_shares(
    layers: Sequence[Layer], c_in: Widths, c_out: Widths, whole_ms: Floats, block: int, batch: int = 1
) -> Floats:
    """Fit operator times to the times of whole networks; returns milliseconds, (networks, operators).

    Args:
        layers: The operators.
        c_in, c_out: Channels of each network's operators, (networks, operators).
        whole_ms: Time of each network, (networks,).
        block: Channels are padded to multiples of this.
        batch: Inputs of one run.
    """
    from scipy.optimize import nnls

    terms = _work(Operators(layers), c_in, c_out, block, batch)
    sums = terms.sum(axis=1)
    scale = np.maximum(np.abs(sums).max(axis=0), 1e-12)
    weighted = sums / scale / whole_ms[:, None]
    found, _ = nnls(
        np.concatenate([weighted, 1e-3 * np.eye(sums.shape[1])]),
        np.concatenate([np.ones(len(whole_ms)), np.zeros(sums.shape[1])]),
    )
    return np.asarray(np.maximum(terms @ (found / scale), FASTEST_MS * (c_out > 0)))


def _work(operators: Operators, c_in: Widths, c_out: Widths, block: int, batch: int) -> Floats:
    """Return the fit's terms, (networks, operators, terms): padded MACs of each kind, elements moved, one launch."""
    kinds = sorted(set(operators.kinds))
    inputs, outputs = c_in.astype(float), c_out.astype(float)
    macs = operators.cost(padded(inputs, block), padded(outputs, block)).macs
    cost, read = operators.cost(inputs, outputs), operators.cost(padded(inputs, block), outputs).weights
    terms = np.zeros((*c_in.shape, len(kinds) + 2))
    for place, kind in enumerate(operators.kinds):
        terms[:, place, kinds.index(kind)] = batch * macs[:, place]
    terms[..., -2] = batch * (cost.moved - cost.weights) + read
    terms[..., -1] = outputs > 0  # one launch of each operator that is there
    return terms
