"""From TensorRT's layers to the network's operators.

TensorRT fuses nodes and names the result after them: `@5. + @6.` for a convolution with its activation. Where the
names say whose time it is, each operator gets that of its layers. Where they do not (newer versions compile whole
regions of a network into one kernel, and give it a name of their own), operators get their share of the whole
network's time by a fit: arithmetic of each kind, memory traffic and launches, over all networks measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from compressor.latency.ort_profile import TAG
from compressor.latency.schema import FASTEST_MS
from compressor.pruning.counts import positions_of

if TYPE_CHECKING:
    from compressor.pruning.construct import Layer

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

UNSURE = 0.10
"""Share of the time that may lack an owner; more, and the profile says too little about the operators."""


@dataclass(frozen=True)
class Shares:
    """Milliseconds of each operator (operators,), and the share of the time whose owner the names left open."""

    operators_ms: Floats
    unsure: float

    @property
    def trusted(self) -> bool:
        """Whether the names say enough: little without an owner, and a time for every operator."""
        return self.unsure <= UNSURE and bool((self.operators_ms > 0).all())


def shares_of_layers(
    layers: Sequence[tuple[str, float]], owner: Sequence[int], weighted: Sequence[int]
) -> Shares:
    """Give each layer's time to the operator that its name points to.

    A layer with one weight-bearing node belongs to that operator, one without to the operator that its nodes count
    to; changes of layout name what they are for. A layer of several operators, or of none, counts to the operator
    of the layer before it, and as unsure.

    Args:
        layers: (name, milliseconds), in the order of execution.
        owner: For each node of the file, the operator that it counts to.
        weighted: For each operator, the node with its weight.
    """
    times = np.zeros(len(weighted))
    bearing = {node: operator for operator, node in enumerate(weighted)}
    current, unsure = 0, 0.0
    for name, milliseconds in layers:
        nodes = [int(found) for found in TAG.findall(name) if int(found) < len(owner)]
        operators = {bearing[node] for node in nodes if node in bearing} or {
            owner[node] for node in nodes[-1:]
        }
        if len(operators) == 1:
            (current,) = operators
        else:
            unsure += milliseconds
        times[current] += milliseconds
    total = float(times.sum())
    return Shares(times, unsure / total if total > 0 else 1.0)


def fitted_shares(
    layers: Sequence[Layer], c_in: Counts, c_out: Counts, whole_ms: Floats, block: int
) -> Floats:
    """Operator times that explain the times of whole networks, (networks, operators) milliseconds.

    Args:
        layers: The operators.
        c_in, c_out: Channels of each network's operators, (networks, operators).
        whole_ms: (networks,).
        block: Channels are padded to multiples of this.
    """
    from scipy.optimize import nnls

    terms = _work(layers, c_in, c_out, block)
    sums = terms.sum(axis=1)
    scale = np.maximum(np.abs(sums).max(axis=0), 1e-12)
    weighted = sums / scale / whole_ms[:, None]
    found, _ = nnls(
        np.concatenate([weighted, 1e-3 * np.eye(sums.shape[1])]),
        np.concatenate([np.ones(len(whole_ms)), np.zeros(sums.shape[1])]),
    )
    return np.asarray(np.maximum(terms @ (found / scale), FASTEST_MS))


def _work(layers: Sequence[Layer], c_in: Counts, c_out: Counts, block: int) -> Floats:
    """(networks, operators, terms): padded multiply-adds of each kind, elements moved, one launch."""
    kinds = sorted({layer.kind for layer in layers})
    terms = np.zeros((*c_in.shape, len(kinds) + 2))
    for index, layer in enumerate(layers):
        inputs, outputs = c_in[:, index].astype(float), c_out[:, index].astype(float)
        pixels_in, pixels_out = float(np.prod(layer.in_hw)), float(np.prod(layer.out_hw))
        padded = layer.weights(_padded(inputs, block), _padded(outputs, block))
        terms[:, index, kinds.index(layer.kind)] = (
            positions_of(layer.kind, layer.in_hw, layer.out_hw) * padded
        )
        terms[:, index, -2] = (
            inputs * pixels_in + outputs * pixels_out + layer.weights(_padded(inputs, block), outputs)
        )
        terms[:, index, -1] = 1.0
    return terms


def _padded(channels: Floats, block: int) -> Floats:
    return np.asarray(np.ceil(channels / block) * block)
