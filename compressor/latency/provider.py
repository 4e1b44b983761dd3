"""Devices by name: where their latency tables come from, and how networks are timed on them.

    provider = TableProvider.for_device("ssh://me@orin.local")
    table = provider.table(space, example, Request(model="resnet50", precision="fp16"))

Each kind of device is a subclass of `TableProvider`, which `register_device` registers under its name: this machine's
CPU or GPU (`local`), a device that ssh reaches (`ssh`), and any other name, whose table is shipped or was imported.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from compressor.core.errors import CompressorError
from compressor.core.plugins import Registry
from compressor.core.progress import say
from compressor.latency.request import Request, Turns
from compressor.latency.schema import BLOCKS
from compressor.latency.steps import refuse_table
from compressor.latency.table import LatencyTable, check_known, shipped_tables, user_tables
from export.convert.calibrated import TENSORRT

if TYPE_CHECKING:

    from compressor.latency.paired import Timing
    from compressor.latency.precisions import PrecisionTimer
    from compressor.pruning.groups import Group
    from compressor.pruning.space import PruningSpace

_Class = TypeVar("_Class", bound="type[TableProvider]")
_OWN = {"local": "compressor.latency.local", "ssh": "compressor.latency.over_ssh"}
"""The toolkit's own kinds of devices: name -> module."""

_registry: Registry[TableProvider] = Registry("device", _OWN)


@dataclass(frozen=True)
class KnownDevice:
    """One line of `compress devices`.

    Attributes:
        name: Value of --device.
        runtime: Runtime and, where known, its version.
        precisions: Precisions of its table.
        how: Whether the table is measured or estimated, with its stated error.
    """

    name: str
    runtime: str
    precisions: tuple[str, ...]
    how: str


class TableProvider(ABC):
    """A device: its latency table for any network, and its measurements.

    Args:
        device: Value of --device.

    Attributes:
        name: Value of --device, or its part before the first colon.
        runtime: Name of its runtime, as in latency tables.
        int8_form: Form of its INT8 files, a key of `export.convert.calibrated.FORMS`.
        precisions: Precisions in which networks run on it; with `mixed` it has a `precision_timer`.
        measures: Whether networks can be timed on it from here.
        concurrent: Whether several copies of a network can be timed on it at the same time.
        title: What messages call it; the value of --device by default.
        is_here: Whether it is this machine, which runs the engines that are built here.
        time_limit_s: Default time limit of a table, in seconds; None where its measurement cannot be limited from here.
    """

    name: ClassVar[str] = ""
    runtime: str = "tensorrt"
    int8_form: ClassVar[str] = TENSORRT
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    measures: ClassVar[bool] = True
    concurrent: ClassVar[bool] = False
    title: str = ""
    is_here: ClassVar[bool] = False
    time_limit_s: ClassVar[float | None] = None

    def __init__(self, device: str) -> None:
        self.device = device
        self.title = self.title or device

    @staticmethod
    def for_device(device: str) -> TableProvider:
        """Return the provider of a device; names that no kind of device has are those of stored tables."""
        return (_registry.find(device.partition(":")[0]) or StoredTables).create(device)

    @classmethod
    def create(cls, device: str) -> TableProvider:
        """Return the provider of one device of this kind."""
        return cls(device)

    @property
    def runs_tensorrt(self) -> bool:
        """Whether networks run on it as TensorRT engines."""
        return self.runtime.startswith("tensorrt")

    @classmethod
    def known(cls) -> list[KnownDevice]:
        """Return the lines of `compress devices` for this kind."""
        return [KnownDevice(cls.name, str(cls.runtime), cls.precisions, "measured on first use")]

    def check(self, precision: str) -> None:
        """Refuse an unknown device or an unsupported precision before anything is loaded.

        Raises:
            CompressorError: The device cannot be used so.
        """
        if precision not in self.precisions:
            raise CompressorError(
                f"Networks run in {', '.join(self.precisions)} on {self.device}, not in {precision}.",
                f"Use --precision {self.precisions[0]}.",
            )

    def check_load(self, request: Request) -> None:
        """Refuse several copies of a network at the same time on a device that runs one.

        Raises:
            CompressorError: The device runs one network at a time.
        """
        if request.streams > 1 and not self.concurrent:
            raise CompressorError(
                f"{self.title} runs one network at a time, and {request.streams} streams were requested.",
                "Leave --streams out.",
            )

    @abstractmethod
    def table(self, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
        """Return the table for the networks of `space`: a stored one if it fits, else measured now.

        Args:
            space: The networks.
            example: The network's arguments for one input.
            request: What the table is needed for.

        Raises:
            CompressorError: There is no table, or the device cannot be measured.
        """

    def files_in_turns(self, dense: Path, slim: Path, request: Request) -> tuple[bytes, bytes]:
        """Return two FP32 files as they are timed in turns, in the requested precision.

        A delivered file of that precision beside `slim` takes its place. In mixed precision the dense one is in floats.
        """
        from compressor.latency.converted import in_precision_beside
        from compressor.latency.precisions import files_in_turns

        if request.precision == "mixed":
            return files_in_turns(dense, slim, self.precision_timer(request))
        return in_precision_beside(dense, slim, request, self.int8_form)

    def time(
        self, dense: Path, slim: Path, request: Request, turns: Turns, table: LatencyTable | None = None
    ) -> Timing:
        """Time two FP32 ONNX files in turns, in the requested precision.

        Args:
            dense, slim: The files. A file of the requested precision beside `slim` is timed in its place.
            request: Precision, threads, batch and streams; the files take this batch.
            turns: When timing ends.
            table: The device's table; a remote device in another state is refused.

        Raises:
            CompressorError: The device cannot be measured from here.
        """
        raise CompressorError(f"{self.device} cannot be measured from here.", "Give ssh://user@host.")

    def precision_timer(self, request: Request, floats: Literal["fp32", "fp16"] | None = None) -> PrecisionTimer:
        """Return what times a network's parts in floats and in INT8, and plans of precisions.

        Args:
            request: Threads and streams.
            floats: Precision of what is not in INT8; None for the device's usual one.

        Raises:
            CompressorError: They cannot be timed on this device from here.
        """
        raise CompressorError(
            f"Mixed precision is chosen by measured times, and none can be measured on {self.title} from here.",
            "Measure on the device itself (--target ssh://user@host), or use --precision int8, which keeps sensitive "
            "layers in floats.",
        )

    def require_same(self, table: LatencyTable, request: Request) -> None:
        """Refuse a table that belongs to another device than this one.

        Raises:
            CompressorError: Something differs; the message names it.
        """
        table.at(request.precision, batch=request.batch, streams=request.streams, device=self.device)

    def block(self, precision: str) -> int:
        """Return the number of which channel counts should be multiples, so that no time is spent on padding.

        By default that of tensor cores: 8 in FP16, 32 in INT8.
        """
        return BLOCKS.get(precision, 1)

    def steps(self, groups: Iterable[Group], precision: str) -> dict[str, int]:
        """Return the recommended channel steps of groups, by name, for the argument `granularity` of `PruningSpace`."""
        return {group.name: self.block(precision) for group in groups}

    def measured_steps(self, space: PruningSpace, example: Any, request: Request) -> dict[str, int]:
        """Measure the channel steps at which latency jumps, by group name.

        Raises:
            CompressorError: They cannot be measured on this device.
        """
        raise CompressorError(
            f"Channel steps are measured on this machine's CPU only, not on {self.device}.",
            "Use --granularity auto, or a number such as 8.",
        )


def register_device(kind: _Class) -> _Class:
    """Register a subclass of `TableProvider` under its `name`; a class decorator.

    Raises:
        CompressorError: It is no subclass, its `name` is missing or unusable, or another class has the name.
    """
    called = f"{kind.__module__}:{getattr(kind, '__qualname__', kind)}"
    if not (isinstance(kind, type) and issubclass(kind, TableProvider)):
        raise CompressorError(
            f"{called} is no subclass of TableProvider.",
            "Derive it from compressor.latency.measured.MeasuredDevice or compressor.latency.provider.TableProvider.",
        )
    _registry.add(kind, kind.name)
    return kind


def known_devices() -> list[KnownDevice]:
    """Return this machine, all shipped tables, the devices that the user measured, and registered devices.

    Raises:
        CompressorError: A shipped table is damaged.
    """
    names = _registry.names()
    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    precisions = ("fp32", "int8", "mixed")
    here = KnownDevice("local", f"onnxruntime-cpu {version}", precisions, "measured here on first use")
    own = [_registry.classes[name] for name in names if name not in _OWN]
    return [here, *StoredTables.known(), *(device for kind in own for device in kind.known())]


class StoredTables(TableProvider):
    """A device that is not reached from here: its table is shipped, or was imported or measured earlier."""

    measures = False
    concurrent = True

    @classmethod
    def known(cls) -> list[KnownDevice]:
        found = []
        for name, path in shipped_tables().items():
            table = LatencyTable.read(path)
            found.append(KnownDevice(name, table.runtime, table.precisions, _origin(table)))
        own: dict[tuple[str, str], list[LatencyTable]] = {}
        for _, table in user_tables():
            own.setdefault((table.device, table.runtime), []).append(table)
        for (name, runtime), tables in sorted(own.items()):
            precisions = tuple(sorted({table.precision for table in tables}))
            count = f"{len(tables)} network{'s' if len(tables) > 1 else ''}"
            how = f"measured by you on {tables[-1].fields.date}, {count}"
            found.append(KnownDevice(name, runtime, precisions, how))
        return found

    def check(self, precision: str) -> None:
        check_known(self.device, [name for name in _registry.names() if name not in _OWN])

    def table(self, space: PruningSpace, example: Any, request: Request) -> LatencyTable:
        table = LatencyTable.load(
            self.device, request.precision, batch=request.batch, streams=request.streams, space=space
        )
        if table.estimated:
            say(f"The latency of {self.device} is estimated, not measured.")
        return table

    def measured_steps(self, space: PruningSpace, example: Any, request: Request) -> dict[str, int]:
        raise refuse_table(self.table(space, example, request))


def _origin(table: LatencyTable) -> str:
    if not table.estimated:
        return f"measured on {table.fields.date}"
    parts = [
        f"{precision} off by {roofline.errors.left_out_mape:.0%} on published latencies left out of the fit"
        for precision, roofline in table.fields.roofline.items()
        if roofline.errors.left_out_mape is not None
    ]
    return "estimated: " + ("; ".join(parts) if parts else "no published latency to compare with")
