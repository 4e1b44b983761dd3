"""Costs of a network as functions of its widths: multiply-adds, parameters, and the memory of activations.

The only place for the formulas of one operator: `weight_elements`, `positions_of` and `operator_cost`. A cost of the
whole network is a sum of products of affine channel counts, evaluated for many candidates at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from compressor.pruning.facts import Facts, Labels, LayerShape, Traffic

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UNSEEN = "layers that fvcore does not count"
"""Name of the negative entry for layers whose multiply-adds are not part of fvcore's total."""


# ---------------------------------------------------------------- one operator
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
    """Return the uses of each weight for one image, from (height, width) of input and output.

    Multiply-adds are this number times the number of weight elements.
    """
    return math.prod(int(size) for size in (in_hw if kind == "conv_transpose" else out_hw))


class OperatorCost(NamedTuple):
    """Costs of operators for one input; arrays of one shape.

    Attributes:
        macs: Multiply-adds.
        weights: Weight elements.
        moved: Elements read and written: weights, inputs and outputs.
    """

    macs: Floats
    weights: Floats
    moved: Floats


def operator_cost(
    c_in: ArrayLike,
    c_out: ArrayLike,
    *,
    taps: ArrayLike,
    positions: ArrayLike,
    in_pixels: ArrayLike,
    out_pixels: ArrayLike,
    groups: ArrayLike = 1,
    group_size: ArrayLike = 0,
) -> OperatorCost:
    """Return multiply-adds, weight elements and traffic of convolutions and linear layers; arguments broadcast.

    For the N candidates and L layers of a network pass channels (N, L) and everything else (L,); costs are (N, L).

    Args:
        c_in, c_out: Input and output channels.
        taps, groups, group_size: As for `weight_elements`.
        positions: Uses of each weight for one input, from `positions_of`.
        in_pixels, out_pixels: Height times width of input and output.

    Example: a 3x3 convolution of 16 to 32 channels on 8x8 pixels with stride 1.

    >>> cost = operator_cost(16, 32, taps=9, positions=64, in_pixels=64, out_pixels=64)
    >>> [each.item() for each in cost]
    [294912.0, 4608.0, 7680.0]
    """
    weights = weight_elements(taps, c_in, c_out, groups, group_size)
    moved = weights + np.asarray(c_in) * np.asarray(in_pixels) + np.asarray(c_out) * np.asarray(out_pixels)
    return OperatorCost(np.asarray(positions) * weights, weights, moved)


# ---------------------------------------------------------------- functions of widths
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


AffineOf = Callable[[int | Labels], Affine]
"""Returns the number of kept indices of an axis, given its constant size or its labels: `Resolved.affine`."""


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

    def folded(self) -> Product:
        """Return the same cost, with the factors that do not change as part of the constant."""
        constant = math.prod(factor.constant for factor in self.factors if factor.is_constant)
        varying = tuple(factor for factor in self.factors if not factor.is_constant)
        return Product(self.constant * constant, varying)


class CostTerms:
    """A sum of products of affine counts.

    Args:
        terms: The terms of the sum.
        groups: Number of groups, G.

    Evaluation is one matrix product for the distinct factors and one gather for each position of a factor. All values
    are whole numbers below 2**53, so that floating point arithmetic is exact and fast.
    """

    def __init__(self, terms: Iterable[Product], groups: int) -> None:
        self._groups = groups
        self._base = 0
        self._affine: dict[Affine, int] = {}
        self._merged: dict[tuple[int, ...], int] = {}
        for constant, varying in (term.folded() for term in terms):
            if varying:
                key = tuple(sorted(self._affine.setdefault(each, len(self._affine)) for each in varying))
                self._merged[key] = self._merged.get(key, 0) + constant
            else:
                self._base += constant

    @cached_property
    def _compiled(self) -> tuple[Floats, Floats, list[tuple[Ints, Floats]]]:
        """The distinct factors, as (G, factors) and (factors,); and for each number of factors the terms with as many:
        the columns of their factors, (terms, number), and their constants, (terms,)."""
        matrix = np.zeros((self._groups, len(self._affine)))
        offset = np.zeros(len(self._affine))
        for affine, column in self._affine.items():
            offset[column] = affine.constant
            for group, coefficient in affine.terms:
                matrix[group, column] += coefficient
        by_order: dict[int, dict[tuple[int, ...], int]] = {}
        for key, constant in self._merged.items():
            by_order.setdefault(len(key), {})[key] = constant
        parts = [
            (np.array(list(terms), dtype=np.int64), np.array(list(terms.values()), dtype=np.float64))
            for terms in by_order.values()
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


def _as_printed(estimate: Ints) -> Ints:
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

    def __init__(self, terms: Iterable[Product], groups: int) -> None:
        # Not merged: each call is rounded separately.
        self._terms = [CostTerms([term], groups) for term in terms]

    def __call__(self, widths: Ints) -> Ints:
        """Costs (N,) of the candidates `widths` (N, G)."""
        total = np.zeros(widths.shape[0], dtype=np.int64)
        for term in self._terms:
            total += _as_printed(term(widths))
        return total


# ---------------------------------------------------------------- a traced network
@dataclass(frozen=True)
class Layer(LayerShape):
    """One call of a weight-bearing operation, with channel counts as functions of widths.

    A pruned grouped convolution loses either whole groups or the same number of channels in each group. `groups` is the
    dense number, which is unchanged in the second case.

    Attributes:
        reads: Input channels that one output reads.
        positions: Number of uses of each weight.
        counted: Whether fvcore counts the operation.
    """

    in_channels: Affine
    out_channels: Affine
    reads: Affine
    positions: Product
    counted: bool = True

    @property
    def taps(self) -> int:
        """Height times width of the kernel."""
        return math.prod(self.kernel)

    @property
    def group_size(self) -> int:
        """Input channels per group if pruning removes whole groups (1 if depthwise); 0 if all groups stay."""
        if self.kind == "depthwise":
            return 1
        whole = self.groups > 1 and self.reads.is_constant and not self.in_channels.is_constant
        return self.reads.constant if whole else 0

    @property
    def multiply_adds(self) -> Product:
        """Multiply-adds of one input as a function of the widths of all groups."""
        return self.positions.times(self.taps, self.reads, self.out_channels)

    def weights(self, c_in: ArrayLike, c_out: ArrayLike) -> Floats:
        """Return the weight elements at these channel counts, arrays of any shape."""
        return weight_elements(self.taps, c_in, c_out, self.groups, self.group_size)


class Presence:
    """Which parts of a network belong to blocks, and are there only where the block is.

    A candidate is then a row of the widths of all groups and of 1 or 0 for each block: present or removed.

    Args:
        groups: Number of groups, G.
        layers, terms, steps: Index of a layer, of `Facts.terms` and of `Traffic.steps` -> index of its block.
        parameters: Name of a parameter -> index of its block.
    """

    def __init__(
        self,
        groups: int = 0,
        layers: Mapping[int, int] | None = None,
        terms: Mapping[int, int] | None = None,
        steps: Mapping[int, int] | None = None,
        parameters: Mapping[str, int] | None = None,
    ) -> None:
        self.groups = groups
        self.layers, self.terms, self.steps = layers or {}, terms or {}, steps or {}
        self.parameters = parameters or {}

    def within(self, product: Product, block: int | None) -> Product:
        """Return a cost that counts only where its block is present."""
        return product if block is None else product.times(1, Affine(0, ((self.groups + block, 1),)))


WHOLE = Presence()
"""Of a network all of whose blocks are present."""


def layers_of(facts: Facts, affine: AffineOf) -> tuple[Layer, ...]:
    """Return the layers of a traced network."""
    return tuple(
        Layer(
            **{each.name: getattr(call, each.name) for each in fields(LayerShape)},
            in_channels=affine(call.in_channels),
            out_channels=affine(call.out_channels),
            reads=affine(call.reads),
            positions=Product(call.positions[0], tuple(map(affine, call.positions[1]))),
            counted=call.counted,
        )
        for call in facts.layers
    )


class MultiplyAdds:
    """A network's multiply-adds as fvcore counts them: of its layers, and of other operations.

    Args:
        facts, affine: Result of its trace.
        layers: Its layers.
        columns: Columns of a row: groups, and with `presence` blocks.
    """

    def __init__(
        self,
        facts: Facts,
        affine: AffineOf,
        layers: Sequence[Layer],
        columns: int,
        presence: Presence = WHOLE,
    ) -> None:
        self._layers = [
            presence.within(layer.multiply_adds, presence.layers.get(index)) for index, layer in enumerate(layers)
        ]
        counts = list(zip(self._layers, layers, strict=True))
        seen = [macs for macs, layer in counts if layer.counted]
        unseen = [macs.times(-1) for macs, layer in counts if not layer.counted]
        plain: dict[str, list[Product]] = {}
        rounded: dict[str, list[Product]] = {}
        for index, term in enumerate(facts.terms):
            product = Product(term.constant, tuple(map(affine, term.sizes)))
            product = presence.within(product, presence.terms.get(index))
            (rounded if term.rounded else plain).setdefault(term.operation, []).append(product)
        self._total = CostTerms(chain(seen, *plain.values()), columns)
        self._rounded = RoundedTerms(chain(*rounded.values()), columns)
        #: Multiply-adds besides the layers by operation; with those of the layers they sum to the total.
        self.beside: dict[str, CostTerms | RoundedTerms] = {
            **{name: CostTerms(terms, columns) for name, terms in plain.items()},
            **{name: RoundedTerms(terms, columns) for name, terms in rounded.items()},
            **({UNSEEN: CostTerms(unseen, columns)} if unseen else {}),
        }

    def __call__(self, widths: Ints) -> Ints:
        """Return the multiply-adds of the whole network, (N, G) -> (N,)."""
        return self._total(widths) + self._rounded(widths)

    def layers(self, widths: Ints) -> Ints:
        """Return the multiply-adds of each layer, (N, G) -> (N, layers)."""
        each = [product(widths) for product in self._layers]
        return np.stack(each, axis=1) if each else np.zeros((len(widths), 0), dtype=np.int64)


def parameters_of(
    model: nn.Module, facts: Facts, affine: AffineOf, columns: int, presence: Presence = WHOLE
) -> CostTerms:
    """Return the number of parameters; tied ones are counted once."""
    terms = []
    for name, parameter in model.named_parameters():
        axes = facts.params.get(name, (None,) * parameter.dim())
        sizes = [size if axis is None else axis for size, axis in zip(parameter.shape, axes, strict=True)]
        terms.append(presence.within(Product(1, tuple(map(affine, sizes))), presence.parameters.get(name)))
    return CostTerms(terms, columns)


# ---------------------------------------------------------------- memory of activations
class Activations:
    """Peak number of live activation elements, for any widths: the minimum memory that a runtime needs for them.

    A tensor is alive from the step that creates it to the last step that reads it. The input of a residual branch is
    thus counted until its addition. An elementwise step (activation, batch-norm, addition) writes in place into an
    input that no later step reads, as runtimes do. A view shares the memory of its base. Steps of a removed block do
    not run, and its addition's result is its input.

    Args:
        traffic: Trace of the dense network's activations; slim networks run the same steps.
        affine: Sizes of its axes as functions of widths.
        presence: The blocks of its steps.
    """

    def __init__(self, traffic: Traffic, affine: AffineOf, presence: Presence = WHOLE) -> None:
        sizes = [Product(1, tuple(map(affine, axes))).folded() for axes in traffic.sizes]
        lives = _lives(traffic, sizes)
        self._sizes = list(dict.fromkeys(sizes[piece] for piece in lives))
        column = {size: number for number, size in enumerate(self._sizes)}
        alive = np.zeros((max(1, len(traffic.steps)), len(self._sizes)))
        for piece, (first, last) in lives.items():
            alive[first : last + 1, column[sizes[piece]]] += 1
        blocks = np.array([presence.steps.get(number, -1) for number in range(len(alive))])
        #: Of each block, and of no block first: its column in a row (0 for none), and its steps.
        self._alive: list[tuple[int, Floats]] = []
        for block in np.unique(blocks).tolist():
            steps = np.unique(alive[blocks == block], axis=0)
            # Only a step that no other step dominates can be the peak.
            peaks = np.array([step for step in steps if ((steps >= step).all(axis=1)).sum() == 1])
            self._alive.append((0 if block < 0 else presence.groups + block, peaks))

    def __call__(self, widths: Ints) -> Ints:
        """Return the peak number of live elements, (N, G) -> (N,)."""
        elements = np.array([size(widths) for size in self._sizes], dtype=np.float64).reshape(-1, len(widths))
        peaks = [(steps @ elements).max(axis=0) * (widths[:, column] if column else 1) for column, steps in self._alive]
        return np.asarray(np.max(peaks, axis=0), dtype=np.int64)


def _lives(traffic: Traffic, sizes: Sequence[Product]) -> dict[int, tuple[int, int]]:
    """Return the first and last step of each buffer; a result written in place shares its input's buffer."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, (reads, writes, _) in enumerate(traffic.steps):
        for piece in (*reads, *writes):
            first.setdefault(piece, number)
            last[piece] = number
    place = {piece: piece for piece in first}
    for number, (reads, writes, in_place) in enumerate(traffic.steps):
        if not in_place or len(writes) != 1 or first[writes[0]] != number or writes[0] in reads:
            continue
        for piece in reads:
            home = place[piece]
            if last[home] == number and sizes[piece] == sizes[writes[0]]:
                place[writes[0]] = home
                last[home] = last[writes[0]]
                break
    return {piece: (first[piece], last[piece]) for piece in first if place[piece] == piece}
