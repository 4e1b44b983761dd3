"""The global random generators, seeded for a while: dropout draws from them, and users' loaders and functions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators, as a checkpoint can hold them."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert not isinstance(keys, str)
    return {
        "torch": torch.get_rng_state(),
        "device": torch.get_device_module(device).get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators to the result of `generator_states`."""
    torch.set_rng_state(states["torch"])
    if states["device"] is not None and device.type == "cuda":
        torch.get_device_module(device).set_rng_state(states["device"], device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
