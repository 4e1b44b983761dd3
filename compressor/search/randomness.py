"""A stream of random numbers that belongs to one agent and can be saved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np


class OwnRandomness:
    """Private state of the global generators of Python, numpy and torch.

    Stable-Baselines3 draws from the global generators, and so do training and evaluation. Inside `active()`
    they have this stream's state; afterwards they are as if nothing had been drawn. What an agent draws thus
    depends on its seed alone, and is bit-identical after a resume.

    Args:
        seed: 0 or more.
    """

    def __init__(self, seed: int) -> None:
        import torch

        with _kept():
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            self._state = _global_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use this stream as the global generators."""
        with _kept():
            _set_global_state(self._state)
            try:
                yield
            finally:
                self._state = _global_state()

    def state(self) -> dict[str, Any]:
        """Return the stream's state, as tensors and plain values."""
        import torch

        version, numbers, gauss = self._state["python"]
        kind, keys, position, has_gauss, cached = self._state["numpy"]
        return {
            "python": [version, list(numbers), gauss],
            "numpy": [
                kind,
                torch.from_numpy(keys.astype(np.int64)),
                int(position),
                int(has_gauss),
                float(cached),
            ],
            "torch": self._state["torch"].clone(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        version, numbers, gauss = state["python"]
        kind, keys, position, has_gauss, cached = state["numpy"]
        self._state = {
            "python": (version, tuple(numbers), gauss),
            "numpy": (kind, keys.numpy().astype(np.uint32), position, has_gauss, cached),
            "torch": state["torch"].clone(),
        }


def _global_state() -> dict[str, Any]:
    import torch

    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def _set_global_state(state: Mapping[str, Any]) -> None:
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


@contextmanager
def _kept() -> Iterator[None]:
    before = _global_state()
    try:
        yield
    finally:
        _set_global_state(before)
