"""Provenance of a measured table: device, runtime, precision and protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compressor.latency.cache import clocks, cpu_model, governor
from compressor.latency.noise import channel_block
from compressor.latency.schema import DeviceFields, RuntimeFields
from export.device.here import CPU

SECONDS_A_NETWORK = 0.5


@dataclass(frozen=True)
class Provenance:
    """Provenance of a measured table.

    Attributes:
        device, runtime, precision: The measured device, its runtime and precision.
        block: Channels per kernel block.
        protocol, sources: Description of the measurement; identifiers of its data.
    """

    device: DeviceFields
    runtime: RuntimeFields
    precision: Literal["fp32", "fp16", "int8"]
    block: int
    protocol: str
    sources: tuple[str, ...] = ()


def local_cpu_provenance(fitted: int, unseen: int, threads: int) -> Provenance:
    """Return the provenance of a table of this machine's CPU through ONNX Runtime.

    Args:
        fitted, unseen: Number of fitted and of held-out networks.
        threads: Threads of ONNX Runtime.
    """
    import onnxruntime

    return Provenance(
        device=DeviceFields(name="local", sku=cpu_model(), power_mode=governor(), clocks=clocks()),
        runtime=RuntimeFields(name=CPU, version=onnxruntime.__version__, threads=threads),
        precision="fp32",
        block=channel_block(),
        protocol=(
            f"{fitted} measurements of sub-networks, each warmed up and run for {SECONDS_A_NETWORK} s: "
            "end to end, then under ONNX Runtime's profiler (mean of the middle half of the runs), then end to "
            f"end again; {unseen} networks were held out; the dense network first, every dozen, and last; runs that "
            "other processes interrupted or slowed down do not count; a network that met a slow processor or came out "
            "much slower than predicted was measured again, and its least disturbed time counts"
        ),
    )
