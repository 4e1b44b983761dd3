"""Ridge regression of a layer's weights, from samples or from second moments.

A layer computes y = W'x + c in each of its g groups (one for a plain layer, one per channel for a depthwise one): x are
the p inputs of one output position (a patch: channels times kernel), y its o outputs. Second moments are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

STRENGTHS = (1e-9, 1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
"""Ridge strengths in units of the mean variance of the inputs; with infinity only the constant is fitted."""

LARGEST = 2400
"""Inputs of one output up to which second moments are formed (46 MB)."""

COARSE = (1e-6, 1e-3, 1e-2, 0.1, 1.0, math.inf)
"""Strengths for fits of which a search makes many."""

@dataclass(frozen=True)
class Fit:
    """A refitted layer.

    Args:
        weight: (groups, p, o).
        constant: (groups, o); zeros if the layer cannot hold a constant.
        strength: Of the ridge.
        error, before: Mean squared error of the fit and of the old weights on samples left out.
    """

    weight: Tensor
    constant: Tensor
    strength: float
    error: float
    before: float


@dataclass
class Gram:
    """Second moments of n samples: their number, the mean of x, (g, p), and the mean of x x', (g, p, p)."""

    count: int
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Gram:
        """Return the moments of x, (g, n, p)."""
        wide = x.double()
        n = x.shape[1]
        return cls(n, wide.mean(1), wide.mT @ wide / n)

    def __add__(self, other: Gram) -> Gram:
        n = self.count + other.count
        a, b = self.count / n, other.count / n
        return Gram(n, a * self.mean + b * other.mean, a * self.square + b * other.square)


class Ridge:
    """Solver of (Cxx + strength * s * I) (W - W_old) = Cxy - Cxx W_old, s the mean variance of the inputs.

    C are second moments, about the means if there is a constant. `set` a strength before solving.

    Args:
        gram: Moments of the inputs.
        constant: Whether a constant is fitted.
        inputs: Number over which the variance is averaged, if `gram` is of other coordinates than the inputs'.
    """

    def __init__(self, gram: Gram, constant: bool, inputs: int | None = None) -> None:
        self.mean, self.constant, self.strength = gram.mean, constant, math.inf
        self.xx = gram.square
        if constant:
            self.xx = self.xx - gram.mean[:, :, None] * gram.mean[:, None, :]
        total = self.xx.diagonal(dim1=1, dim2=2).sum(1)
        self.variance = (total / (inputs or self.xx.shape[1])).clamp(min=1e-30)

    def set(self, strength: float) -> bool:
        """Factorise the matrix with a strength; returns whether it is regular."""
        self.strength = strength
        if strength == math.inf:
            return True
        matrix = self.xx.clone()
        matrix.diagonal(dim1=1, dim2=2).add_((strength * self.variance)[:, None])
        self.factor, info = torch.linalg.cholesky_ex(matrix)
        return not int(info.abs().max())

    def gap(self, xy: Tensor, y: Tensor, old: Tensor) -> Tensor:
        """Return the right hand side, (g, p, o), from the means of x y', (g, p, o), and of y, (g, o)."""
        if self.constant:
            xy = xy - self.mean[:, :, None] * y[:, None, :]
        return xy - self.xx @ old

    def solve(self, gap: Tensor, y: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight, (g, p, o), and constant, (g, o), from the right hand side and the mean of y, (g, o)."""
        weight = old
        if self.strength != math.inf:
            weight = old + torch.cholesky_solve(gap, self.factor)
        if not self.constant:
            return weight, torch.zeros_like(y)
        return weight, y - (weight * self.mean[:, :, None]).sum(1)


Part = tuple[Tensor, Tensor, Tensor]
"""Inputs, goals and offsets."""


@dataclass
class Samples:
    """Samples of one layer, in parts: inputs x, (g, n, p), and goals of the scaled output scale * y, (g, n, o).

    `offset` is what is added to the scaled output before the activation, (g, n or 1, o).
    """

    x: list[Tensor] = field(default_factory=list)
    goal: list[Tensor] = field(default_factory=list)
    offset: list[Tensor] = field(default_factory=list)

    def joined(self) -> Part:
        """Return all parts together."""
        alike = self.offset[0].shape[1] != self.x[0].shape[1]  # one for all samples, the same in all parts
        offset = self.offset[0] if alike else torch.cat(self.offset, 1)
        return torch.cat(self.x, 1), torch.cat(self.goal, 1), offset


class Regression:
    """Fits a layer to its goals.

    With `limits` (the activation after the layer cuts at these values), a sample whose goal lies beyond a limit has no
    error if the output does so too. The squared error with such one-sided goals is minimised step by step: each step
    is a ridge regression to the goals, in which one-sided goals that are met are replaced by the present output.
    Nothing but the right hand side changes from step to step.

    Args:
        seen, left_out: Samples that are fitted, and those that choose; all are fitted in the end.
        limits: Values at which the activation cuts.
        constant: Whether a constant is fitted.
        inputs: Number of inputs, if the samples are in other coordinates.
    """

    def __init__(
        self,
        seen: Part,
        left_out: Part,
        limits: tuple[float, float] | None,
        constant: bool,
        inputs: int | None = None,
    ) -> None:
        self.seen, self.left_out = seen, left_out
        self.limits, self.constant, self.inputs = limits, constant, inputs

    def fit(self, old: Tensor, strengths: Sequence[float] = STRENGTHS, most_steps: int = 6) -> Fit | None:
        """Choose the strength by the error on the samples left out, then fit to all samples with it.

        Args:
            old: Scaled weights before, (g, p, o), float64.
            strengths: Strengths that are tried.
            most_steps: Steps in which the activation after the layer is taken into account, where that helps.

        Returns:
            Scaled weight and constant; None if no strength has a lower error than the old weights.
        """
        if 2 * (self.seen[0].shape[1] + self.left_out[0].shape[1]) <= old.shape[1]:
            return self._in_span(old, strengths, most_steps)
        return self._fit(old, strengths, most_steps)

    def _in_span(self, old: Tensor, strengths: Sequence[float], most_steps: int) -> Fit | None:
        """Fit in coordinates of the space that the samples span: the change of the weights lies in it."""
        x = torch.cat([self.seen[0], self.left_out[0]], 1)
        basis = torch.linalg.qr(x.double().mT)[0]  # (g, p, n)

        def within(part: Part) -> Part:
            x, goal, offset = part
            now = (x.double() @ old).to(x.dtype)
            return (x.double() @ basis).to(x.dtype), goal - now, offset + now

        inner = Regression(
            within(self.seen), within(self.left_out), self.limits, self.constant, self.inputs or old.shape[1]
        )
        found = inner._fit(old.new_zeros(len(old), basis.shape[2], old.shape[2]), strengths, most_steps)
        return None if found is None else replace(found, weight=old + basis @ found.weight)

    def _fit(self, old: Tensor, strengths: Sequence[float], most_steps: int) -> Fit | None:
        gram, left_out_gram = Gram.of(self.seen[0]), Gram.of(self.left_out[0])
        seen_products = _products([self.seen], [self.seen[1]])
        before = self._error(old, torch.zeros_like(old[:, 0]))
        best = (before, -1.0)
        ridge = Ridge(gram, self.constant, self.inputs)
        xy, y = seen_products
        gap = ridge.gap(xy, y, old)
        for strength in strengths:
            error = self._error(*ridge.solve(gap, y, old)) if ridge.set(strength) else math.inf
            if error < best[0]:
                best = (error, strength)
        error, strength = best
        if strength < 0:
            return None
        steps = 0
        if self.limits is not None and strength != math.inf and most_steps:
            ridge.set(strength)
            stepped = self._error(*self._stepped(ridge, [self.seen], seen_products, old, most_steps))
            if stepped < error:
                error, steps = stepped, most_steps
        everything = Ridge(gram + left_out_gram, self.constant, self.inputs)
        if not everything.set(strength):
            return None
        both = [self.seen, self.left_out]
        products = _products(both, [goal for _, goal, _ in both])
        return Fit(*self._stepped(everything, both, products, old, steps), strength, error, before)

    def _stepped(
        self, ridge: Ridge, parts: Sequence[Part], products: tuple[Tensor, Tensor], old: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        xy, y = products
        found = ridge.solve(ridge.gap(xy, y, old), y, old)
        for _ in range(steps):
            goals = [self._one_sided(part, *found) for part in parts]
            xy, y = _products(parts, goals, precise=False)
            found = ridge.solve(ridge.gap(xy, y, old), y, old)
        return found

    def _one_sided(self, part: Part, weight: Tensor, constant: Tensor) -> Tensor:
        x, goal, offset = part
        assert self.limits is not None
        found = x @ weight.to(x.dtype) + constant.to(x.dtype)[:, None]
        low, high = self.limits[0] - offset, self.limits[1] - offset
        goal = torch.where(goal <= low, torch.minimum(found, low), goal)
        return torch.where(goal >= high, torch.maximum(found, high), goal)

    def _error(self, weight: Tensor, constant: Tensor) -> float:
        x, goal, offset = self.left_out
        found = x @ weight.to(x.dtype) + constant.to(x.dtype)[:, None]
        if self.limits is not None:
            found, goal = (found + offset).clamp(*self.limits), (goal + offset).clamp(*self.limits)
        return float((found - goal).double().square().sum()) / x.shape[1]


def _products(parts: Sequence[Part], goals: Sequence[Tensor], precise: bool = True) -> tuple[Tensor, Tensor]:
    """Return the means of x y', (g, p, o), and of y, (g, o), over all parts; float64, the products if `precise`."""
    count = sum(x.shape[1] for x, _, _ in parts)
    pairs = [(part[0], goal) for part, goal in zip(parts, goals, strict=True)]
    if precise:
        pairs = [(x.double(), goal.double()) for x, goal in pairs]
    xy = torch.stack([(x.mT @ goal).double() for x, goal in pairs]).sum(0)
    return xy / count, torch.stack([goal.double().sum(1) for _, goal in pairs]).sum(0) / count


@dataclass
class Moments:
    """Second moments of a layer's inputs, and what they say of its scaled outputs y = W'x, without its constant.

    Args:
        gram: Of the inputs.
        xy: Mean of x y', (g, p, o).
        y, yy: Means of y and of its square, (g, o).
    """

    gram: Gram
    xy: Tensor
    y: Tensor
    yy: Tensor

    @classmethod
    def of(cls, gram: Gram, weight: Tensor | None) -> Moments:
        """Return the moments of a layer with scaled weights, (g, p, o), float64; of its inputs themselves if None."""
        if weight is None:
            return cls(gram, gram.square, gram.mean, gram.square.diagonal(dim1=1, dim2=2))
        xy = gram.square @ weight
        return cls(gram, xy, (gram.mean[:, None] @ weight)[:, 0], (weight * xy).sum(1))

    def __add__(self, other: Moments) -> Moments:
        gram = self.gram + other.gram
        if self.of_inputs:
            return Moments.of(gram, None)
        a, b = self.gram.count / gram.count, other.gram.count / gram.count
        return Moments(gram, a * self.xy + b * other.xy, a * self.y + b * other.y, a * self.yy + b * other.yy)

    @property
    def of_inputs(self) -> bool:
        """Whether the outputs are the inputs themselves."""
        return self.y is self.gram.mean

    def chosen(self, inputs: Tensor, outputs: Tensor | None) -> Moments:
        """Return the moments of some of the inputs, (p,), and outputs, (g, o), or all if None."""
        gram = Gram(self.gram.count, self.gram.mean[:, inputs], self.gram.square[:, inputs[:, None], inputs])
        xy, y, yy = self.xy[:, inputs], self.y, self.yy
        if outputs is not None:
            xy = xy.take_along_dim(outputs[:, None], 2)
            y, yy = (each.take_along_dim(outputs, 1) for each in (y, yy))
        return Moments(gram, xy, y, yy)

    def error(self, weight: Tensor, constant: Tensor) -> float:
        """Return the mean squared error of outputs with these weights, (g, p, o), and constant, (g, o)."""
        square = (weight * (self.gram.square @ weight - 2 * self.xy)).sum(1) + self.yy
        mean = (self.gram.mean[:, None] @ weight)[:, 0] - self.y
        return float((square + constant * (2 * mean + constant)).sum())


def fit_moments(seen: Moments, left_out: Moments, old: Tensor, constant: bool) -> Fit | None:
    """Fit a layer to outputs of which moments are known.

    Args:
        seen, left_out: Moments of the inputs that it has, and those that choose the strength.
        old: Scaled weights before, (g, p, o), float64.

    Returns:
        None if no strength has a lower error than the old weights.
    """
    before = left_out.error(old, torch.zeros_like(seen.y))
    best = (before, -1.0)
    ridge = Ridge(seen.gram, constant)
    gap = ridge.gap(seen.xy, seen.y, old)
    for strength in COARSE:
        if ridge.set(strength) and (now := left_out.error(*ridge.solve(gap, seen.y, old))) < best[0]:
            best = (now, strength)
    both = seen + left_out
    everything = Ridge(both.gram, constant)
    if best[1] < 0 or not everything.set(best[1]):
        return None
    found = everything.solve(everything.gap(both.xy, both.y, old), both.y, old)
    return Fit(*found, best[1], best[0], before)
