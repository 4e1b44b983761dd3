"""Lists devices with a known latency (this machine and all tables) and their recommended granularity."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.latency.schema import BLOCKS
from compressor.latency.surface import ALIGNMENT
from compressor.latency.table import LOCAL, LatencyTable, shipped_tables, user_tables
from export.device.here import ORT_CUDA

if TYPE_CHECKING:
    from compressor.pruning.groups import Group

TENSORRT = "tensorrt"


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


def devices() -> list[KnownDevice]:
    """Return `local`, all shipped tables, and the devices that the user measured.

    Raises:
        CompressorError: A shipped table is damaged.
    """
    import importlib.metadata

    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    found = [
        KnownDevice(LOCAL, f"onnxruntime-cpu {version}", ("fp32",), "measured here on first use")
    ]
    for name, path in shipped_tables().items():
        table = LatencyTable.read(path)
        fields = table.fields
        runtime = f"{fields.runtime.name} {fields.runtime.version}".strip()
        found.append(KnownDevice(name, runtime, table.precisions, _how(table)))
    own: dict[tuple[str, str], list[LatencyTable]] = {}
    for _, table in user_tables():
        fields = table.fields
        own.setdefault((table.device, f"{fields.runtime.name} {fields.runtime.version}"), []).append(table)
    for (name, runtime), tables in sorted(own.items()):
        precisions = tuple(sorted({table.precision for table in tables}))
        count = f"{len(tables)} network{'s' if len(tables) > 1 else ''}"
        how = f"measured by you on {tables[-1].fields.date}, {count}"
        found.append(KnownDevice(name, runtime, precisions, how))
    return found


@functools.lru_cache(maxsize=8)
def recommended_granularity(runtime: str, precision: str) -> int:
    """Return the number of which channel counts should be multiples, so that no time is spent on padding.

    Args:
        runtime: `onnxruntime-cpu`, `onnxruntime-cuda` or `tensorrt`.
        precision: `fp32`, `fp16` or `int8`.

    Returns:
        For a GPU: 8 in FP16 and 32 in INT8 (tensor cores), else 1. For ONNX Runtime: the channel block of its
        convolutions on this CPU. Widths are padded to it, and widths that are not a multiple of 4 use a much
        slower kernel.
    """
    if runtime in (TENSORRT, ORT_CUDA):
        return BLOCKS.get(precision, 1)
    from compressor.latency.noise import channel_block

    return channel_block()


def recommended_steps(groups: Iterable[Group], runtime: str, precision: str) -> dict[str, int]:
    """Return a granularity for each group of a space: the recommended one, finer where a group is narrow.

    A step of a whole block would leave a narrow group hardly any choice. ONNX Runtime reads inputs narrower than
    a block without padding, so that finer steps save time there: at most an eighth of the width, and multiples of
    4. Tensor cores pad every width, so that a finer step saves nothing.

    Args:
        groups: Groups of a `PruningSpace`; the result is valid for its argument `granularity`.
        runtime, precision: As in `recommended_granularity`.
    """
    step = recommended_granularity(runtime, precision)
    if runtime in (TENSORRT, ORT_CUDA):
        return {group.name: step for group in groups}
    eighths = {group.name: max(1, group.width * group.unit // 8) for group in groups}
    return {name: min(step, max(ALIGNMENT, 2 ** int(math.log2(count)))) for name, count in eighths.items()}


def _how(table: LatencyTable) -> str:
    if not table.estimated:
        return f"measured on {table.fields.date}"
    parts = []
    for precision, roofline in table.fields.roofline.items():
        errors = roofline.errors
        if errors.left_out_mape is not None:
            parts.append(
                f"{precision} off by {errors.left_out_mape:.0%} on published latencies left out of the fit"
            )
    return "estimated: " + ("; ".join(parts) if parts else "no published latency to compare with")
