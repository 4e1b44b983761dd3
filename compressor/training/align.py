"""Pulling the weights gently towards the structure that a search favours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace


class Alignment:
    """A penalty on the weights that a plan would remove.

    "Jointly training and pruning CNNs via learnable agent guidance and alignment" (Ganjdanesh et al., 2024,
    arXiv 2403.19490): beta * sum over the pruned layers of ||(1 - v) * W||_2, unsquared, over the filters
    that the plan drops and the matching input channels of the layers that follow. Only kernels and
    matrices are penalised: a batch-norm's scale and shift do not matter once nothing reads their channel.

    Args:
        space: Says which part of which weight a plan keeps.
        plan: The favoured structure.
        form: "tensor", one norm for all that a weight loses, as in the paper; or "channel", one norm for
            each channel that it loses (group lasso), which empties weak channels first.
        beta: Weight of the penalty.

    Called with the model (the one that the space was made of, or one with the same parameter names), it
    returns a scalar on the model's device.
    """

    def __init__(
        self,
        space: PruningSpace,
        plan: ChannelPlan,
        form: Literal["tensor", "channel"] = "tensor",
        beta: float = 1e-4,
    ) -> None:
        if form not in ("tensor", "channel"):
            raise ValueError(f"form should be 'tensor' or 'channel', got {form!r}")
        self.form = form
        self.beta = beta
        sizes = {name: p.shape for name, p in space.model.named_parameters() if p.ndim > 1}
        self._dropped: dict[str, dict[int, torch.Tensor]] = {}
        for name, axes in space.indices(plan).items():
            if name in sizes:
                dropped = {axis: _others(kept, sizes[name][axis]) for axis, kept in axes.items()}
                if any(len(indices) for indices in dropped.values()):
                    self._dropped[name] = dropped

    def __call__(self, model: nn.Module) -> torch.Tensor:
        parameters = dict(model.named_parameters())
        norms = [
            self._tensor_norm(parameters[name], dropped)
            if self.form == "tensor"
            else self._channel_norms(parameters[name], dropped)
            for name, dropped in self._dropped.items()
        ]
        if not norms:
            return next(iter(parameters.values())).new_zeros(())
        return self.beta * torch.stack(norms).sum()

    def _tensor_norm(self, weight: torch.Tensor, dropped: dict[int, torch.Tensor]) -> torch.Tensor:
        """The norm of all entries that lie in a dropped channel of any axis, each counted once."""
        norm: torch.Tensor = torch.linalg.vector_norm(_removed(weight, dropped))
        return norm

    def _channel_norms(self, weight: torch.Tensor, dropped: dict[int, torch.Tensor]) -> torch.Tensor:
        """The sum of the norms of all dropped channels."""
        total = weight.new_zeros(())
        for axis, indices in dropped.items():
            if len(indices):
                channels = weight.index_select(axis, indices.to(weight.device)).movedim(axis, 0).flatten(1)
                total = total + torch.linalg.vector_norm(channels, dim=1).sum()
        return total


def _others(kept: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask.nonzero().flatten()


def _removed(weight: torch.Tensor, dropped: dict[int, torch.Tensor]) -> torch.Tensor:
    """The entries in dropped channels: those of the first axis, then what is left of them on the next."""
    parts = []
    for axis, indices in dropped.items():
        gone = indices.to(weight.device)
        parts.append(weight.index_select(axis, gone).flatten())
        weight = weight.index_select(axis, _others(gone, weight.shape[axis]).to(weight.device))
    return torch.cat(parts)
