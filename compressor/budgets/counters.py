"""Counters of energy: of this machine's processor packages, and of its GPU.

A counter has the energy that was used since some moment in the past, idle power included. A network's energy is the
difference of two readings around its runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from compressor.core.errors import CompressorError

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")
ALTERNATIVE = (
    "Limit --latency or --flops instead, or measure energy by your own function: "
    "--budget module:function<=VALUE."
)


class Counter(Protocol):
    """Energy used so far.

    Attributes:
        source: What counts, for notes.
        seconds: Duration of one measurement, long beside the time between two updates of the counter.
    """

    source: str
    seconds: float

    def reading(self) -> Sequence[int]:
        """Return the present value of each part."""

    def spent(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Return the microjoules between two readings."""


class Rapl:
    """The energy counters of this machine's processor packages, through Linux' powercap.

    Args:
        root: The powercap folder.

    Raises:
        CompressorError: There is no counter, or reading it is not permitted.
    """

    seconds = 0.2

    def __init__(self, root: Path = POWERCAP) -> None:
        folders = sorted(root.iterdir()) if root.is_dir() else []
        # Zones such as intel-rapl:0:1 are parts of a package, and psys includes the packages: both would count twice.
        zones = [folder for folder in folders if _PACKAGE.fullmatch(folder.name)]
        self._zones = [zone for zone in zones if _name(zone) != "psys"]
        if not self._zones:
            raise CompressorError(
                f"--energy: this machine reports no energy: there is no {root}/intel-rapl:*/energy_uj "
                "(Intel RAPL; virtual machines seldom have it).",
                f"Load the kernel module intel_rapl_common on a real Intel or AMD machine. {ALTERNATIVE}",
            )
        self._ranges = [self._number(zone / "max_energy_range_uj") for zone in self._zones]
        self.reading()
        self.source = f"Intel RAPL of {len(self._zones)} processor package(s)"

    def reading(self) -> list[int]:
        """Return each package's counter, in microjoules."""
        return [self._number(zone / "energy_uj") for zone in self._zones]

    def spent(self, before: Sequence[int], after: Sequence[int]) -> float:
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
            raise CompressorError(f"--energy: {path} cannot be read: {error}.", ALTERNATIVE) from None


class Nvml:
    """The energy counter of an NVIDIA GPU, through its management library (Volta and newer).

    Args:
        bus_id: The GPU's address on the PCI bus.
        library: The module `pynvml`; None imports it.

    Raises:
        CompressorError: The module or its library is missing, or the GPU has no counter.
    """

    seconds = 2.0  # the counter changes every 20 to 100 ms

    def __init__(self, bus_id: str, library: Any = None) -> None:
        self._nvml = library or _pynvml()
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
            name = self._nvml.nvmlDeviceGetName(self._handle)
            self.source = f"NVML of {name.decode() if isinstance(name, bytes) else name}, the whole board"
            self.reading()
        except self._nvml.NVMLError as error:
            raise CompressorError(
                f"--energy: NVML reports no energy of the GPU {bus_id}: {error}.",
                f"GPUs count it from Volta on, with NVIDIA's driver; a Jetson does over ssh. {ALTERNATIVE}",
            ) from None

    def reading(self) -> list[int]:
        """Return the counter, in millijoules."""
        return [int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))]

    def spent(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Return the microjoules between two readings."""
        return 1e3 * (after[0] - before[0])


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        raise CompressorError(
            "--energy: NVML's Python module, which reads the energy of this machine's GPU, is not installed.",
            "Install it with: pip install 'compressor[energy]'",
        ) from None
    return pynvml


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="ascii").strip()
    except OSError:
        return ""
