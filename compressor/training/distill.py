"""Knowledge distillation from another network."""

from __future__ import annotations

import torch
from torch.nn import functional


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.0
) -> torch.Tensor:
    """Return the divergence of the student's softened predictions from the teacher's, as a scalar.

    "Distilling the knowledge in a neural network" (Hinton et al., 2015), section 2: the Kullback-Leibler
    divergence at a temperature, times the temperature squared, so that its gradient keeps its size when the
    temperature changes.

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes); no gradient flows to them.
        temperature: Above 0; larger values show more of the teacher's probabilities for the wrong classes.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
