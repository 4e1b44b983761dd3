"""The devices whose latency is known: this machine, and every shipped table."""

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
    """A line of `compress devices`.

    Attributes:
        name: What --device takes.
        runtime: Runtime and, where known, its version.
        precisions: Precisions that its table was made for.
        how: Whether it is measured or estimated, with the error that it states.
    """

    name: str
    runtime: str
    precisions: tuple[str, ...]
    how: str


def devices() -> list[KnownDevice]:
    """`local`, every shipped table by name, and what the user measured elsewhere.

    Raises:
        CompressorError: a shipped table is damaged.
    """
    import importlib.metadata

    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    found = [
        KnownDevice(LOCAL, f"onnxruntime-cpu {version}", ("fp32",), "measured here when it is asked for")
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
    """Of which number channel counts should be multiples, so that none is paid for without being used.

    Args:
        runtime: `onnxruntime-cpu`, `onnxruntime-cuda` or `tensorrt`.
        precision: `fp32`, `fp16` or `int8`.

    Returns:
        For a GPU 8 in FP16 and 32 in INT8 (tensor cores), else 1. For ONNX Runtime the channel block of its
        convolutions on this CPU: narrower widths are padded to it, and widths that are no multiple of 4 take a
        much slower kernel.
    """
    if runtime in (TENSORRT, ORT_CUDA):
        return BLOCKS.get(precision, 1)
    from compressor.latency.noise import channel_block

    return channel_block()


def recommended_steps(groups: Iterable[Group], runtime: str, precision: str) -> dict[str, int]:
    """A granularity for each group of a space: the recommended one, finer where a group is narrow.

    A narrow group would be left with hardly any choice by a step of a whole block, and ONNX Runtime reads
    inputs narrower than a block unpadded, so that finer steps do pay there. Its steps are at most an eighth
    of the width, and multiples of 4 all the same. Tensor cores pad every width, so that a finer step never
    pays there.

    Args:
        groups: Of a `PruningSpace`; its argument `granularity` takes what is returned.
        runtime, precision: As for `recommended_granularity`.
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
