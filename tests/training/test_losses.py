"""The distillation loss and the alignment term by hand, and what alignment does to weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressor.pruning.space import PruningSpace
from compressor.training.losses import Alignment, distillation_loss, divergence, logits_of


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


def test_a_softmax_at_the_end_changes_no_loss_and_no_gradient() -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)) * 4
    logits, ended = student.clone().requires_grad_(), student.clone().requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    for found in (logits, ended.softmax(dim=1)):
        loss = functional.cross_entropy(logits_of(found), labels) + distillation_loss(found, teacher.softmax(dim=1))
        loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert ended.grad is not None
    torch.testing.assert_close(ended.grad, logits.grad, rtol=1e-4, atol=1e-6)
    assert divergence(student.softmax(dim=1), teacher) == pytest.approx(divergence(student, teacher), rel=1e-4)
    assert torch.equal(logits_of(student), student)
    one_hot = torch.eye(5)  # a softmax that is as sure as a float can be
    assert logits_of(one_hot).isfinite().all()
    torch.testing.assert_close(logits_of(one_hot).softmax(dim=1), one_hot)


@pytest.fixture
def chain() -> PruningSpace:
    """conv 3 -> 2, then linear 2 -> 2, in which the middle channels can go."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=True),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return PruningSpace(model, torch.zeros(1, 3, 8, 8))


def expected(space: PruningSpace, form: str, kept: tuple[int, ...]) -> float:
    gone = [channel for channel in range(4) if channel not in kept]
    conv = space.model.get_parameter("0.weight").detach()
    linear = space.model.get_parameter("5.weight").detach()
    if form == "tensor":
        return float(conv[gone].norm() + linear[:, gone].norm())
    return float(sum(conv[c].norm() + linear[:, c].norm() for c in gone))


@pytest.mark.parametrize("form", ["tensor", "channel"])
def test_both_forms_by_hand(chain: PruningSpace, form: str) -> None:
    plan = chain.plan([2])
    (kept,) = plan.keep.values()
    align = Alignment(chain, plan, form=form, beta=0.5)  # type: ignore[arg-type]
    assert float(align(chain.model).detach()) == pytest.approx(0.5 * expected(chain, form, kept), rel=1e-5)


def test_entries_dropped_along_both_axes_count_once() -> None:
    """In a chain of three, the middle kernel loses filters and input channels, whose corner overlaps."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    space = PruningSpace(model, torch.zeros(1, 3, 4, 4))
    plan = space.plan([1, 2])
    # kernels of ones: 3 filters of 3; 24 entries of which 1 * 2 stay; 2 rows of which 4 columns go
    assert float(Alignment(space, plan, beta=1.0)(model).detach()) == pytest.approx(9**0.5 + 22**0.5 + 8**0.5)
    # three filters of 3, four of 4, three inputs of 6, four columns of 2
    by_channel = 3 * 3**0.5 + 4 * 4**0.5 + 3 * 6**0.5 + 4 * 2**0.5
    assert float(Alignment(space, plan, form="channel", beta=1.0)(model).detach()) == pytest.approx(
        by_channel
    )


def test_the_dense_plan_costs_nothing(chain: PruningSpace) -> None:
    assert float(Alignment(chain, chain.dense(), beta=1.0)(chain.model)) == 0.0


@pytest.mark.parametrize("form", ["tensor", "channel"])
def test_only_what_goes_is_pulled(chain: PruningSpace, form: str) -> None:
    plan = chain.plan([2])
    (kept,) = plan.keep.values()
    before = {name: p.detach().clone() for name, p in chain.model.named_parameters()}
    align = Alignment(chain, plan, form=form, beta=1.0)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(chain.model.parameters(), lr=0.01)
    start = float(align(chain.model).detach())
    for _ in range(20):
        optimizer.zero_grad()
        align(chain.model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(align(chain.model).detach()) < start - 0.1
    conv, linear = chain.model.get_parameter("0.weight"), chain.model.get_parameter("5.weight")
    assert torch.equal(conv[list(kept)], before["0.weight"][list(kept)])
    assert torch.equal(linear[:, list(kept)], before["5.weight"][:, list(kept)])
    assert torch.equal(chain.model.get_parameter("1.weight"), before["1.weight"])


@pytest.mark.parametrize("form", ["tensor", "channel"])
def test_emptied_channels_have_no_gradient_instead_of_nan(chain: PruningSpace, form: str) -> None:
    with torch.no_grad():
        for parameter in chain.model.parameters():
            parameter.zero_()
    align = Alignment(chain, chain.plan([2]), form=form)  # type: ignore[arg-type]
    align(chain.model).backward()  # type: ignore[no-untyped-call]
    gradient = chain.model.get_parameter("0.weight").grad
    assert gradient is not None
    assert not gradient.any()
    assert gradient.isfinite().all()


def test_unknown_form(chain: PruningSpace) -> None:
    with pytest.raises(ValueError, match="'tensor' or 'channel'"):
        Alignment(chain, chain.dense(), form="matrix")  # type: ignore[arg-type]
