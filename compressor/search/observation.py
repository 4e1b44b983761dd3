"""The observation of a group before it is pruned: nine numbers, scaled to about 0..1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.search.bounds import Widths

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

FEATURES = (
    "index",
    "channels_in",
    "channels_out",
    "stride",
    "kernel",
    "macs_here",
    "macs_before",
    "macs_after",
    "previous_action",
)


class Observer:
    """Describes a group in the state of an episode (arXiv 2403.19490; the nine numbers of its state).

    A group's layer is the first, in execution order, whose outputs it holds. Its input channels are those
    left by the widths chosen so far. The three counts of MACs add up to the network with all remaining groups
    dense, as a share of the dense network: `macs_before` is fixed whatever is decided from here on, `macs_here` is
    decided by this group, and `macs_after` by those after it. They are differences of whole-network counts, and thus
    correct for coupled groups too, for which no sum over single layers is.
    """

    def __init__(self, space: PruningSpace) -> None:
        self._space = space
        self._dense = np.asarray(space.dense_widths, dtype=np.int64)
        self._smallest = np.array([space.choices(i)[0] for i in range(len(self._dense))], dtype=np.int64)
        self._macs = float(np.asarray(space.macs(self._dense[None]))[0])
        self._producers = [self._producer(i) for i in range(len(self._dense))]
        known = [layer for layer in self._producers if layer is not None]
        dense = self._dense[None]
        inputs = [int(layer.in_channels(dense)[0]) for layer in known]
        self._channels = float(max([*self._dense.tolist(), *inputs]))

        self._stride = float(max([1, *(int(np.max(layer.stride)) for layer in known)]))
        self._kernel = float(max([1, *(int(np.max(layer.kernel)) for layer in known)]))

    def __call__(self, step: int, widths: Widths, previous: float) -> NDArray[np.float32]:
        """Return the observation (9,) before group `step`, with the first `step` of `widths` (G,) chosen."""
        current = self._dense.copy()
        current[:step] = widths[:step]
        rows = np.stack([current, current, current])
        rows[0, step:] = self._smallest[step:]
        rows[1, step + 1 :] = self._smallest[step + 1 :]
        before, with_here, everything = np.asarray(self._space.macs(rows), dtype=np.float64) / self._macs
        layer = self._producers[step]
        return np.array(
            [
                step / len(self._dense),
                0.0 if layer is None else float(layer.in_channels(current[None])[0]) / self._channels,
                self._dense[step] / self._channels,
                0.0 if layer is None else float(np.max(layer.stride)) / self._stride,
                0.0 if layer is None else float(np.max(layer.kernel)) / self._kernel,
                with_here - before,
                before,
                everything - with_here,
                previous,
            ],
            dtype=np.float32,
        )

    def _producer(self, group: int) -> Layer | None:
        for layer in self._space.layers:
            if any(index == group for index, _ in layer.out_channels.terms):
                return layer
        return None


if TYPE_CHECKING:
    from compressor.pruning.space import Layer
