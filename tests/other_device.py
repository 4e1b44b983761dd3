"""Made-up devices that take this machine's place where a test is about time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from compressor.latency.local import local_table
from compressor.latency.ort_profile import tag
from export.stats import LatencyStats, summarise
from tests.latency.conftest import MadeUpDevice


class Proportional(MadeUpDevice):
    """Time grows with the weights, channel by channel, so that a small network has something to choose from."""

    def rule(self, shape: tuple[int, ...]) -> float:
        return float(0.002 + 1e-5 * np.prod(shape))


@dataclass
class OtherDevice:
    """Takes the place of this machine: the table is made on a made-up device, the contract measured on a slower one."""

    factor: float
    noise: float = 0.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "compressor.latency.local.local_table", partial(local_table, device=Proportional())
        )
        monkeypatch.setattr("compressor.timing.measured", self.measured)

    def install_measuring(self, monkeypatch: pytest.MonkeyPatch, slim_ms: list[float]) -> None:
        """As `install`, with these times of the slim networks, one after another."""
        self.install(monkeypatch)
        left = iter(slim_ms)

        def scripted(
            dense: Path, slim: Path, threads: int, repeats: int
        ) -> tuple[LatencyStats, LatencyStats]:
            whole, _ = self.measured(dense, slim, threads, repeats)
            return whole, summarise([next(left)] * 9, runtime="made up", version="1", threads=threads)

        monkeypatch.setattr("compressor.timing.measured", scripted)

    def measured(
        self, dense: Path, slim: Path, threads: int, repeats: int
    ) -> tuple[LatencyStats, LatencyStats]:
        device = Proportional(factor=self.factor, noise=self.noise)
        times = [device.measure(tag(path), 1.0).whole_ms.tolist() for path in (dense, slim)]
        first, second = (summarise(each, runtime="made up", version="1", threads=threads) for each in times)
        return first, second
