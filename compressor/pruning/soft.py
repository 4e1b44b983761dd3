"""Soft masks: a dense copy with scaled channels, for agents that decide on single channels."""

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
    """Create a dense copy of the space's network in which every unit is scaled by its mask.

    The weights that read a unit (axis 1 of convolutions and linear layers) are multiplied by its mask. The weights that
    produce it are not: the following batch-norm would cancel the factor. With masks of 0 and 1 the output equals that
    of the slim network if all readers of a unit have such weights, except for the effect of removed channels on
    batch-norm statistics.

    Args:
        space: The space of the network.
        masks: Mask of each group, (width,), values 0 to 1.
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
