"""This machine as a device: its CPU through ONNX Runtime, or its GPU through the backend that is found here."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.latency.assemble import SECONDS_A_NETWORK, Sample, with_batch
from compressor.latency.backends.cpu import OrtProcess, measured
from compressor.latency.backends.gpu import EngineDevice, device_of
from compressor.latency.converted import in_precision
from compressor.latency.engine_precisions import EngineTimer
from compressor.latency.fit import ALIGNMENT
from compressor.latency.machine import channel_block, clocks, cpu_model, governor
from compressor.latency.measured import MeasuredDevice
from compressor.latency.networks import Device, NetworkTimes, TaggedNetwork
from compressor.latency.precisions import REPEATS, CpuTimer, fastest
from compressor.latency.provider import TableProvider, register_device
from compressor.latency.request import Request, Turns
from compressor.latency.schema import DeviceFields
from compressor.latency.steps import measured_steps
from compressor.latency.table import LOCAL, LatencyTable, check_known
from export.convert.calibrated import ONNXRUNTIME
from export.convert.ort import available_cores, check_threads
from export.device import here
from export.device.here import CPU, Backend
from export.errors import ExportError

if TYPE_CHECKING:

    from compressor.latency.engine_precisions import Layers
    from compressor.latency.paired import Ratio, Timing
    from compressor.latency.precisions import PrecisionTimer
    from compressor.pruning.groups import Group
    from compressor.pruning.space import PruningSpace

T = TypeVar("T")


@register_device
class LocalCpu(MeasuredDevice):
    """This machine's CPU."""

    name = LOCAL
    title = "this machine's CPU"
    is_here = True
    concurrent = True
    runtime = CPU
    int8_form = ONNXRUNTIME
    precisions = ("fp32", "int8", "mixed")
    time_limit_s = 60.0

    @classmethod
    def create(cls, device: str) -> TableProvider:
        check_known(device)
        backend = here.gpu_backend()
        return cls(device) if backend is None else LocalGpu(backend)

    def __init__(self, device: str = LOCAL, cache_dir: str | Path | None = None) -> None:
        super().__init__(device, cache_dir)

    @cached_property
    def version(self) -> str:  # type: ignore[override]
        """Version of ONNX Runtime."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def check(self, precision: str) -> None:
        if precision not in self.precisions:
            raise CompressorError(
                f"Networks run in {', '.join(self.precisions)} on this machine's CPU, not in {precision}.",
                "Omit --precision, name a --device, or export it afterwards: compress export RUN --precision fp16",
            )

    def check_load(self, request: Request) -> None:
        """Refuse more threads than cores, and say where streams share them.

        Raises:
            CompressorError: This process has fewer cores.
        """
        try:
            check_threads(request.threads)
        except ExportError as error:
            raise CompressorError(
                error.message,
                f"{error.hint} A run that has begun keeps its number; start a new one: "
                "compress --recipe RUN/recipe.yaml --threads N",
            ) from None
        wanted, cores = request.threads * request.streams, available_cores()
        if wanted > cores:
            say(
                f"{request.streams} stream(s) of {request.threads} thread(s) need {wanted} cores, and there are "
                f"{cores}: they wait for one another."
            )

    def runner(self, request: Request) -> Device:
        process = OrtProcess(request.threads, request.streams)
        if request.precision == "fp32":
            return process
        if request.precision == "mixed":
            return Converted(process, partial(fastest, timer=self.precision_timer(request)))
        return Converted(process, partial(in_precision, precision="int8", runtime=ONNXRUNTIME))

    def block(self, precision: str) -> int:
        return channel_block()

    def describe(self) -> DeviceFields:
        return DeviceFields(name=LOCAL, sku=cpu_model(), power_mode=governor(), clocks=clocks())

    def identity(self, request: Request) -> dict[str, str]:
        return {} if request.precision == "fp32" else {"precision": request.precision}

    def cache_key(self, request: Request) -> str:
        return CPU if request.precision == "fp32" else f"{CPU}-{request.precision}"

    def threads(self, request: Request) -> int:
        return request.threads

    def protocol(self, fitted: Sequence[Sample], unseen: int) -> str:
        return (
            f"{len(fitted)} measurements of sub-networks, each warmed up and run for {SECONDS_A_NETWORK} s: "
            "end to end, then under ONNX Runtime's profiler (mean of the middle half of the runs), then end to "
            f"end again; {unseen} networks were held out; the dense network first, every dozen, and last; runs that "
            "other processes interrupted or slowed down do not count; a network that met a slow processor or came out "
            "much slower than predicted was measured again, and its least disturbed time counts"
        )

    def time(
        self, dense: Path, slim: Path, request: Request, turns: Turns, table: LatencyTable | None = None
    ) -> Timing:
        if request.precision == "fp32":
            return measured(dense, slim, request, turns)
        with tempfile.TemporaryDirectory(prefix="compressor-turns-") as folder:
            first, second = Path(folder) / "dense.onnx", Path(folder) / "slim.onnx"
            for path, content in zip((first, second), self.files_in_turns(dense, slim, request), strict=True):
                path.write_bytes(content)
            return measured(first, second, request, turns)

    def precision_timer(self, request: Request, floats: Literal["fp32", "fp16"] | None = None) -> PrecisionTimer:
        if floats not in (None, "fp32"):
            raise CompressorError(
                f"In mixed precision layers are in FP32 or INT8 on this machine's CPU, not in {str(floats).upper()}.",
                "Leave out --rest.",
            )
        return CpuTimer(request)

    def steps(self, groups: Iterable[Group], precision: str) -> dict[str, int]:
        """Return the block, finer where a group is narrow.

        A step of a whole block would leave a narrow group hardly any choice. ONNX Runtime reads inputs narrower than
        a block without padding, so that finer steps save time there: at most an eighth of the width, and multiples of
        4; channel counts that are no multiple of 4 use a much slower kernel.
        """
        step = self.block(precision)
        eighths = {group.name: max(1, group.width * group.unit // 8) for group in groups}
        return {name: min(step, max(ALIGNMENT, 2 ** int(math.log2(count)))) for name, count in eighths.items()}

    def measured_steps(self, space: PruningSpace, example: Any, request: Request) -> dict[str, int]:
        return measured_steps(
            space,
            with_batch(example, request.batch),
            self.runner(request),
            otherwise=self.steps(space.groups, request.precision),
            least_stride=ALIGNMENT,
        )


class Converted:
    """A `Device` that runs FP32 networks in another precision.

    Args:
        device: Runs the converted networks.
        convert: Returns an ONNX file in the other precision.
        whole: Whether operators are not timed one by one.
    """

    def __init__(self, device: Device, convert: Callable[[bytes], bytes], *, whole: bool = False) -> None:
        self._device, self._convert, self._whole = device, convert, whole

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Convert and measure a network; the time of a conversion belongs to the operator that made the value."""
        operators = {"owner": (), "epilogues": ()} if self._whole else {}
        return self._device.measure(replace(network, model=self._convert(network.model), **operators), seconds)


class LocalGpu(MeasuredDevice):
    """This machine's GPU; tables take longer than for a CPU, as an engine takes seconds to a minute to build."""

    name = LOCAL
    title = "this machine's GPU"
    is_here = True
    concurrent = True
    too_noisy = "Keep the GPU cool and free of other work, hold its clocks, and try again."

    def __init__(self, backend: Backend, cache_dir: str | Path | None = None) -> None:
        super().__init__(LOCAL, cache_dir)
        self.precisions = TableProvider.precisions
        self.backend, self.runtime, self.version = backend, backend.runtime, backend.version
        self.through = backend.kind
        if self.runs_tensorrt:
            self.precisions = (*self.precisions, "mixed")

    def runner(self, request: Request) -> Device:
        if request.precision == "mixed":
            device = device_of(self.backend, "fp32", request.streams)  # they are converted here
            return Converted(device, partial(fastest, timer=self.precision_timer(request)), whole=True)
        return device_of(self.backend, request.precision, request.streams)

    def describe(self) -> DeviceFields:
        gpu = self.backend.gpu
        return DeviceFields(
            name=LOCAL,
            sku=gpu.name,
            compute_capability=gpu.compute_capability,
            clocks=f"GPU at most {gpu.clock_mhz} MHz",
        )

    def identity(self, request: Request) -> dict[str, str]:
        gpu = self.backend.gpu
        return {
            "device": gpu.name, "compute_capability": gpu.compute_capability, "driver": gpu.driver,
            "backend": self.backend.kind, "version": self.version, "precision": request.precision,
        }  # fmt: skip

    def cache_key(self, request: Request) -> str:
        plain = re.sub(r"[^A-Za-z0-9]+", "-", self.backend.gpu.name).strip("-")
        return f"{self.runtime}-{request.precision}-{plain}"

    def sources(self) -> tuple[str, ...]:
        return (f"driver for CUDA {self.backend.gpu.driver}",)

    def precision_timer(self, request: Request, floats: Literal["fp32", "fp16"] | None = None) -> PrecisionTimer:
        device = device_of(self.backend, "fp32", request.streams)  # files are converted already
        if not isinstance(device, EngineDevice):
            raise CompressorError(
                f"Mixed precision is chosen by times of TensorRT's engines; this machine's GPU runs {self.runtime}.",
                "Use --precision int8, or install TensorRT.",
            )

        def profile(networks: Sequence[bytes]) -> list[Layers | str]:
            return [_or_why(partial(device.layers, TaggedNetwork(each, (), ()))) for each in networks]

        def time(networks: Sequence[bytes]) -> list[float | str]:
            return [_or_why(partial(median_ms, TaggedNetwork(each, (), ()))) for each in networks]

        def median_ms(network: TaggedNetwork) -> float:
            return device.measure(network, SECONDS_A_NETWORK).median_ms

        def compare(floats: Path, plans: Sequence[Path]) -> Iterator[Ratio | str]:
            asked, turns = replace(request, precision="fp32"), Turns(repeats=REPEATS)

            def ratio(plan: Path) -> Ratio:
                return self.time(floats, plan, asked, turns).ratio

            return (_or_why(partial(ratio, plan)) for plan in plans)

        where = f"this machine's {self.backend.gpu.name}, {self.runtime} {self.version}"
        return EngineTimer(floats or "fp16", where, profile, time, compare)

    def measured_steps(self, space: PruningSpace, example: Any, request: Request) -> dict[str, int]:
        raise CompressorError(
            "Channel steps are measured on this machine's CPU only, and this run is for its GPU.",
            f"Use --granularity auto, or choose the CPU: export COMPRESSOR_BACKEND={CPU}",
        )


def _or_why(measure: Callable[[], T]) -> T | str:
    """Return what is measured, or why an engine cannot be built or run."""
    try:
        return measure()
    except ExportError as error:
        return error.message
