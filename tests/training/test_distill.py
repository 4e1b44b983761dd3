"""The distillation loss by hand."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.training.distill import distillation_loss


def test_by_hand() -> None:
    """Student undecided, teacher 3 : 1 at temperature 2: KL = sum p ln(p / 0.5), times 4."""
    student = torch.zeros(1, 2)
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_no_loss_where_they_agree_and_no_gradient_for_the_teacher() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(distillation_loss(logits, logits + 3.0, 4.0)) == pytest.approx(0, abs=1e-5)
    student, teacher = logits.clone().requires_grad_(), logits.flip(0).clone().requires_grad_()
    distillation_loss(student, teacher, 4.0).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
