"""What a device measured of a bundle of networks, once `timing_results` has read and checked it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Board:
    """The device, as its script found it.

    Attributes:
        tensorrt, jetpack, l4t: Versions; the latter two empty where it is no Jetson.
        model, gpu, compute_capability: The board, and its GPU as trtexec names it.
        power_mode: Its name; empty where there is none.
        clock: Highest clock of the GPU with its unit.
        identity: Which board of its kind it is.
    """

    tensorrt: str
    jetpack: str
    l4t: str
    model: str
    gpu: str
    compute_capability: str
    power_mode: str
    clock: str
    identity: str

    @property
    def title(self) -> str:
        """How messages name it."""
        return self.model or self.gpu or "the device"


@dataclass(frozen=True)
class Turn:
    """One measurement of one network.

    Attributes:
        turn, slot: In which turn, and at which place of the bundle's order, counted from 1.
        times_ms: Each run, in order.
        clocks: Name -> MHz, afterwards.
    """

    turn: int
    slot: int
    times_ms: tuple[float, ...]
    clocks: Mapping[str, int]


@dataclass(frozen=True)
class Timed:
    """One network.

    Attributes:
        name: As in the bundle.
        turns: Its measurements; empty where it could not be built or run.
        reason: Why it could not be.
        layers: (name, milliseconds) of TensorRT's layers; empty where there is no profile.
    """

    name: str
    turns: tuple[Turn, ...]
    reason: str
    layers: tuple[tuple[str, float], ...]

    @property
    def times_ms(self) -> list[float]:
        """All runs of all turns."""
        return [time for turn in self.turns for time in turn.times_ms]


@dataclass(frozen=True)
class Timings:
    """All that a device measured of a bundle.

    Attributes:
        board: The device.
        networks: By name, all of the bundle.
        digest: Checksum of the list of checksums: which results these are.
        turns, duration_s, warmup_s: How often and for how long each network was measured.
    """

    board: Board
    networks: Mapping[str, Timed]
    digest: str
    turns: int
    duration_s: int
    warmup_s: int
