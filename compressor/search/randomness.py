"""A stream of random numbers that belongs to one agent and can be saved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from compressor.training.randomness import global_state, packed, set_global_state, unpacked


class OwnRandomness:
    """Private state of the global generators of Python, numpy and torch.

    Stable-Baselines3 draws from the global generators, and so do training and evaluation. Inside `active()`
    they have this stream's state; afterwards they are as if nothing had been drawn. What an agent draws thus
    depends on its seed alone, and is bit-identical after a resume.

    Args:
        seed: 0 or more.
    """

    def __init__(self, seed: int) -> None:
        with _kept():
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            self._state = global_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use this stream as the global generators."""
        with _kept():
            set_global_state(self._state)
            try:
                yield
            finally:
                self._state = global_state()

    def state(self) -> dict[str, Any]:
        """Return the stream's state, as tensors and plain values."""
        return packed(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._state = unpacked(state)


@contextmanager
def _kept() -> Iterator[None]:
    before = global_state()
    try:
        yield
    finally:
        set_global_state(before)
