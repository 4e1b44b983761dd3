"""Maps TensorRT's layer times to the network's operators.

TensorRT fuses nodes and names the result after them: `@5. + @6.` for a convolution with its activation. Where the
names identify operators, each operator gets the time of its layers. Newer versions compile whole regions of a network
into one kernel with a name of its own. Operators then get shares of the whole network's time from a fit over all
measured networks, with arithmetic of each kind, memory traffic and launches as terms.
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
    from compressor.pruning.counts import Layer

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

UNSURE = 0.10
"""Largest share of the time without a known operator at which a profile is used."""


@dataclass(frozen=True)
class Shares:
    """Milliseconds of each operator, (operators,), and the share of the time without a known operator."""

    operators_ms: Floats
    unsure: float

    @property
    def trusted(self) -> bool:
        """Whether the profile is usable: most of the time has a known operator, and every operator has a time."""
        return self.unsure <= UNSURE and bool((self.operators_ms > 0).all())


def shares_of_layers(
    layers: Sequence[tuple[str, float]], owner: Sequence[int], weighted: Sequence[int]
) -> Shares:
    """Assign each layer's time to the operator that its name identifies.

    A layer with one weight-bearing node belongs to that operator. A layer without weights belongs to the operator
    that owns its nodes; layout changes carry the name of the node that they serve. The time of a layer with several
    operators, or with none, is assigned to the operator of the preceding layer and counted as unsure.

    Args:
        layers: (name, milliseconds), in execution order.
        owner: Operator that owns each node of the file.
        weighted: Node with the weight of each operator.
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
    """Fit operator times to the times of whole networks; returns milliseconds, (networks, operators).

    Args:
        layers: The operators.
        c_in, c_out: Channels of each network's operators, (networks, operators).
        whole_ms: Time of each network, (networks,).
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
    """Return the fit's terms, (networks, operators, terms): padded MACs of each kind, elements moved, one launch."""
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
