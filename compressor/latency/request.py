"""What a device is asked for: the conditions of its times, and how long two networks are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.core.conditions import MEDIAN

if TYPE_CHECKING:
    from compressor.latency.schema import Precision


@dataclass(frozen=True)
class Request:
    """What a table is needed for.

    Attributes:
        model: The network's name, for messages.
        precision: Precision in which networks run; with `mixed` the dense one, which shares are of, is in fp32, or with
            TensorRT in fp16.
        opset: ONNX opset of files that leave this machine.
        threads: Threads of ONNX Runtime on a CPU.
        batch: Inputs of one run.
        streams: Copies of a network that run at the same time.
        time_limit_s: No further sub-network is started after this many seconds; a dozen are always measured. None for
            the device's own limit.
        goal: Mean error on held-out sub-networks, as a share, at which measuring stops early.
        seed: Seed for the choice of sub-networks.
        renew: Whether a remote device that has changed since its table was measured is measured again, not refused.
    """

    model: str = ""
    precision: Precision = "fp32"
    opset: int = 17
    threads: int = 1
    batch: int = 1
    streams: int = 1
    time_limit_s: float | None = None
    goal: float = 0.03
    seed: int = 0
    renew: bool = False


@dataclass(frozen=True)
class Turns:
    """How long two networks are timed in turns.

    Attributes:
        repeats: Number of sessions if there is no target.
        target: Share of the dense network's time that the slim one may take.
        seconds: Time limit.
        percentile: Percentile of single runs that is compared; at the median, undisturbed runs are.
        limit_ms: Largest time of the slim network at another percentile, if the target is in milliseconds; it then
            takes the place of `target`.
    """

    repeats: int = 5
    target: float | None = None
    seconds: float = 90.0
    percentile: float = MEDIAN
    limit_ms: float | None = None
