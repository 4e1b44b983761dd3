"""Soft masks: a dense copy whose channels count in part, for agents that decide on single channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace


def soften(space: PruningSpace, masks: Sequence[NDArray[np.float64]]) -> nn.Module:
    """A dense copy of the space's network in which every unit counts as much as its mask says.

    The weights that read a unit (axis 1 of convolutions and linear layers) are multiplied with its mask. Those that
    make it are not: the batch norm behind them would undo that. At masks of 0 and 1 it answers as the slim network does
    wherever every reader of a unit has such weights, up to what its batch-norm statistics make of removed channels.

    Args:
        space: of the network.
        masks: for each group (width,), 0..1.
    """
    network = space.apply(space.dense())
    tensors = dict(network.named_parameters())
    with torch.no_grad():
        for name, axes in space.slicer.axes.items():
            for axis, layout in axes:
                if axis != 1 or name not in tensors or tensors[name].ndim < 2:
                    continue
                group, unit = space.slicer.layouts[layout].group, space.slicer.layouts[layout].unit
                factor = np.ones(len(group), dtype=np.float32)
                for index in space.slicer.layouts[layout].groups:
                    here = group == index
                    factor[here] = masks[index][unit[here]]
                shape = [-1 if each == 1 else 1 for each in range(tensors[name].ndim)]
                tensors[name].mul_(torch.from_numpy(factor).to(tensors[name].device).reshape(shape))
    return network
