"""Costs as functions of widths: sums of products of affine channel counts, evaluated for many candidates at once.

Also defines the number of weight elements of an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def weight_elements(
    taps: ArrayLike, c_in: ArrayLike, c_out: ArrayLike, groups: ArrayLike, group_size: ArrayLike
) -> Floats:
    """Return the number of weight elements of convolutions and linear layers; arguments broadcast.

    Args:
        taps: Height times width of the kernel; 1 for a linear layer.
        c_in: Input channels.
        c_out: Output channels.
        groups: Number of groups; used where `group_size` is 0.
        group_size: Input channels per group if pruning removes whole groups, 1 for depthwise convolutions; 0 if the
            number of groups is unchanged and each group loses channels.

    Example: a grouped convolution of 128 to 128 channels in 32 groups that lost 16 of them has 3 * 3 * 4 * 64 weights:

    >>> weight_elements(9, 64, 64, 32, 4).item()
    2304.0
    """
    size = np.asarray(group_size)
    read = np.where(size > 0, size, np.asarray(c_in) / np.maximum(np.asarray(groups), 1))
    return np.asarray(np.asarray(taps) * read * np.asarray(c_out), dtype=np.float64)


def positions_of(kind: str, in_hw: Sequence[int], out_hw: Sequence[int]) -> int:
    """Return the uses of each weight for one input, from (height, width) of input and output.

    Multiply-adds are this number times the number of weight elements.
    """
    height, width = in_hw if kind == "conv_transpose" else out_hw
    return int(height) * int(width)


@dataclass(frozen=True)
class Affine:
    """A channel count as a function of the widths of all groups: `constant + sum(coefficient * width[group])`.

    Args:
        constant: Channels that are always kept.
        terms: (index of a group, channels per unit of its width), ascending by group.
    """

    constant: int
    terms: tuple[tuple[int, int], ...] = ()

    def __call__(self, widths: Ints) -> Ints:
        """Channels for `widths`, (N, G) -> (N,) or (G,) -> scalar array."""
        given = np.asarray(widths, dtype=np.int64)
        total = np.full(given.shape[:-1], self.constant, dtype=np.int64)
        for group, coefficient in self.terms:
            total = total + coefficient * given[..., group]
        return np.asarray(total, dtype=np.int64)

    @property
    def is_constant(self) -> bool:
        """Whether this count does not depend on any group."""
        return not self.terms


class Product(NamedTuple):
    """A cost: `constant` times a product of channel counts."""

    constant: int
    factors: tuple[Affine, ...] = ()

    def __call__(self, widths: Ints) -> Ints:
        """Costs for `widths`, (N, G) -> (N,) or (G,) -> scalar array."""
        total = np.full(np.asarray(widths).shape[:-1], self.constant, dtype=np.int64)
        for factor in self.factors:
            total = total * factor(widths)
        return np.asarray(total, dtype=np.int64)

    def times(self, constant: int, *factors: Affine) -> Product:
        """Return the product with additional factors."""
        return Product(self.constant * constant, (*self.factors, *factors))


class CostTerms:
    """A sum of terms, each a constant times a product of affine counts.

    Args:
        terms: The terms of the sum.
        groups: Number of groups, G.

    Evaluation is one matrix product for the distinct factors and one gather for each position of a factor. All values
    are whole numbers below 2**53, so that floating point arithmetic is exact and fast.
    """

    def __init__(self, terms: Sequence[Product], groups: int) -> None:
        self._groups = groups
        self._affine: dict[Affine, int] = {}
        merged: dict[tuple[int, ...], int] = {}
        base = 0
        for constant, factors in terms:
            varying = []
            for factor in factors:
                if factor.is_constant:
                    constant *= factor.constant
                else:
                    varying.append(self._affine.setdefault(factor, len(self._affine)))
            if varying:
                key = tuple(sorted(varying))
                merged[key] = merged.get(key, 0) + constant
            else:
                base += constant
        self._base = base
        self._merged = merged

    @cached_property
    def _compiled(
        self,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], list[tuple[Ints, NDArray[np.float64]]]]:
        matrix = np.zeros((self._groups, len(self._affine)))
        offset = np.zeros(len(self._affine))
        for affine, column in self._affine.items():
            offset[column] = affine.constant
            for group, coefficient in affine.terms:
                matrix[group, column] += coefficient
        by_order: dict[int, tuple[list[tuple[int, ...]], list[int]]] = {}
        for key, constant in self._merged.items():
            keys, constants = by_order.setdefault(len(key), ([], []))
            keys.append(key)
            constants.append(constant)
        parts = [
            (np.array(keys, dtype=np.int64), np.array(constants, dtype=np.float64))
            for keys, constants in by_order.values()
        ]
        return matrix, offset, parts

    def __call__(self, widths: Ints) -> Ints:
        """Costs (N,) of the candidates `widths` (N, G)."""
        matrix, offset, parts = self._compiled
        total = np.full(widths.shape[0], float(self._base))
        # Candidates are processed in blocks that fit the processor's cache.
        for start in range(0, widths.shape[0], 512):
            counts = (widths[start : start + 512].astype(np.float64) @ matrix + offset).T
            for keys, constants in parts:
                product = counts[keys[:, 0]]
                for position in range(1, keys.shape[1]):
                    product = product * counts[keys[:, position]]
                total[start : start + 512] += constants @ product
        return np.asarray(np.rint(total), dtype=np.int64)


def as_printed(estimate: Ints) -> Ints:
    """Return the multiply-adds that fvcore reads from numpy's printed einsum estimate.

    These are (estimate + 1), printed with four digits, halved and rounded down.
    """
    value = estimate + 1
    digits = np.floor(np.log10(value)).astype(np.int64)
    # log10 may fall short by one at powers of ten.
    digits += value >= 10 ** (digits + 1)
    step = 10 ** np.maximum(digits - 3, 0)
    whole, rest = np.divmod(value, step)
    up = (2 * rest > step) | ((2 * rest == step) & (whole % 2 == 1))
    return np.asarray((whole + up) * step // 2, dtype=np.int64)


class RoundedTerms:
    """Terms that fvcore counts by numpy's printed estimate of an einsum; each is rounded before it is added."""

    def __init__(self, terms: Sequence[Product], groups: int) -> None:
        # Not merged: each call is rounded separately.
        self._terms = [CostTerms([term], groups) for term in terms]

    def __call__(self, widths: Ints) -> Ints:
        """Costs (N,) of the candidates `widths` (N, G)."""
        total = np.zeros(widths.shape[0], dtype=np.int64)
        for term in self._terms:
            total += as_printed(term(widths))
        return total
