"""The importance "reconstruction": which channels cost least once the layers that read them are refitted.

The channels of a group go one after the other, each time the one whose loss raises the error of the refitted readers
least (backward elimination, as in optimal brain surgeon, with the second moments of `DenseMoments`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.pruning.groups import Group
from compressor.pruning.least_squares import Ridge
from compressor.pruning.moments import DenseMoments

STRENGTH = 1e-2
"""Of the ridge, in units of the mean variance of a layer's inputs."""


class Reader:
    """A layer that reads the channels of a group, while they are removed.

    Args:
        inverse: That of the second moments of all its inputs, for those of the group, (n, n). Unit after unit.
        weight: Its scaled weights of these inputs, (n, o).
        units: Number of units.
    """

    def __init__(self, inverse: Tensor, weight: Tensor, units: int) -> None:
        if weight.shape[1] > weight.shape[0]:
            # Losses depend on the products of weights alone, of which a square root is smaller.
            values, vectors = torch.linalg.eigh(weight @ weight.T)
            weight = vectors * values.clamp(min=0).sqrt()
        self.inverse, self.weight, self.units = inverse.clone(), weight.clone(), units
        self.size = len(inverse) // units

    def losses(self) -> Tensor:
        """Return by how much the error grows when a unit goes and the other weights are refitted, (units,)."""
        if self.size == 1:
            return self.weight.square().sum(1) / self.inverse.diagonal()
        shape = (self.units, self.size)
        blocks = self.inverse.reshape(*shape, *shape).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        weights = self.weight.reshape(*shape, -1)
        losses: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
        return losses

    def remove(self, unit: int) -> None:
        """Remove a unit, and refit the other weights."""
        gone = slice(unit * self.size, (unit + 1) * self.size)
        across = torch.linalg.solve(self.inverse[gone, gone], self.inverse[gone])
        self.weight.addmm_(across.T, self.weight[gone].clone(), alpha=-1)
        self.inverse.addmm_(self.inverse[:, gone].clone(), across, alpha=-1)
        # Without links to the others a unit that has gone no longer changes, and its block can be inverted.
        self.weight[gone] = 0
        self.inverse[gone], self.inverse[:, gone] = 0, 0
        self.inverse[gone, gone].fill_diagonal_(1)

    def keep(self, units: Tensor) -> None:
        """Forget the units that have gone; the others are numbered anew."""
        rows = (units[:, None] * self.size + torch.arange(self.size)).flatten().to(self.inverse.device)
        self.inverse, self.weight, self.units = self.inverse[rows][:, rows], self.weight[rows], len(units)


def scores(moments: DenseMoments, groups: Sequence[Group]) -> list[NDArray[np.float64] | None]:
    """Return the step at which each unit goes, (width,) per group; None if no layer that reads it has moments."""
    readers: dict[int, list[Reader]] = {group.index: [] for group in groups}
    with torch.no_grad():
        for number in moments.readers:
            for index, reader in _readers(moments, number, groups):
                readers[index].append(reader)
        return [_eliminated(readers[each.index], each.width) if readers[each.index] else None for each in groups]


def _eliminated(readers: Sequence[Reader], width: int) -> NDArray[np.float64]:
    """Return the step at which each unit goes."""
    steps = np.zeros(width)
    units, left = torch.arange(width), torch.ones(width, dtype=torch.bool)
    for step in range(width):
        losses = torch.stack([reader.losses().cpu() for reader in readers]).sum(0)
        chosen = int(torch.where(left, losses, torch.inf).argmin())
        steps[int(units[chosen])], left[chosen] = step, False
        for reader in readers:
            reader.remove(chosen)
        if left.any() and 2 * int(left.sum()) <= len(left):
            for reader in readers:
                reader.keep(torch.nonzero(left).flatten())
            units, left = units[left], left[left]
    return steps


def _readers(moments: DenseMoments, number: int, groups: Sequence[Group]) -> Iterator[tuple[int, Reader]]:
    """Yield each group that a layer reads, and the layer: one for each group of a convolution with groups."""
    layer, found = moments.readers[number], moments.total(number)
    geometry = layer.geometry
    if found is None or (geometry.transposed and geometry.groups > 1):
        return
    slicer, gram = moments.space.slicer, found.gram
    layout = slicer.layouts[dict(slicer.axes[layer.site.weight])[layer.in_axis]]
    ridge = Ridge(gram, layer.site.constant is not None)
    if not ridge.set(STRENGTH):
        return
    inverse = torch.cholesky_inverse(ridge.factor)
    weight = layer.old.reshape(len(inverse), inverse.shape[1], -1)
    for index in layout.groups:
        width = groups[index].width
        here = np.flatnonzero(layout.group == index)
        counts = np.bincount(layout.unit[here], minlength=width)
        if counts.min() != counts.max():
            continue  # some units are read more often than others
        inputs = torch.from_numpy(here[np.argsort(layout.unit[here], kind="stable")].reshape(width, -1))
        if found.of_inputs:
            inputs = torch.unique(inputs // layer.run, dim=1)
        elif geometry.taps > 1:
            inputs = inputs[:, :, None] * geometry.taps + torch.arange(geometry.taps)
        inputs = inputs.flatten().to(inverse.device)
        for each, rows in zip(inverse, weight, strict=True):
            yield index, Reader(each[inputs][:, inputs], rows[inputs], width)
