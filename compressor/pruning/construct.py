"""Builds groups, legal widths, layers and cost terms from a trace and the user's settings."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compressor.core.errors import CompressorError
from compressor.pruning.counts import Affine, CostTerms, Floats, Product, RoundedTerms, weight_elements
from compressor.pruning.facts import Facts
from compressor.pruning.groups import Group, Resolved, Skipped

Ints = NDArray[np.int64]


#: Default minimum width: a tenth of the dense width, at least one step of the granularity.
MIN_SHARE = 0.1


@dataclass(frozen=True)
class Layer:
    """One call of a weight-bearing operation, with channel counts as functions of widths.

    `kind` is "conv", "depthwise", "grouped", "conv_transpose" or "linear". Sizes are (height, width); (tokens, 1) for a
    sequence, (1, 1) without spatial axes.

    A pruned grouped convolution loses either whole groups or the same number of channels in each group. `groups` is the
    dense number, which is unchanged in the second case. `group_size` is the number of input channels per group in the
    first case (1 for a depthwise convolution), else 0. `reads` are the input channels that one output reads, and
    `positions` is the number of uses of each weight. `counted` is False if fvcore does not count the operation.
    """

    name: str
    kind: str
    module_class: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_hw: tuple[int, int]
    out_hw: tuple[int, int]
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
        """Input channels per group if pruning removes whole groups; 0 if the number of groups is unchanged."""
        if self.kind == "depthwise":
            return 1
        whole = self.groups > 1 and self.reads.is_constant and not self.in_channels.is_constant
        return self.reads.constant if whole else 0

    @property
    def multiply_adds(self) -> Product:
        """Multiply-adds of one input as a function of the widths of all groups."""
        return self.positions.times(self.taps, self.reads, self.out_channels)

    def weights(self, c_in: Any, c_out: Any) -> Floats:
        """Return the weight elements at these channel counts, arrays of any shape."""
        return weight_elements(self.taps, c_in, c_out, self.groups, self.group_size)


class MultiplyAdds:
    """A network's multiply-adds as fvcore counts them: of its layers, and of other operations.

    Args:
        facts, resolved: Results of its trace.
        layers: Its layers.
        groups: Number of groups, G.
    """

    def __init__(self, facts: Facts, resolved: Resolved, layers: Sequence[Layer], groups: int) -> None:
        self._layers = [layer.multiply_adds for layer in layers]
        seen = [layer.multiply_adds for layer in layers if layer.counted]
        unseen = [layer.multiply_adds.times(-1) for layer in layers if not layer.counted]
        plain: dict[str, list[Product]] = {}
        rounded: dict[str, list[Product]] = {}
        for term in facts.terms:
            factors = tuple(resolved.affine(size) for size in term.sizes)
            product = Product(term.constant, factors)
            (rounded if term.rounded else plain).setdefault(term.operation, []).append(product)
        self._total = CostTerms([*seen, *(term for terms in plain.values() for term in terms)], groups)
        self._rounded = RoundedTerms([term for terms in rounded.values() for term in terms], groups)
        self._beside: dict[str, CostTerms | RoundedTerms] = {
            **{name: CostTerms(terms, groups) for name, terms in plain.items()},
            **{name: RoundedTerms(terms, groups) for name, terms in rounded.items()},
            **({UNSEEN: CostTerms(unseen, groups)} if unseen else {}),
        }

    def __call__(self, widths: Ints) -> Ints:
        """Return the multiply-adds of the whole network, (N, G) -> (N,)."""
        return self._total(widths) + self._rounded(widths)

    def layers(self, widths: Ints) -> Ints:
        """Return the multiply-adds of each layer, (N, G) -> (N, layers)."""
        each = [product(widths) for product in self._layers]
        return np.stack(each, axis=1) if each else np.zeros((len(widths), 0), dtype=np.int64)

    def beside(self, widths: Ints) -> dict[str, Ints]:
        """Return the multiply-adds besides the layers by operation, (N, G) -> (N,) each; both sum to the total."""
        return {name: terms(widths) for name, terms in self._beside.items()}


UNSEEN = "layers that fvcore does not count"
"""Name of the negative entry for layers whose multiply-adds are not part of fvcore's total."""


def exclude(resolved: Resolved, frozen: Sequence[str], scope: str) -> None:
    if isinstance(frozen, str):
        frozen = (frozen,)
    for pattern in frozen:
        names = {n for found in resolved.groups for n in (found.name, *found.members)} | {
            s.name for s in resolved.skipped
        }
        if not fnmatch.filter(names, pattern):
            raise CompressorError(
                f"The pattern '{pattern}' of frozen groups matches nothing.",
                f"Names: {some(sorted(names), pattern)}.",
            )
    for index in reversed(range(len(resolved.groups))):
        found = resolved.groups[index]
        if any(fnmatch.fnmatchcase(n, p) for p in frozen for n in (found.name, *found.members)):
            resolved.leave_dense(index, "frozen by the caller")
        elif scope == "inner" and found.coupled:
            resolved.leave_dense(index, "it runs through residual additions (scope 'inner')")


def make_groups(resolved: Resolved, granularity: Any, min_width: Any) -> tuple[Group, ...]:
    names = [found.name for found in resolved.groups]
    groups = []
    for index, found in enumerate(resolved.groups):
        width = int(found.classes.size)
        step = _setting(granularity, found.name, 1, names, "granularity")
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 1:
            raise CompressorError(
                f"The granularity must be a whole number of at least 1, not {step!r}.", "8 suits FP16, 32 INT8."
            )
        # Granularity counts channels; a unit of several channels needs fewer units to be a multiple.
        step = int(step) // math.gcd(int(step), found.unit)
        least = _setting(min_width, found.name, MIN_SHARE, names, "min_width")
        if isinstance(least, bool) or not isinstance(least, (int, float, np.integer)) or not least >= 0:
            raise CompressorError(
                f"A smallest width must be channels or a share, not {least!r}.", "0.1 is a tenth."
            )
        if isinstance(least, float):
            if least > 1:
                raise CompressorError(
                    f"A smallest width of {least} is not a share of the dense width.",
                    "Use an int for channels.",
                )
            least = math.ceil(least * width - 1e-9)
        least = max(step, -(-int(least) // step) * step)
        groups.append(
            Group(found.name, index, width, found.unit, step, min(least, width), found.coupled, found.members)
        )
    return tuple(groups)


def _setting(value: Any, name: str, default: Any, names: Sequence[str], what: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    for pattern in value:
        if not fnmatch.filter(names, pattern):
            raise CompressorError(
                f"The pattern '{pattern}' of {what} matches no group.",
                f"Groups: {some(list(names), pattern)}.",
            )
    for pattern, item in value.items():
        if fnmatch.fnmatchcase(name, pattern):
            return item
    return default


def make_layers(facts: Facts, resolved: Resolved) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            call.name,
            call.kind,
            call.module_class,
            call.kernel,
            call.stride,
            call.padding,
            call.dilation,
            call.groups,
            call.in_hw,
            call.out_hw,
            resolved.affine(call.in_channels),
            resolved.affine(call.out_channels),
            resolved.affine(call.reads),
            Product(call.positions[0], tuple(resolved.affine(size) for size in call.positions[1])),
            call.counted,
        )
        for call in facts.layers
    )


def param_terms(model: nn.Module, facts: Facts, resolved: Resolved) -> list[Product]:
    terms = []
    for name, parameter in model.named_parameters():
        axes = facts.params.get(name, (None,) * parameter.dim())
        sizes = [size if axis is None else axis for size, axis in zip(parameter.shape, axes, strict=True)]
        terms.append(Product(1, tuple(resolved.affine(size) for size in sizes)))
    return terms


def some(names: Sequence[str], wanted: str) -> str:

    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3) or list(names)[:5]
    return ", ".join(near) + (", ..." if len(names) > len(near) else "")


def name_unreached(model: nn.Module, facts: Facts, resolved: Resolved) -> None:
    """Report the modules whose parameters no pass used."""
    named = {skipped.name for skipped in resolved.skipped}
    for name, _ in model.named_parameters():
        path = name.rpartition(".")[0] or name
        if name not in facts.params and path not in named:
            named.add(path)
            resolved.skipped.append(Skipped(path, "the forward pass never reaches it"))
