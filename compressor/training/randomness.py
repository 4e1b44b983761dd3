"""The global random generators, seeded for a while: dropout draws from them, and users' loaders and functions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, and restore them afterwards."""
    devices = [device] if device.type not in ("cpu", "mps") else []
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
