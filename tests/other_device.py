"""Made-up devices that take this machine's place where a test is about time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from compressor.latency.local import LocalCpu
from compressor.latency.networks import tag
from compressor.latency.operators import network_signature
from compressor.latency.paired import PairSessions, Timing, burst_of
from compressor.latency.request import Request
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from export.engine.bench import summarise
from tests.latency.conftest import MadeUpDevice


@dataclass
class Proportional(MadeUpDevice):
    """Time grows with the weights, channel by channel, so that a small network has something to choose from."""

    offset_ms: float = 0.0

    def whole(self, total: np.ndarray) -> np.ndarray:
        return np.asarray(super().whole(total) + self.offset_ms)

    def rule(self, shape: tuple[int, ...]) -> float:
        return float(0.002 + 1e-5 * np.prod(shape))


_TABLES: dict[tuple[str, str, Request], LatencyTable] = {}


def proportional_table(here: LocalCpu, space: PruningSpace, example: Tensor, request: Request) -> LatencyTable:
    """The table of `Proportional`, in place of `LocalCpu.table`: of the fewest networks, whose times are exact, and
    measured once for the same channels and request.
    """
    key = (network_signature(space), str([space.choices(group.index).tolist() for group in space.groups]), request)
    if key not in _TABLES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalCpu, "time_limit_s", 0.0)
            _TABLES[key] = here.measured(space, example, request, device=Proportional())
    return _TABLES[key]


@dataclass
class OtherDevice:
    """Takes the place of this machine: the table is made on a made-up device, the contract measured on a slower one."""

    factor: float
    noise: float = 0.0
    offset_ms: float = 0.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LocalCpu, "table", proportional_table)
        monkeypatch.setattr("compressor.latency.local.measured", self.measured)

    def install_measuring(self, monkeypatch: pytest.MonkeyPatch, slim_ms: list[float]) -> None:
        """As `install`, with these times of the slim networks, one after another, and the dense one as in the table."""
        self.install(monkeypatch)
        left = iter(slim_ms)

        def scripted(dense: Path, slim: Path, *_: Any) -> Timing:
            return timing([Proportional().measure(tag(dense), 1.0).median_ms] * 9, [next(left)] * 9)

        monkeypatch.setattr("compressor.latency.local.measured", scripted)

    def measured(self, dense: Path, slim: Path, *_: Any) -> Timing:
        device = Proportional(factor=self.factor, noise=self.noise, offset_ms=self.offset_ms)
        first, second = (device.measure(tag(path), 1.0).whole_ms.tolist() for path in (dense, slim))
        return timing(first, second)


def timing(dense_ms: list[float], slim_ms: list[float]) -> Timing:
    """What comes of sessions with a run of each network in turns."""
    sessions = [
        [(burst_of([one]), burst_of([other]))] * 4 for one, other in zip(dense_ms, slim_ms, strict=True)
    ]
    dense, slim = (summarise(each, runtime="made up", version="1", threads=1) for each in (dense_ms, slim_ms))
    return Timing(dense, slim, PairSessions(sessions).ratio())
