"""Ridge regression of a layer's weights, from samples or from second moments.

A layer computes y = W'x + c in each of its g groups (one for a plain layer, one per channel for a depthwise one): x are
the p inputs of one output position (a patch: channels times kernel), y its o outputs. Second moments are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

STRENGTHS = (1e-9, 1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
"""Ridge strengths in units of the mean variance of the inputs; with infinity only the constant is fitted."""

LARGEST = 2400
"""Inputs of one output up to which second moments are formed (46 MB)."""

COARSE = (1e-6, 1e-3, 1e-2, 0.1, 1.0, math.inf)
"""Strengths for fits from moments, of which a search makes many."""

STEPS = 6
"""Steps in which the regression takes the activation after the layer into account."""

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

    def chosen(self, index: Tensor) -> Gram:
        """Return the moments of some of the inputs."""
        return Gram(self.count, self.mean[:, index], self.square[:, index][:, :, index])


class Ridge:
    """Solver of (Cxx + strength * s * I) (W - W_old) = Cxy - Cxx W_old, s the mean variance of the inputs.

    C are second moments, about the means if there is a constant.
    """

    def __init__(self, gram: Gram, strength: float, constant: bool) -> None:
        self.mean, self.constant, self.strength = gram.mean, constant, strength
        self.xx = gram.square
        if constant:
            self.xx = self.xx - gram.mean[:, :, None] * gram.mean[:, None, :]
        self.singular = False
        if strength != math.inf:
            variance = self.xx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
            ridge = self.xx + torch.diag_embed((strength * variance)[:, None].expand(-1, self.xx.shape[1]))
            self.factor, info = torch.linalg.cholesky_ex(ridge)
            self.singular = bool(int(info.abs().max()))

    def solve(self, xy: Tensor, y: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight, (g, p, o), and constant, (g, o), from the means of x y', (g, p, o), and of y, (g, o)."""
        weight = old
        if self.strength != math.inf:
            if self.constant:
                xy = xy - self.mean[:, :, None] * y[:, None, :]
            weight = old + torch.cholesky_solve(xy - self.xx @ old, self.factor)
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
        offset = self.offset[0] if self.offset[0].shape[1] == 1 else torch.cat(self.offset, 1)
        return torch.cat(self.x, 1), torch.cat(self.goal, 1), offset


class Regression:
    """Fits a layer to its goals.

    With `limits` (the activation after the layer cuts at these values), a sample whose goal lies beyond a limit has no
    error if the output does so too. The squared error with such one-sided goals is minimised step by step: each step
    is a ridge regression to the goals, in which one-sided goals that are met are replaced by the present output.
    Nothing but the right hand side changes from step to step.
    """

    def __init__(self, seen: Samples, left_out: Samples, limits: tuple[float, float] | None, constant: bool) -> None:
        self.seen, self.left_out = seen.joined(), left_out.joined()
        self.limits, self.constant = limits, constant
        self.gram, self.left_out_gram = Gram.of(self.seen[0]), Gram.of(self.left_out[0])
        self.products = _products([self.seen], [self.seen[1]])

    def fit(self, old: Tensor) -> Fit | None:
        """Choose the strength by the error on the samples left out, then fit to all samples with it.

        Args:
            old: Scaled weights before, (g, p, o), float64.

        Returns:
            Scaled weight and constant; None if no strength has a lower error than the old weights.
        """
        before = self._error(old, torch.zeros_like(old[:, 0]))
        best = (before, -1.0)
        for strength in STRENGTHS:
            ridge = Ridge(self.gram, strength, self.constant)
            error = math.inf if ridge.singular else self._error(*ridge.solve(*self.products, old))
            if error < best[0]:
                best = (error, strength)
        error, strength = best
        if strength < 0:
            return None
        steps = 0
        if self.limits is not None and strength != math.inf:
            ridge = Ridge(self.gram, strength, self.constant)
            stepped = self._error(*self._stepped(ridge, [self.seen], self.products, old))
            if stepped < error:
                error, steps = stepped, STEPS
        everything = Ridge(self.gram + self.left_out_gram, strength, self.constant)
        if everything.singular:
            return None
        both = [self.seen, self.left_out]
        products = _products(both, [goal for _, goal, _ in both])
        found = self._stepped(everything, both, products, old) if steps else everything.solve(*products, old)
        return Fit(*found, strength, error, before)

    def _stepped(
        self, ridge: Ridge, parts: Sequence[Part], products: tuple[Tensor, Tensor], old: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = ridge.solve(*products, old)
        for _ in range(STEPS):
            goals = [self._one_sided(part, *found) for part in parts]
            found = ridge.solve(*_products(parts, goals, precise=False), old)
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


def fit_moments(
    seen: Gram, left_out: Gram, kept: Tensor, full: Tensor, old: Tensor, constant: bool
) -> Fit | None:
    """Fit a layer that reads only some of its inputs to the layer that reads all, from moments of all inputs.

    Args:
        seen, left_out: Moments of the inputs of the full layer, and those that choose the strength.
        kept: Numbers of the inputs that are left, (p,).
        full, old: Weights of the full layer, (g, all inputs, o), and of the layer before, (g, p, o), float64.

    Returns:
        None if no strength has a lower error than the old weights.
    """

    def error(weight: Tensor, shift: Tensor) -> float:
        change = -full
        change[:, kept] += weight
        square = (change * (left_out.square @ change)).sum(1)
        return float((square + 2 * shift * (left_out.mean[:, None] @ change)[:, 0] + shift.square()).sum())

    def solved(gram: Gram, strength: float) -> tuple[Tensor, Tensor] | None:
        ridge = Ridge(gram.chosen(kept), strength, constant)
        if ridge.singular:
            return None
        return ridge.solve(gram.square[:, kept] @ full, (gram.mean[:, None] @ full)[:, 0], old)

    before = error(old, torch.zeros_like(old[:, 0]))
    best = (before, -1.0)
    for strength in COARSE:
        found = solved(seen, strength)
        if found is not None and (now := error(*found)) < best[0]:
            best = (now, strength)
    final = None if best[1] < 0 else solved(seen + left_out, best[1])
    return None if final is None else Fit(*final, best[1], best[0], before)
