"""Energy budget in millijoules for one input: of this machine's CPU or GPU, or of a Jetson that ssh reaches.

Energy is always the total of its source, idle power included: a faster network saves that too, and it cannot be
separated from that of other processes. Other load on the device raises the numbers.

    device         counted by                                   of
    CPU            Intel RAPL                                   all processor packages
    GPU            NVML                                         the GPU's board
    ssh://...      tegrastats there, while trtexec runs         the Jetson module
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compressor.budgets.base import BudgetSpec, CachedValues, CostSources, register_budget
from compressor.budgets.counters import ALTERNATIVE, POWERCAP, Counter, Nvml, Rapl
from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError
from compressor.latency.provider import TableProvider
from compressor.latency.request import Request

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.space import PruningSpace

Runs = Callable[[], object]
"""Runs a network once."""

Loads = Callable[[bytes], AbstractContextManager[Runs]]
"""Loads an ONNX file."""


class EnergyMeter(CachedValues):
    """Measures the energy of one input.

    Args:
        space: Builds the networks; their weights do not matter.
        request: Batch, opset and precision.
        source: What counts, for notes.
    """

    def __init__(self, space: PruningSpace, request: Request, source: str) -> None:
        super().__init__("energy")
        self._space, self._request = space, request
        self.source = f"{source}, idle power included"

    def measure(self, widths: tuple[int, ...]) -> float:
        """Measure the millijoules for one input of the network with widths (G,).

        Raises:
            CompressorError: There is no measurement.
        """
        plan = self._space.plan(widths, importance="l1")
        self.calls += 1
        return self.run_mj(self._space.apply(plan).cpu().eval()) / self._request.batch

    def run_mj(self, network: nn.Module) -> float:
        """Measure the millijoules of one run, of a batch."""
        raise NotImplementedError

    def exported(self, network: nn.Module) -> bytes:
        """Return a network's ONNX file."""
        import torch

        from compressor.latency.assemble import with_batch
        from export.convert.to_onnx import export_onnx

        example = torch.zeros(1, *self._space.example_input[0].shape[1:])
        with tempfile.TemporaryDirectory(prefix="compressor-energy-") as folder:
            path = Path(folder) / "network.onnx"
            batched = with_batch(example, self._request.batch)
            export_onnx(network, batched, path, opset=self._request.opset, compare=False)
            return path.read_bytes()


class CountedEnergy(EnergyMeter):
    """Energy by a counter of this machine.

    Args:
        space, request: As for `EnergyMeter`.
        counter: The counter.
        load: Loads an ONNX file on the device of the counter.
        repeats: Measurements per network; the median counts.
        seconds: Duration of one measurement; None for the counter's own.
    """

    def __init__(
        self,
        space: PruningSpace,
        request: Request,
        counter: Counter,
        load: Loads,
        repeats: int = 5,
        seconds: float | None = None,
    ) -> None:
        super().__init__(space, request, counter.source)
        self._counter, self._load, self._repeats = counter, load, repeats
        self._seconds = counter.seconds if seconds is None else seconds

    def run_mj(self, network: nn.Module) -> float:
        """Measure the millijoules of one run.

        Raises:
            CompressorError: The counter does not change.
        """
        with self._load(self.exported(network)) as run:
            for _ in range(10):
                run()
            found = statistics.median(self._once(run) for _ in range(self._repeats))
        if found <= 0:
            raise CompressorError("--energy: the machine's energy counters do not change.", ALTERNATIVE)
        return found

    def _once(self, run: Runs) -> float:
        before, started, count = self._counter.reading(), time.perf_counter(), 0
        while time.perf_counter() - started < self._seconds or count < 10:
            run()
            count += 1
        return self._counter.spent(before, self._counter.reading()) / count / 1e3


class JetsonEnergy(EnergyMeter):
    """Energy of a Jetson module that ssh reaches: its power by tegrastats while trtexec runs the network.

    Args:
        space, request: As for `EnergyMeter`.
        url: Address of the device.
    """

    def __init__(self, space: PruningSpace, request: Request, url: str) -> None:
        super().__init__(space, request, f"tegrastats of {url}, the whole module")
        self._url = url

    def run_mj(self, network: nn.Module) -> float:
        """Measure the millijoules of one run there."""
        from compressor.latency.converted import in_precision
        from compressor.latency.over_ssh import energy_over_ssh

        return energy_over_ssh(self._url, in_precision(self.exported(network), self._request.precision))


@register_budget
@dataclass(frozen=True)
class EnergyBudget(FunctionBudget):
    """Millijoules for one input; opaque to the search, like a user-defined function."""

    name: str = "energy"
    unit: str = "mJ"
    units: ClassVar[Mapping[str, float]] = {"uj": 1e-3, "µj": 1e-3, "mj": 1.0, "j": 1e3}
    example = "5mJ, 0.02J, 50% or 0.5x"

    @classmethod
    def create(cls, spec: BudgetSpec, sources: CostSources) -> EnergyBudget:
        """Return the budget; the dense network is measured unless its value is known."""
        meter = sources.cached.get(cls.name) or find_meter("local", Request())(sources.space)
        dense = meter.value(tuple(sources.space.dense_row.tolist()))
        return cls(meter, spec.limit(dense), dense)

    @classmethod
    def format(cls, value: float) -> str:
        return f"{value:.3g} mJ" if value < 1e3 else f"{value / 1e3:.3g} J"


def find_meter(device: str, request: Request, root: Path | None = None) -> Callable[[PruningSpace], EnergyMeter]:
    """Return what makes the energy meter of a device for a space; nothing is loaded before.

    Raises:
        CompressorError: Nothing counts the device's energy; the message names what is missing and a remedy.
    """
    from export.device.here import CPU

    provider = TableProvider.for_device(device)
    if provider.is_here and provider.runtime == CPU:
        rapl = Rapl(root or POWERCAP)
        return lambda space: CountedEnergy(space, request, rapl, _on_cpu(request.threads))
    if provider.is_here:
        from compressor.latency.backends.gpu import loaded
        from export.device.here import gpu_backend

        counter, backend = counter_here(), gpu_backend()
        assert backend is not None
        return lambda space: CountedEnergy(
            space, request, counter, lambda model: loaded(backend, request.precision, model), repeats=3
        )
    if provider.measures and device.startswith("ssh:"):
        return lambda space: JetsonEnergy(space, request, device)
    raise CompressorError(
        "--energy is measured on this machine's CPU or GPU, and on Jetson modules over ssh, not on "
        f"{provider.title}.",
        ALTERNATIVE,
    )


def counter_here() -> Counter:
    """Return the energy counter of what `--device local` runs networks on: this machine's CPU or GPU.

    Raises:
        CompressorError: There is none; the message names what is missing and a remedy.
    """
    from export.device.here import CPU, TRTEXEC, gpu_backend
    from export.engine.cuda import Driver

    backend = gpu_backend()
    if backend is None:
        return Rapl()
    if backend.kind == TRTEXEC:
        raise CompressorError(
            "--energy: trtexec starts a process for each network, whose energy cannot be told from the network's.",
            f"Install TensorRT's Python module, or use the CPU: export COMPRESSOR_BACKEND={CPU}",
        )
    with Driver() as driver:
        return Nvml(driver.pci_bus_id())


def _on_cpu(threads: int) -> Loads:
    @contextmanager
    def load(model: bytes) -> Iterator[Runs]:
        from export.engine.bench import OnnxRunner

        yield OnnxRunner(model, threads=threads).run

    return load
