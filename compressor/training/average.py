"""A moving average of the weights, which often scores better than the last weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a module's parameters; buffers are those of the latest step.

    The decay rises to its value over the first steps, so that a short training forgets its start:
    min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the averaged parameters and the model's own, in place."""
        for own, other in zip(self.module.parameters(), model.parameters(), strict=True):
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average after one more step."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        own: list[torch.Tensor] = list(self.module.parameters())
        new = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(own, new, share)
        for buffer, latest in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(latest)

    def state(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "module": {k: v.detach().clone() for k, v in self.module.state_dict().items()},
        }

    def restore(self, state: Mapping[str, object]) -> None:
        steps, module = state["steps"], state["module"]
        assert isinstance(steps, int)
        assert isinstance(module, Mapping)
        self.steps = steps
        self.module.load_state_dict(module)
