"""How close a network's outputs are to the dense network's, where there are no labels or besides them.

`ScoresOfClasses` compares what a classifier returns, `RawOutputs` any tensors. Both are a loss for distillation, a
closeness from 0 to 1 for candidates, and an agreement from 0 to 1 for the report.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.training.losses import closeness_at, distillation_loss, divergence, logits_of

Outputs = Sequence[Tensor]
"""The floating-point tensors of a network's output, (N, ...) each."""


class Likeness(ABC):
    """A comparison of outputs with those of the dense network on the same inputs.

    Attributes:
        counts: Whether the agreement is the share of a number of inputs.
    """

    counts = False

    @abstractmethod
    def distance(self, found: Outputs, goals: Outputs, temperature: float) -> Tensor:
        """Return the loss of a batch, a scalar; no gradient flows to the goals."""

    @abstractmethod
    def closeness(self, pairs: Iterable[tuple[Outputs, Outputs]]) -> float:
        """Return the closeness over all batches of outputs and goals, 0..1: 1 for equal outputs."""

    def agreement(self, pairs: Iterable[tuple[Outputs, Outputs]]) -> float:
        """Return what is reported of all batches, 0..1; the closeness, unless there is a plainer number."""
        return self.closeness(pairs)


class ScoresOfClasses(Likeness):
    """Compares the scores of classes (N, C): divergence of the class probabilities, and equal first classes."""

    counts = True

    def distance(self, found: Outputs, goals: Outputs, temperature: float) -> Tensor:
        return distillation_loss(found[0], goals[0], temperature)

    def closeness(self, pairs: Iterable[tuple[Outputs, Outputs]]) -> float:
        total, seen = 0.0, 0
        for found, goals in pairs:
            mine, theirs = (logits_of(each[0]).log_softmax(dim=1) for each in (found, goals))
            total += divergence(mine, theirs)
            seen += len(mine)
        return closeness_at(total, seen)

    def agreement(self, pairs: Iterable[tuple[Outputs, Outputs]]) -> float:
        equal = seen = 0
        for found, goals in pairs:
            equal += int((found[0].argmax(dim=1) == goals[0].argmax(dim=1)).sum())
            seen += len(found[0])
        return equal / max(1, seen)


class RawOutputs(Likeness):
    """Compares any tensors: the squared error of each, relative to the spread of the dense network's values.

    The closeness is exp(-e), e the mean over the output's tensors of squared error / squared deviation from the mean.
    """

    def distance(self, found: Outputs, goals: Outputs, temperature: float) -> Tensor:
        errors = []
        for mine, theirs in zip(found, goals, strict=True):
            goal = theirs.detach().float()
            errors.append((mine.float() - goal).square().mean() / (goal.var(correction=0) + 1e-6))
        return torch.stack(errors).mean()

    def closeness(self, pairs: Iterable[tuple[Outputs, Outputs]]) -> float:
        sums: list[list[float]] = []  # of each tensor: squared error, values, their sum and sum of squares
        for found, goals in pairs:
            sums = sums or [[0.0] * 4 for _ in goals]
            for total, mine, theirs in zip(sums, found, goals, strict=True):
                goal = theirs.double()
                error = (mine.double() - goal).square().sum()
                total[0] += float(error)
                total[1] += goal.numel()
                total[2] += float(goal.sum())
                total[3] += float(goal.square().sum())
        errors = []
        for squared, count, first, second in sums:
            spread = second - first**2 / max(1.0, count)
            errors.append(squared / max(spread, 1e-12 * second, 1e-300) if squared else 0.0)
        mean = sum(errors) / max(1, len(errors))
        return math.exp(-mean) if math.isfinite(mean) else 0.0


def likeness_of(outputs: Outputs) -> Likeness:
    """Return how outputs for one input are compared: a single tensor (1, C) is taken for the scores of classes."""
    one = len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1
    return ScoresOfClasses() if one else RawOutputs()


def same_shapes(found: Outputs, goals: Outputs) -> bool:
    """Return whether outputs can be compared; a detector returns losses in training and boxes in evaluation."""
    return bool(found) and [each.shape for each in found] == [each.shape for each in goals]


class Recorded:
    """Records what a module was last called with, and what it returned, while it is a context.

    Attributes:
        arguments: Positional and keyword arguments of the last call; None if it was not called.
        output: Its result.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.output: Any = None

    def __enter__(self) -> Recorded:
        self._handle = self._module.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.arguments, self.output = (args, kwargs), output
