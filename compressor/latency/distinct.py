"""Gives values to all-zero weights and biases, so that an untrained network is timed like a trained one.

A residual network usually starts with zeros in its last normalisations, and all networks start with zero biases.
Folded into convolutions these become tensors of zeros, and an ONNX file stores equal tensors once. An untrained network
would be timed with part of its weights only, and would take longer after training.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def with_distinct_weights(model: nn.Module) -> nn.Module:
    """Return the network itself, or a copy with values in place of all-zero weights and biases."""
    import torch

    if not _all_zero(model):
        return model
    filled, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in _all_zero(filled):
            values = torch.rand(weight.shape, generator=generator)
            weight.copy_(0.1 * (values - 0.5))
    return filled


def _all_zero(model: nn.Module) -> list[nn.Parameter]:
    named = (
        (name, parameter)
        for each in model.modules()
        for name, parameter in each.named_parameters(recurse=False)
    )
    return [
        parameter for name, parameter in named if name in ("weight", "bias") and not bool(parameter.any())
    ]
