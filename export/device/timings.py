"""The measurements of a timing bundle, as `timing_results` returns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Board:
    """The device, as its script identified it.

    Attributes:
        tensorrt, jetpack, l4t: Versions; the latter two are empty if it is not a Jetson.
        model, gpu, compute_capability: The board, and its GPU as trtexec names it.
        power_mode: Name of the power mode; empty if there is none.
        clock: Maximum clock of the GPU with its unit.
        identity: A hash that distinguishes boards of the same model.
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
        """The device's name in messages."""
        return self.model or self.gpu or "the device"


@dataclass(frozen=True)
class Turn:
    """One measurement of one network.

    Attributes:
        turn, slot: The turn, and the position in the bundle's order, both counted from 1.
        times_ms: Time of each run, in order.
        clocks: Name -> MHz after the measurement.
    """

    turn: int
    slot: int
    times_ms: tuple[float, ...]
    clocks: Mapping[str, int]


@dataclass(frozen=True)
class Timed:
    """The measurements of one network.

    Attributes:
        name: Name in the bundle.
        turns: Its measurements; empty if it could not be built or run.
        reason: Why it could not be built or run.
        layers: (name, milliseconds) of TensorRT's layers; empty if there is no profile.
    """

    name: str
    turns: tuple[Turn, ...]
    reason: str
    layers: tuple[tuple[str, float], ...]

    @property
    def times_ms(self) -> list[float]:
        """Times of all runs of all turns."""
        return [time for turn in self.turns for time in turn.times_ms]


@dataclass(frozen=True)
class Timings:
    """All measurements of a bundle on a device.

    Attributes:
        board: The device.
        networks: Name -> measurements, for all networks of the bundle.
        digest: Checksum of the results' list of checksums, which identifies the results.
        turns, duration_s, warmup_s: Number of turns, and the seconds of measurement and warm-up in each.
    """

    board: Board
    networks: Mapping[str, Timed]
    digest: str
    turns: int
    duration_s: int
    warmup_s: int
