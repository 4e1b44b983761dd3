"""What each part of a network takes in floats and in INT8 on a device, and what the conversions between take.

Parts are timed inside networks under the runtime's profiler: the network in floats, the one with all parts in INT8, and
one with every other part in INT8, where most values are converted. A `PrecisionTimer` is a device for that: this
machine's CPU (`CpuTimer`), or engines of TensorRT (`latency.engine_precisions`). `fastest` writes a network in the
precisions that take the least time, whatever they do to its outputs: what a plan of widths is timed as.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from compressor.core.progress import say
from compressor.latency.backends.cpu import measured, profiled_runs, tag_of
from compressor.latency.converted import any_inputs, delivered_beside, in_precision
from compressor.latency.machine import timed
from compressor.latency.networks import tag
from compressor.latency.request import Request, Turns
from export.convert.calibrated import ONNXRUNTIME, Calibrated, enclosed
from export.convert.mixed import Prices, cheapest, parts_of
from export.convert.onnx_header import parse_header
from export.convert.quantize import with_rest
from export.engine.bench import OnnxRunner

if TYPE_CHECKING:
    from compressor.latency.machine import Floats
    from compressor.latency.paired import Ratio
    from export.convert.mixed import Parts

ROUNDS = 4
RUNS = 12
"""Profiled runs of each network in each of the rounds."""

REPEATS = 4
"""Pairs of processes in which a plan of precisions is timed."""

FAST = 0.25
"""Quantile of a kernel's runs that counts: other load only lengthens them."""

TO_INT8 = ("QuantizeLinear", "ReorderOutput")
TO_FLOAT = ("DequantizeLinear", "ReorderInput")
"""Kernels of a conversion; the second ones leave and enter the blocked layout of FP32 convolutions."""

REFORMAT = "Reformat"
"""Kernel of an engine that changes the layout or the type of a value for the node that it is listed with."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel: the node of the file that it computes, its operator, its milliseconds and its output's elements."""

    node: str
    op: str
    ms: float
    elements: int


class PrecisionTimer(Protocol):
    """A device on which a network's parts and its plans of precisions are timed."""

    @property
    def runtime(self) -> str:
        """Form of its INT8 files, a key of `export.convert.calibrated.FORMS`."""

    @property
    def floats(self) -> Literal["fp32", "fp16"]:
        """Precision of the parts that are not in INT8."""

    @property
    def where(self) -> str:
        """Description of the device and its runtime."""

    def kernels(self, protos: Sequence[Any]) -> list[list[KernelTime]] | str:
        """Profile networks; returns the kernels of each, or why the runtime does not tell parts apart."""

    def whole_ms(self, networks: Sequence[bytes]) -> list[float]:
        """Return the milliseconds of ONNX files, infinite for one that cannot be built."""

    def ratios(self, floats: Path, plans: Sequence[Path]) -> Iterable[Ratio | str]:
        """Time ONNX files in turns with the one in floats; yields shares of its time, or why there is none."""


@dataclass(frozen=True)
class CpuTimer:
    """This machine's CPU, through ONNX Runtime.

    Attributes:
        request: Threads and streams.
    """

    request: Request
    runtime: str = ONNXRUNTIME
    floats: Literal["fp32", "fp16"] = "fp32"
    where: str = "this machine's CPU"

    def kernels(self, protos: Sequence[Any]) -> list[list[KernelTime]]:
        """See `PrecisionTimer`."""
        return kernel_times(protos, self.request.threads)

    def whole_ms(self, networks: Sequence[bytes]) -> list[float]:
        """Time whole networks in turns."""
        runners = [OnnxRunner(network, threads=self.request.threads) for network in networks]
        times: list[list[float]] = [[] for _ in runners]
        for _ in range(ROUNDS):
            for runner, found in zip(runners, times, strict=True):
                found += timed(runner, RUNS)[1:, 0].tolist()
        return [float(np.quantile(found, FAST)) for found in times]

    def ratios(self, floats: Path, plans: Sequence[Path]) -> Iterator[Ratio | str]:
        """See `PrecisionTimer`."""
        for plan in plans:
            yield measured(floats, plan, self.request, Turns(repeats=REPEATS)).ratio


@dataclass(frozen=True)
class Conversions:
    """Milliseconds of a conversion, and of each element of its value."""

    to_int8: tuple[float, float]
    to_float: tuple[float, float]


def fastest(content: bytes, timer: PrecisionTimer) -> bytes:
    """Return an FP32 network with each part in the precision that is faster on a device, conversions included.

    Times of parts do not add up, so that the whole network in floats or in INT8 is taken where it is faster as
    measured. Ranges come from random inputs, which do not matter for time.

    Args:
        content: The ONNX file.
        timer: The device.
    """
    calibrated = _on_any_inputs(content, timer.runtime)
    parts = parts_of(calibrated.proto, timer.runtime)
    prices = part_prices(calibrated, parts, [0.0] * len(parts.parts), timer)
    plans = [tuple(parts.nodes(range(len(parts.parts))))]
    if isinstance(prices, Prices):
        chosen = enclosed(calibrated.proto, parts.nodes(cheapest(parts, prices, 1.0)), timer.runtime)
        plans.insert(0, tuple(chosen))
    plans = [nodes for nodes in dict.fromkeys(plans) if nodes]
    networks = [bytes(with_rest(calibrated, nodes, timer.floats).SerializeToString()) for nodes in ((), *plans)]
    times = timer.whole_ms(networks)
    return networks[times.index(min(times))]


def files_in_turns(dense: Path, slim: Path, timer: PrecisionTimer) -> tuple[bytes, bytes]:
    """Return two FP32 files as a run in mixed precision times them: the dense one in floats, the slim one mixed.

    A delivered file beside `slim` takes its place.
    """
    delivered = delivered_beside(slim, "mixed")
    mixed = delivered.read_bytes() if delivered.is_file() else fastest(slim.read_bytes(), timer)
    return in_precision(dense.read_bytes(), timer.floats, timer.runtime), mixed


def measured_conversions(contents: Sequence[bytes], timer: PrecisionTimer) -> Conversions:
    """Time the conversions in FP32 networks of which every other part is put into INT8.

    They take no time of their own where the device does not tell layers apart, which is said: the correction of whole
    networks has it.
    """
    protos, names = [], set()
    for content in contents:
        calibrated = _on_any_inputs(content, timer.runtime)
        parts = parts_of(calibrated.proto, timer.runtime)
        alternating = parts.nodes(range(0, len(parts.parts), 2))
        names.update(alternating)
        protos.append(with_rest(calibrated, alternating, timer.floats))
    found = timer.kernels(protos)
    if isinstance(found, str):
        say(found)
        return Conversions((0.0, 0.0), (0.0, 0.0))
    return _conversions([kernel for kernels in found for kernel in kernels], names)


def _on_any_inputs(content: bytes, runtime: str) -> Calibrated:
    import onnx

    header = parse_header(content, "the network")
    return Calibrated(
        onnx.load_model_from_string(content), header.inputs[0], any_inputs(header), "minmax", runtime=runtime
    )


def part_prices(
    calibrated: Calibrated, parts: Parts, noise: Sequence[float], timer: PrecisionTimer
) -> Prices | str:
    """Time the parts of a network in both precisions, and the conversions of the values that pass between them.

    Args:
        calibrated: The network.
        parts: Its parts.
        noise: What each part in INT8 adds to the outputs.
        timer: The device.

    Returns:
        The times, or why the device does not tell the parts apart.
    """
    whole, alternating = (parts.nodes(range(0, len(parts.parts), step)) for step in (1, 2))
    found = timer.kernels([with_rest(calibrated, nodes, timer.floats) for nodes in ((), whole, alternating)])
    if isinstance(found, str):
        return found
    floats, int8, mixed = found
    between = _conversions(mixed, set(alternating))
    sizes = np.asarray([crossing.elements for crossing in parts.crossings], dtype=np.float64)
    return Prices(
        float_ms=_by_part(floats, parts),
        int8_ms=_by_part(int8, parts),
        to_int8_ms=(between.to_int8[0] + between.to_int8[1] * sizes).tolist(),
        to_float_ms=(between.to_float[0] + between.to_float[1] * sizes).tolist(),
        noise=tuple(noise),
    )


def kernel_times(protos: Sequence[Any], threads: int) -> list[list[KernelTime]]:
    """Profile networks in turns; returns the kernels of each in execution order."""
    tagged = [tagged_nodes(proto) for proto in protos]
    runs: list[list[list[dict[str, Any]]]] = [[] for _ in protos]
    for _ in range(ROUNDS):
        for place, model in enumerate(tagged):
            runs[place] += profiled_runs(model, threads, RUNS)
    return [_kernels(proto, each) for proto, each in zip(protos, runs, strict=True)]


def tagged_nodes(proto: Any) -> bytes:
    """Return a network with nodes that are named `@INDEX.`; see `networks.tag`."""
    with tempfile.TemporaryDirectory(prefix="compressor-parts-") as folder:
        path = Path(folder) / "network.onnx"
        path.write_bytes(proto.SerializeToString())
        return tag(path).model


def _kernels(proto: Any, runs: Sequence[Sequence[dict[str, Any]]]) -> list[KernelTime]:
    times = np.asarray([[float(kernel["dur"]) for kernel in run] for run in runs]) / 1e3
    found = []
    for kernel, ms in zip(runs[0], np.quantile(times, FAST, axis=0), strict=True):
        index = tag_of(kernel)
        shapes = [shape for each in kernel["args"].get("output_type_shape", []) for shape in each.values()]
        found.append(
            KernelTime(
                node="" if index is None else proto.graph.node[index].name,
                op=str(kernel["args"]["op_name"]),
                ms=float(ms),
                elements=int(np.prod(shapes[0])) if shapes else 0,
            )
        )
    return found


def _by_part(kernels: Sequence[KernelTime], parts: Parts) -> tuple[float, ...]:
    """Sum the kernels of each part, without conversions."""
    part_of = {name: index for index, part in enumerate(parts.parts) for name in (*part.nodes, *part.follow)}
    total = [0.0] * len(parts.parts)
    for kernel in kernels:
        if kernel.node in part_of and kernel.op not in (*TO_INT8, *TO_FLOAT):
            total[part_of[kernel.node]] += kernel.ms
    return tuple(total)


def _conversions(kernels: Sequence[KernelTime], int8: Collection[str] = ()) -> Conversions:
    """Return what conversions take.

    Args:
        kernels: Of networks in mixed precision.
        int8: Nodes in INT8: where a layout is changed for one of them, it is that of a value which becomes INT8.
    """
    kernels = [
        replace(each, op=(TO_INT8 if each.node in int8 else TO_FLOAT)[1]) if each.op == REFORMAT else each
        for each in kernels
    ]
    (enter, each_in), (leave, each_out) = (_conversion(kernels, kinds).tolist() for kinds in (TO_INT8, TO_FLOAT))
    return Conversions((enter, each_in), (leave, each_out))


def _conversion(kernels: Sequence[KernelTime], kinds: tuple[str, str]) -> Floats:
    """Return the milliseconds of a conversion: of each, and of each element.

    Not every conversion changes the layout too, so that the time of the layouts is shared by all.
    """
    from scipy.optimize import nnls

    first, second = ([kernel for kernel in kernels if kernel.op == kind] for kind in kinds)
    if not first:  # engines convert while they change the layout
        first, second = second, []
    if not first:
        return np.zeros(2)
    sizes = np.asarray([kernel.elements for kernel in first], dtype=np.float64)
    terms = np.stack([np.ones(len(sizes)), sizes / max(sizes.max(), 1.0)], axis=1)
    found, _ = nnls(terms, np.asarray([kernel.ms for kernel in first]))
    scaled = found * [1.0, 1.0 / max(sizes.max(), 1.0)]
    own = sum(kernel.ms for kernel in first)
    return np.asarray(scaled * (1.0 + sum(kernel.ms for kernel in second) / max(own, 1e-9)))
