"""Losses beside the cross-entropy: distillation, and the alignment with the structure that a search favors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace


def are_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Return whether scores of classes (N, classes, ...) are those of a network that ends in a softmax, a bool scalar.

    Such scores are not negative, and sum to 1 in each place, within 0.001.
    """
    return (scores >= 0).all() & ((scores.sum(dim=1) - 1).abs() < 1e-3).all()


def logits_of(scores: torch.Tensor) -> torch.Tensor:
    """Return scores of classes (N, classes, ...) as float32 logits: the logarithm of those that are probabilities."""
    scores = scores.float()
    return torch.where(are_probabilities(scores), scores.clamp_min(torch.finfo(scores.dtype).tiny).log(), scores)


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.0
) -> torch.Tensor:
    """Return the divergence of the student's softened predictions from the teacher's, as a scalar.

    "Distilling the knowledge in a neural network" (Hinton et al., 2015), section 2: the Kullback-Leibler
    divergence at a temperature, times the temperature squared, so that its gradient keeps its size when the
    temperature changes.

    Args:
        student_logits: (N, classes); probabilities are taken for what they are (`logits_of`).
        teacher_logits: (N, classes); no gradient flows to them.
        temperature: Above 0; larger values show more of the teacher's probabilities for the wrong classes.
    """
    student = functional.log_softmax(logits_of(student_logits) / temperature, dim=1)
    teacher = functional.log_softmax(logits_of(teacher_logits.detach()) / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


SCORING_TEMPERATURE = 4.0
"""At it, a network that is closer to the dense one on some hundred images is so on others. At a temperature of 1 a few
images of which the dense network is sure are much of the sum (docs/method/compensation.md, "Scores")."""


def divergence(found: torch.Tensor, goals: torch.Tensor) -> float:
    """Return the Kullback-Leibler divergence from the goals at `SCORING_TEMPERATURE`, summed over the inputs, in nats.

    Args:
        found, goals: Logits or log-probabilities, (N, classes).
    """
    temperature = SCORING_TEMPERATURE
    return len(found) * float(distillation_loss(found, goals, temperature)) / temperature**2


def closeness_at(total: float, inputs: int) -> float:
    """Return exp(-d), d the mean of a summed divergence over the inputs: 1 for equal outputs."""
    return math.exp(-max(0.0, total) / max(1, inputs))


class Alignment:
    """A penalty on the weights that a plan would remove.

    "Jointly training and pruning CNNs via learnable agent guidance and alignment" (Ganjdanesh et al., 2024,
    arXiv 2403.19490): beta * sum over the pruned layers of ||(1 - v) * W||_2, unsquared, over the filters
    that the plan removes and the matching input channels of the following layers. Only kernels and
    matrices are penalized: the scale and shift of a batch norm do not matter once nothing reads its channel.

    Args:
        space: Pruning space, which says which part of which weight a plan keeps.
        plan: The favored structure.
        form: "tensor", one norm for all that a weight loses, as in the paper; or "channel", one norm for
            each removed channel (group lasso), which empties weak channels first.
        beta: Weight of the penalty.

    Calling it with the model (the one of the space, or one with the same parameter names) returns a scalar on
    the model's device.
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
        self._masks: dict[str, torch.Tensor] = {}  # 1 for removed entries, 0 for kept ones
        self._dropped: dict[str, dict[int, torch.Tensor]] = {}
        sizes = {name: p.shape for name, p in space.model.named_parameters() if p.ndim > 1}
        if form == "tensor":
            for name, kept in space.keep_masks(plan).items():
                if name in sizes and not kept.all():
                    self._masks[name] = (~kept).float()
        else:
            for name, axes in space.indices(plan).items():
                if name in sizes:
                    gone = {axis: _others(kept, sizes[name][axis]) for axis, kept in axes.items()}
                    self._dropped[name] = {axis: indices for axis, indices in gone.items() if len(indices)}

    def __call__(self, model: nn.Module) -> torch.Tensor:
        parameters = dict(model.named_parameters())
        if self.form == "tensor":
            norms = [_masked_norm(parameters[name], mask) for name, mask in self._masks.items()]
        else:
            norms = [
                _channel_norms(parameters[name], axis)[indices.to(parameters[name].device)].sum()
                for name, axes in self._dropped.items()
                for axis, indices in axes.items()
            ]
        if not norms:
            return next(iter(parameters.values())).new_zeros(())
        return self.beta * torch.stack(norms).sum()


class _MaskedNorm(torch.autograd.Function):
    """||mask * W||_2, with its gradient W / norm computed from the masked copy.

    The penalty is computed in every training step; this takes half the time of autograd through the mask.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        removed = weight * mask
        norm: torch.Tensor = torch.linalg.vector_norm(removed)
        ctx.save_for_backward(removed, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        removed, norm = ctx.saved_tensors
        scale = torch.where(norm > 0, gradients[0] / norm, 0.0)  # at zero, 0 is a subgradient
        return removed * scale, None


def _masked_norm(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the norm of all entries in a removed channel of any axis, each counted once."""
    norm: torch.Tensor = _MaskedNorm.apply(weight, mask.to(weight))
    return norm


def _channel_norms(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the norm of each channel along an axis."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=[d for d in range(weight.ndim) if d != axis])
    return norms


def _others(kept: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask.nonzero().flatten()
