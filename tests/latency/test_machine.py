"""Which runs are undisturbed, and the processor's channel block."""

from __future__ import annotations

import numpy as np

from compressor.latency.machine import channel_block, middle, undisturbed


def test_interrupted_runs_do_not_count() -> None:
    calm = np.stack([np.full(20, 1.0), np.full(20, 1.0)], axis=1)
    assert np.median(undisturbed(calm)) == 1.0
    mixed = calm.copy()
    mixed[:12, 0] = 4.0
    assert set(undisturbed(mixed)) == {1.0}
    mixed[:, 0] = 4.0
    assert set(undisturbed(mixed)) == {1.0}
    assert middle(np.asarray([1.0, 2.0, 4.0, 99.0])) == 3.0


def test_runs_on_a_slowed_processor_do_not_count() -> None:
    slowed = np.tile(np.linspace(1.0, 1.1, 40)[:, None], (1, 2))
    slowed[:30] *= 1.9  # no other process ran on this core: both clocks agree
    assert undisturbed(slowed).tolist() == slowed[30:, 0].tolist()


def test_the_channel_block_is_a_vectors() -> None:
    assert channel_block() in (1, 8, 16)
