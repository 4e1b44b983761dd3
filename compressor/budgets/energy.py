"""A budget in millijoules for one input, where the machine counts them: Intel RAPL, as Linux' powercap shows it.

The counters count the whole processor package. What it draws while idle is not taken off: a network that is done
sooner saves it too, and it cannot be told from what else runs. Other work on the machine raises the numbers.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.budgets.function import FunctionBudget, Prices
from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.space import PruningSpace

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")
_MEND = (
    "Limit --latency or --flops instead, or measure energy by a function of your own: "
    "--budget module:function<=VALUE."
)

Runs = Callable[[], object]


class Rapl:
    """The energy counters of this machine's processor packages.

    Args:
        root: the powercap folder.

    Raises:
        CompressorError: there is no counter, or it may not be read.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        folders = sorted(root.iterdir()) if root.is_dir() else []
        # Zones such as intel-rapl:0:1 are parts of a package, and psys counts what the packages count as well.
        zones = [folder for folder in folders if _PACKAGE.fullmatch(folder.name)]
        self._zones = [zone for zone in zones if _name(zone) != "psys"]
        if not self._zones:
            raise CompressorError(
                f"--energy: this machine reports no energy: there is no {root}/intel-rapl:*/energy_uj "
                "(Intel RAPL; virtual machines seldom have it).",
                f"Load the kernel module intel_rapl_common on a real Intel or AMD machine. {_MEND}",
            )
        self._ranges = [self._number(zone / "max_energy_range_uj") for zone in self._zones]
        self.reading()

    def reading(self) -> list[int]:
        """Microjoules on each package's counter."""
        return [self._number(zone / "energy_uj") for zone in self._zones]

    def spent(self, before: list[int], after: list[int]) -> float:
        """Microjoules between two readings; a counter that is smaller than before has begun again at 0."""
        pairs = zip(before, after, self._ranges, strict=True)
        return float(sum(new - old if new >= old else new - old + most for old, new, most in pairs))

    @staticmethod
    def _number(path: Path) -> int:
        try:
            return int(path.read_text(encoding="ascii"))
        except PermissionError:
            raise CompressorError(
                f"--energy: {path} may not be read.",
                f"As root: chmod a+r {path.parent.parent}/intel-rapl:*/energy_uj (Linux keeps it from other users "
                "because it can give secrets away), or run as root.",
            ) from None
        except (OSError, ValueError) as error:
            raise CompressorError(f"--energy: {path} cannot be read: {error}.", _MEND) from None


class EnergyMeter(Prices):
    """Measures what one input costs in ONNX Runtime, on the CPU.

    Args:
        space: builds the networks; their weights do not matter.
        rapl: the counters.
        threads: of the runtime.
        opset: of the exported network.
        repeats: measurements of one network, of which the median counts.
        seconds: of one measurement; the counters move about once a millisecond.
        runner: from a network to what runs it once; ONNX Runtime where left out.
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
        """Millijoules for one input of the network of widths (G,).

        Raises:
            CompressorError: the counters stand still.
        """
        names = [group.name for group in self._space.groups]
        plan = self._space.plan(dict(zip(names, widths, strict=True)), importance="l1")
        run = self._runner(self._space.apply(plan).cpu().eval())
        for _ in range(10):
            run()
        self.calls += 1
        found = statistics.median(self._once(run) for _ in range(self._repeats))
        if found <= 0:
            raise CompressorError("--energy: the machine's energy counters stand still.", _MEND)
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


@dataclass(frozen=True)
class EnergyBudget(FunctionBudget):
    """Millijoules for one input; as opaque as a function of the user's, and searched like one."""

    name: str = "energy"
    unit: str = "mJ"


def find_counters(device: str, root: Path | None = None) -> Rapl:
    """The counters of the device that an energy budget is asked for.

    Raises:
        CompressorError: the device does not report energy to us; what was looked for, and how to mend it.
    """
    from export.device.here import gpu_backend

    if device != "local" or gpu_backend() is not None:
        where = f"the device {device}" if device != "local" else "this machine's GPU"
        raise CompressorError(f"--energy is measured on this machine's CPU only, not on {where}.", _MEND)
    return Rapl(root or POWERCAP)


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="ascii").strip()
    except OSError:
        return ""
