"""Networks whose weights or biases are all zero here and there, made fit for timing.

A residual network usually begins with its last normalisations at zero, and all begin with biases of zero. Folded into
convolutions they make tensors of nothing but zeros, and equal tensors are stored once in an ONNX file: untrained, such
a network would be timed with a part of its weights, and would take longer once it is trained.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def with_distinct_weights(model: nn.Module) -> nn.Module:
    """The network itself; or where weights or biases are zero throughout, a copy in which these have values."""
    import torch

    if not _empty(model):
        return model
    filled, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in _empty(filled):
            values = torch.rand(weight.shape, generator=generator)
            weight.copy_(0.1 * (values - 0.5))
    return filled


def _empty(model: nn.Module) -> list[nn.Parameter]:
    named = (
        (name, parameter)
        for each in model.modules()
        for name, parameter in each.named_parameters(recurse=False)
    )
    return [
        parameter for name, parameter in named if name in ("weight", "bias") and not bool(parameter.any())
    ]
