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


def global_state() -> dict[str, Any]:
    """Return the states of the global generators on the CPU, as the generators give them."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def set_global_state(state: Mapping[str, Any]) -> None:
    """Set the global generators to the result of `global_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of `global_state` as a checkpoint can hold it: tensors and plain values."""
    version, words, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": state["torch"].clone(),
    }


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `packed` was given."""
    version, words, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    return {
        "python": (version, tuple(words), gauss),
        "numpy": (kind, keys.numpy().astype(np.uint32), position, has_gauss, cached),
        "torch": state["torch"].clone(),
    }


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators, those of a device included, as a checkpoint can hold them."""
    own = torch.get_device_module(device).get_rng_state(device) if device.type == "cuda" else None
    return {**packed(global_state()), "device": own}


def restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators to the result of `generator_states`."""
    set_global_state(unpacked(states))
    if states["device"] is not None and device.type == "cuda":
        torch.get_device_module(device).set_rng_state(states["device"], device)
