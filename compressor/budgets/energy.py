"""Energy budget in millijoules for one input, measured by Intel RAPL counters through Linux' powercap.

The counters cover the whole processor package. Idle energy is not subtracted: a faster network saves it too, and it
cannot be separated from that of other processes. Other load on the machine raises the numbers.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compressor.budgets.base import BudgetSpec, CachedValues, CostSources, register_budget
from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.space import PruningSpace

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")
_ALTERNATIVE = (
    "Limit --latency or --flops instead, or measure energy by your own function: "
    "--budget module:function<=VALUE."
)

Runs = Callable[[], object]


class Rapl:
    """The energy counters of this machine's processor packages.

    Args:
        root: The powercap folder.

    Raises:
        CompressorError: There is no counter, or reading it is not permitted.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        folders = sorted(root.iterdir()) if root.is_dir() else []
        # Zones such as intel-rapl:0:1 are parts of a package, and psys includes the packages: both would count twice.
        zones = [folder for folder in folders if _PACKAGE.fullmatch(folder.name)]
        self._zones = [zone for zone in zones if _name(zone) != "psys"]
        if not self._zones:
            raise CompressorError(
                f"--energy: this machine reports no energy: there is no {root}/intel-rapl:*/energy_uj "
                "(Intel RAPL; virtual machines seldom have it).",
                f"Load the kernel module intel_rapl_common on a real Intel or AMD machine. {_ALTERNATIVE}",
            )
        self._ranges = [self._number(zone / "max_energy_range_uj") for zone in self._zones]
        self.reading()

    def reading(self) -> list[int]:
        """Return each package's counter, in microjoules."""
        return [self._number(zone / "energy_uj") for zone in self._zones]

    def spent(self, before: list[int], after: list[int]) -> float:
        """Return the microjoules between two readings; a counter that is smaller than before has wrapped to 0."""
        pairs = zip(before, after, self._ranges, strict=True)
        return float(sum(new - old if new >= old else new - old + most for old, new, most in pairs))

    @staticmethod
    def _number(path: Path) -> int:
        try:
            return int(path.read_text(encoding="ascii"))
        except PermissionError:
            raise CompressorError(
                f"--energy: no permission to read {path}.",
                f"As root: chmod a+r {path.parent.parent}/intel-rapl:*/energy_uj (Linux restricts it "
                "because it can leak secrets), or run as root.",
            ) from None
        except (OSError, ValueError) as error:
            raise CompressorError(f"--energy: {path} cannot be read: {error}.", _ALTERNATIVE) from None


class EnergyMeter(CachedValues):
    """Measures the energy of one input in ONNX Runtime on the CPU.

    Args:
        space: Builds the networks; their weights do not matter.
        rapl: The counters.
        threads: Threads of the runtime.
        opset: ONNX opset of the exported network.
        repeats: Measurements per network; the median counts.
        seconds: Duration of one measurement; the counters are updated about once per millisecond.
        runner: Maps a network to a function that runs it once; ONNX Runtime by default.
    """

    def __init__(
        self,
        space: PruningSpace,
        rapl: Rapl,
        threads: int = 1,
        opset: int = 17,
        repeats: int = 5,
        seconds: float = 0.2,
        runner: Callable[[nn.Module], Runs] | None = None,
    ) -> None:
        super().__init__("energy")
        self._space, self._rapl, self._threads, self._opset = space, rapl, threads, opset
        self._repeats, self._seconds, self._runner = repeats, seconds, runner or self._session

    def measure(self, widths: tuple[int, ...]) -> float:
        """Measure the millijoules for one input of the network with widths (G,).

        Raises:
            CompressorError: The counters do not change.
        """
        names = [group.name for group in self._space.groups]
        plan = self._space.plan(dict(zip(names, widths, strict=True)), importance="l1")
        run = self._runner(self._space.apply(plan).cpu().eval())
        for _ in range(10):
            run()
        self.calls += 1
        found = statistics.median(self._once(run) for _ in range(self._repeats))
        if found <= 0:
            raise CompressorError("--energy: the machine's energy counters do not change.", _ALTERNATIVE)
        return found

    def _once(self, run: Runs) -> float:
        before, started, count = self._rapl.reading(), time.perf_counter(), 0
        while time.perf_counter() - started < self._seconds or count < 10:
            run()
            count += 1
        return self._rapl.spent(before, self._rapl.reading()) / count / 1e3

    def _session(self, network: nn.Module) -> Runs:
        import torch

        from export.convert.ort import open_session
        from export.convert.to_onnx import export_onnx

        example = torch.zeros(1, *self._space.example_input[0].shape[1:])
        with tempfile.TemporaryDirectory(prefix="compressor-energy-") as folder:
            path = Path(folder) / "network.onnx"
            export_onnx(network, example, path, opset=self._opset, compare=False)
            session = open_session(path, threads=self._threads)
        feed = {session.get_inputs()[0].name: example.numpy()}
        return lambda: session.run(None, feed)


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
        meter = sources.cached.get(cls.name) or EnergyMeter(sources.space, find_counters("local"))
        dense = meter.value(tuple(sources.space.dense_widths.tolist()))
        return cls(meter, spec.limit(dense), dense)

    @classmethod
    def format(cls, value: float) -> str:
        return f"{value:.3g} mJ" if value < 1e3 else f"{value / 1e3:.3g} J"


def find_counters(device: str, root: Path | None = None) -> Rapl:
    """Return the energy counters of a device.

    Raises:
        CompressorError: The device has no readable counters; the message gives the missing path and a remedy.
    """
    from compressor.latency.provider import TableProvider
    from export.device.here import CPU

    provider = TableProvider.for_device(device)
    if not provider.is_here or provider.runtime != CPU:
        raise CompressorError(
            f"--energy is measured on this machine's CPU only, not on {provider.title}.", _ALTERNATIVE
        )
    return Rapl(root or POWERCAP)


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="ascii").strip()
    except OSError:
        return ""
