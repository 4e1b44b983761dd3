"""What a measured table says of itself: on what it was made, running what, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compressor.latency.cache import clocks, cpu_model, governor
from compressor.latency.noise import channel_block
from compressor.latency.schema import DeviceFields, RuntimeFields
from export.device.here import CPU

SECONDS_A_NETWORK = 0.5


@dataclass(frozen=True)
class Made:
    """What a table says of itself where it is not of this machine's CPU.

    Attributes:
        device, runtime, precision: What was measured, running what.
        block: Channels that its kernels compute at once.
        protocol, sources: How it was measured, in words; whose numbers.
    """

    device: DeviceFields
    runtime: RuntimeFields
    precision: Literal["fp32", "fp16", "int8"]
    block: int
    protocol: str
    sources: tuple[str, ...] = ()


def measured_here(fitted: int, unseen: int, threads: int) -> Made:
    """Of this machine's CPU through ONNX Runtime, from so many networks."""
    import onnxruntime

    return Made(
        device=DeviceFields(name="local", sku=cpu_model(), power_mode=governor(), clocks=clocks()),
        runtime=RuntimeFields(name=CPU, version=onnxruntime.__version__, threads=threads),
        precision="fp32",
        block=channel_block(),
        protocol=(
            f"{fitted} measurements of sub-networks, each warmed up and run for {SECONDS_A_NETWORK} s: "
            "end to end, then under ONNX Runtime's profiler (mean of the middle half of the runs), then end to "
            f"end again; {unseen} networks were held out; the dense network first, every dozen, and last; runs that "
            "other processes interrupted or slowed down do not count; a network that met a slow processor or came out "
            "much slower than predicted was measured again, and its calmest time counts"
        ),
    )
