"""The importance "reconstruction": which channels cost least once the layers that read them are refitted.

The channels of a group go one after the other, each time the one whose loss raises the error of the refitted readers
least (backward elimination, as in optimal brain surgeon, with the second moments of `DenseMoments`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.pruning.groups import Group
from compressor.pruning.moments import DenseMoments

STRENGTH = 1e-2
"""Of the ridge, in units of the mean variance of a layer's inputs."""


class Reader:
    """A layer that reads the channels of a group, while they are removed.

    Args:
        moments: Second moments of its inputs, (p, p).
        weight: Its scaled weights, (p, o).
        inputs: Inputs of each unit, (units, t).
    """

    def __init__(self, moments: Tensor, weight: Tensor, inputs: Tensor) -> None:
        ridge = STRENGTH * moments.diagonal().mean().clamp(min=1e-30)
        matrix = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        if weight.shape[1] > weight.shape[0]:
            # Losses depend on the products of weights alone, of which a square root is smaller.
            values, vectors = torch.linalg.eigh(weight @ weight.T)
            weight = vectors * values.clamp(min=0).sqrt()
        self.inverse, self.weight, self.inputs = torch.linalg.inv(matrix), weight.clone(), inputs

    def losses(self) -> Tensor:
        """Return by how much the error grows when a unit goes and the other weights are refitted, (units,)."""
        blocks = self.inverse[self.inputs[:, :, None], self.inputs[:, None, :]]
        weights = self.weight[self.inputs]
        losses: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
        return losses

    def remove(self, unit: int) -> None:
        """Remove a unit, and refit the other weights."""
        gone = self.inputs[unit]
        across = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weight -= across.T @ self.weight[gone]
        self.inverse -= self.inverse[:, gone] @ across
        # Without links to the others a unit that has gone no longer changes, and its block can be inverted.
        self.weight[gone] = 0
        self.inverse[gone], self.inverse[:, gone] = 0, 0
        self.inverse[gone, gone] = 1


def scores(moments: DenseMoments, group: Group) -> NDArray[np.float64] | None:
    """Return the step at which each unit goes, (width,); None if no layer that reads the group has moments."""
    readers = list(_readers(moments, group))
    if not readers:
        return None
    steps = np.zeros(group.width)
    left = torch.ones(group.width, dtype=torch.bool)
    for step in range(group.width):
        losses = torch.stack([reader.losses().cpu() for reader in readers]).sum(0)
        unit = int(torch.where(left, losses, torch.inf).argmin())
        steps[unit], left[unit] = step, False
        for reader in readers:
            reader.remove(unit)
    return steps


def _readers(moments: DenseMoments, group: Group) -> Iterator[Reader]:
    """Yield the layers that read the group, one for each group of a convolution with groups."""
    slicer = moments.space.slicer
    for number, layer in moments.readers.items():
        layout = slicer.layouts[dict(slicer.axes[layer.site.weight])[layer.in_axis]]
        found = moments.total(number)
        if found is None or (layout.group != group.index).all():
            continue
        geometry = layer.geometry
        if geometry.transposed and geometry.groups > 1:
            continue
        here = np.flatnonzero(layout.group == group.index)
        counts = np.bincount(layout.unit[here], minlength=group.width)
        if counts.min() != counts.max():
            continue  # some units are read more often than others
        places = torch.from_numpy(here[np.argsort(layout.unit[here], kind="stable")].reshape(group.width, -1))
        gram = found.gram
        matrix = gram.square
        if layer.site.constant is not None:
            matrix = matrix - gram.mean[:, :, None] * gram.mean[:, None, :]
        weight = layer.old
        if found.of_inputs:
            places = torch.unique(places // layer.run, dim=1)
            weight = weight.reshape(1, gram.mean.shape[1], -1)
        elif geometry.taps > 1:
            places = (places[:, :, None] * geometry.taps + torch.arange(geometry.taps)).flatten(1)
        for each in range(len(matrix)):
            yield Reader(matrix[each], weight[each], places.to(matrix.device))
