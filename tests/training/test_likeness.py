"""Closeness to the dense network's outputs, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compressor.training.likeness import (
    RawOutputs,
    Recorded,
    ScoresOfClasses,
    likeness_of,
    same_shapes,
)
from export.convert.trees import outputs_of


def test_scores_of_classes() -> None:
    dense = [torch.tensor([[0.0, 0.0], [2.0, 0.0]])]
    found = [torch.tensor([[0.0, 0.0], [0.0, 2.0]])]
    likeness = ScoresOfClasses()
    p = 1 / (1 + math.exp(-2 / 4))  # at a temperature of 4
    divergence = (p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 2  # of two inputs one differs
    assert likeness.closeness([(found, dense)]) == pytest.approx(math.exp(-divergence), rel=1e-5)
    assert likeness.agreement([(found, dense)]) == 0.5
    assert likeness.closeness([(dense, dense)]) == 1.0


def test_raw_outputs_are_compared_by_the_spread_of_the_dense_ones() -> None:
    dense = [torch.tensor([[0.0], [4.0]]), torch.tensor([1.0, 3.0])]  # squared deviations: 8 and 2
    found = [torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 3.0])]  # squared errors: 2 and 0
    likeness = RawOutputs()
    assert likeness.closeness([(found, dense)]) == pytest.approx(math.exp(-0.125))
    halves = [([each[i : i + 1] for each in found], [each[i : i + 1] for each in dense]) for i in range(2)]
    assert likeness.closeness(halves) == pytest.approx(math.exp(-0.125))
    assert likeness.agreement([(dense, dense)]) == 1.0
    assert likeness.closeness([([found[0] * float("nan"), found[1]], dense)]) == 0.0
    assert float(likeness.distance(found, dense, 4.0)) == pytest.approx((1 / (4 + 1e-6)) / 2)


def test_a_constant_output_is_close_only_if_it_is_equal() -> None:
    dense = [torch.full((3, 1), 2.0)]
    assert RawOutputs().closeness([(dense, dense)]) == 1.0
    assert RawOutputs().closeness([([dense[0] + 1], dense)]) == 0.0


def test_which_outputs_are_scores_of_classes() -> None:
    for outputs, classes in (
        ([torch.zeros(1, 3)], True),
        ([torch.zeros(1, 1)], False),
        ([torch.zeros(1)], False),
        ([torch.zeros(1, 3, 4, 4)], False),
        ([torch.zeros(1, 3), torch.zeros(1, 3)], False),
    ):
        assert isinstance(likeness_of(outputs), ScoresOfClasses) is classes


def test_outputs_of_any_structure() -> None:
    nested = {"a": (torch.zeros(2), torch.zeros(2, dtype=torch.long)), "b": [torch.ones(1)]}
    assert [each.shape for each in outputs_of(nested)] == [(2,), (1,)]  # numbers only
    assert same_shapes([torch.zeros(2)], [torch.ones(2)])
    assert not same_shapes([torch.zeros(2)], [torch.ones(3)])
    assert not same_shapes([], [])


def test_a_call_is_recorded() -> None:
    network = nn.Linear(2, 3)
    with Recorded(network) as call:
        network(torch.zeros(1, 2))
        network(input=torch.ones(4, 2))
    assert call.arguments is not None
    assert call.arguments[1]["input"].shape == (4, 2)
    assert call.output.shape == (4, 3)
    network(torch.zeros(5, 2))
    assert call.output.shape == (4, 3)
