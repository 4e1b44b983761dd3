"""The pruning space of a network: what may be removed, what that costs, and the smaller network itself."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.pruning.build import build
from compressor.pruning.counts import Affine, CostTerms, RoundedTerms
from compressor.pruning.groups import Group, Resolved, Skipped
from compressor.pruning.importance import Importance, Ranking, rank
from compressor.pruning.inputs import checked_inputs, checked_model
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.skeleton import named_tensors
from compressor.pruning.slicer import RECORD, Slicer, cut
from compressor.pruning.trace import Facts

Ints = NDArray[np.int64]
#: The smallest width unless the user says otherwise: a tenth of the dense one, at least one step of the granularity.
MIN_SHARE = 0.1


@dataclass(frozen=True)
class Layer:
    """One call of an operation that bears weights, in the order of execution; channel counts as functions of widths.

    `kind` is "conv", "depthwise", "grouped", "conv_transpose" or "linear"; `groups` is the dense number. Sizes are
    (height, width), of a sequence (tokens, 1), without space (1, 1).
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


class PruningSpace:
    """Everything that may be pruned in `model`, traced once.

    Args:
        model: Any network that runs in eval mode on `example_input` without a course that depends on data. It is never
            changed; importance and `apply` read its weights of the moment.
        example_input: A tensor, or a tuple of positional arguments. Only shapes, types and devices matter. A batch is
            cut to one input, so that costs are those of one input.
        granularity: Widths are multiples of this many channels (or the dense width); by pattern of group names too.
        min_width: The smallest width: channels (int), a share of the dense width (float), or either by pattern of group
            names. Default: a tenth of the dense width, at least one step.
        frozen: Patterns (fnmatch) of group or module names that stay dense.
        scope: "all", or "inner" to leave groups that run through residual additions dense.

    Raises:
        CompressorError: the forward pass fails or depends on data, the model lies on the meta device, the input on another
            device than the model, or a pattern matches nothing.

    Example: a torchvision ResNet-18 at 3x224x224 has 12 groups, 4 of them coupled by residual additions.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Any, ...],
        *,
        granularity: int | Mapping[str, int] = 1,
        min_width: int | float | Mapping[str, int | float] = MIN_SHARE,
        frozen: Sequence[str] = (),
        scope: Literal["all", "inner"] = "all",
    ) -> None:
        checked_model(model)
        if scope not in ("all", "inner"):
            raise CompressorError(f"scope must be 'all' or 'inner', not {scope!r}.", "Choose one of the two.")
        self.model = model
        self.example_input = checked_inputs(model, example_input)
        built = build(model, self.example_input)
        resolved = built.resolved
        before = len(resolved.groups)
        _exclude(resolved, frozen, scope)
        self.groups: tuple[Group, ...] = _groups(resolved, granularity, min_width)
        self.skipped: tuple[Skipped, ...] = tuple(resolved.skipped)
        self.dense_widths: Ints = np.array([group.width for group in self.groups], dtype=np.int64)
        self.min_widths: Ints = np.array([group.min_width for group in self.groups], dtype=np.int64)
        self._dense_shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        self._index = {group.name: group.index for group in self.groups}
        self._choices = tuple(_choices(group) for group in self.groups)
        self._resolved = resolved
        same = len(resolved.groups) == before
        self.slicer = built.slicer if same else Slicer(built.facts, resolved, built.slicer.swaps)
        self.layers: tuple[Layer, ...] = _layers(built.facts, resolved)
        self._macs = CostTerms(_terms(built.facts.terms, resolved), len(self.groups))
        self._rounded = RoundedTerms(_terms(built.facts.rounded, resolved), len(self.groups))
        self._params = CostTerms(_param_terms(model, built.facts, resolved), len(self.groups))
        self.makers: tuple[tuple[tuple[str, int], ...], ...] = tuple(found.makers for found in resolved.groups)

    # ---------------------------------------------------------------- costs
    def macs(self, widths: Any) -> Any:
        """Multiply-adds of one input as fvcore counts them; (N, G) -> (N,) int64, (G,) -> int."""
        return self._cost(lambda each: self._macs(each) + self._rounded(each), widths)

    def params(self, widths: Any) -> Any:
        """Parameters, tied ones once; (N, G) -> (N,) int64, (G,) -> int."""
        return self._cost(self._params, widths)

    def _cost(self, terms: Callable[[Ints], Ints], widths: Any) -> Any:
        given = np.asarray(widths, dtype=np.int64)
        if given.shape[-1:] != (len(self.groups),) or given.ndim not in (1, 2):
            raise CompressorError(
                f"Widths must have one column for each of the {len(self.groups)} groups, not shape {given.shape}.",
                "Give (G,) or (N, G) whole numbers, in the order of `groups`.",
            )
        costs = terms(np.atleast_2d(given))
        return int(costs[0]) if given.ndim == 1 else costs

    # ---------------------------------------------------------------- widths
    def choices(self, group: int) -> Ints:
        """The legal widths of group `group`, ascending; the last is dense."""
        return self._choices[group].copy()

    def widths(self, x: Mapping[str, int] | Sequence[int] | Ints) -> Ints:
        """Checked widths (G,) from a mapping (groups left out stay dense) or a sequence.

        Raises:
            CompressorError: an unknown group, a wrong number of widths, or a width that is not legal.
        """
        if isinstance(x, Mapping):
            for name in x:
                if name not in self._index:
                    raise CompressorError(f"There is no group '{name}'.", f"Groups: {_some(list(self._index), str(name))}.")
            values: list[Any] = [x.get(group.name, group.width) for group in self.groups]
        else:
            values = list(x)
            if len(values) != len(self.groups):
                raise CompressorError(
                    f"{len(values)} widths for {len(self.groups)} groups.", "Give one for each group, in their order."
                )
        for group, value in zip(self.groups, values, strict=True):
            self._check_width(group, value)
        return np.array(values, dtype=np.int64)

    def _check_width(self, group: Group, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise CompressorError(f"The width of group '{group.name}' must be a whole number, not {value!r}.", "Use round().")
        if value in self._choices[group.index]:
            return
        legal = f"multiples of {group.granularity} from {group.min_width} on, or {group.width}"
        if value > group.width:
            what = f"is above the dense width {group.width}"
        elif value < group.min_width:
            what = f"is below the smallest width {group.min_width}"
        else:
            what = f"is not a multiple of the granularity {group.granularity}"
        raise CompressorError(f"Width {value} of group '{group.name}' {what}.", f"Legal widths: {legal}.")

    def round(self, widths: Any) -> Ints:
        """The legal widths nearest to `widths` (G,), real numbers."""
        wanted = np.asarray(widths, dtype=np.float64)
        if wanted.shape != (len(self.groups),) or not np.isfinite(wanted).all():
            raise CompressorError(
                f"Widths to round must be {len(self.groups)} finite numbers, not shape {wanted.shape}.", "Give one a group."
            )
        nearest = [legal[int(np.abs(legal - value).argmin())] for legal, value in zip(self._choices, wanted, strict=True)]
        return np.array(nearest, dtype=np.int64)

    # ---------------------------------------------------------------- plans
    def rank(self, importance: Importance = "l1", data: Any = None, seed: int = 0) -> Ranking:
        """Channels of every group by importance on the weights of the moment; many plans can share one ranking."""
        return rank(self, importance, data, seed)

    def plan(
        self, widths: Mapping[str, int] | Sequence[int] | Ints, importance: Importance | Ranking = "l1", data: Any = None,
        seed: int = 0,
    ) -> ChannelPlan:
        """Keep the most important channels of each group.

        Args:
            widths: Units to keep, by name (groups left out stay dense) or in the order of `groups`.
            importance: "l1", "l2", "bn", "taylor", "fpgm", "random", a function (group, weights) -> scores, or a Ranking.
            data: Batches for "taylor": pairs of (inputs, labels), or a function of the model that returns a loss.
            seed: For "random".
        """
        checked = self.widths(widths)
        ranking = importance if isinstance(importance, Ranking) else self.rank(importance, data, seed)
        return ChannelPlan({
            group.name: ranking.kept(group.index, int(width)) for group, width in zip(self.groups, checked, strict=True)
        })

    def uniform(self, ratio: float, importance: Importance | Ranking = "l1", data: Any = None, seed: int = 0) -> ChannelPlan:
        """Keep `ratio` of the channels of every group, rounded to legal widths."""
        if not 0 < ratio <= 1:
            raise CompressorError(f"The ratio to keep must lie above 0 and at most at 1, not at {ratio}.", "0.5 keeps half.")
        return self.plan(self.round(ratio * self.dense_widths), importance, data, seed)

    def dense(self) -> ChannelPlan:
        """Keep everything."""
        return ChannelPlan({group.name: tuple(range(group.width)) for group in self.groups})

    def smallest(self, importance: Importance | Ranking = "l1") -> ChannelPlan:
        """Every group at its smallest legal width."""
        return self.plan([int(legal[0]) for legal in self._choices], importance)

    def random_widths(self, rng: np.random.Generator) -> Ints:
        """Every group at a legal width, all equally likely."""
        return np.array([rng.choice(legal) for legal in self._choices], dtype=np.int64)

    # ---------------------------------------------------------------- slicing
    def apply(self, plan: ChannelPlan, model: nn.Module | None = None) -> nn.Module:
        """A new, physically smaller network.

        Args:
            plan: Of this space.
            model: Weights to take instead of the space's own network: a network of the same structure, such as an average.

        It shares nothing mutable with the dense network and stands in the same mode (train or eval), type, device and memory
        format. Hooks of the user are not taken along.
        """
        keep = self._masks(plan)
        widths = np.array([int(mask.sum()) for mask in keep], dtype=np.int64)
        source = self.model if model is None else model
        small = self.slicer.build(source, keep, widths, cut)
        small.__dict__[RECORD]["plan"] = plan
        small.__dict__[RECORD]["dense"] = self._dense_shapes
        return small

    def indices(self, plan: ChannelPlan) -> dict[str, dict[int, Tensor]]:
        """Name of each parameter or buffer that can shrink -> axis -> kept indices, ascending."""
        found = [layout.kept(self._masks(plan)) for layout in self.slicer.layouts]
        return {name: {axis: found[layout] for axis, layout in axes} for name, axes in self.slicer.axes.items()}

    def keep_masks(self, plan: ChannelPlan) -> dict[str, Tensor]:
        """Name of each parameter that can shrink -> bool tensor of its shape, True where the plan keeps the element."""
        indices = self.indices(plan)
        masks = {}
        for name, parameter in self.model.named_parameters():
            if name not in indices:
                continue
            mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            for axis, index in indices[name].items():
                line = torch.zeros(parameter.shape[axis], dtype=torch.bool, device=parameter.device)
                line[index.to(parameter.device)] = True
                mask &= line.reshape([-1 if i == axis else 1 for i in range(parameter.dim())])
            masks[name] = mask
        return masks

    def _masks(self, plan: ChannelPlan) -> list[NDArray[np.bool_]]:
        for name in plan.keep:
            if name not in self._index:
                raise CompressorError(f"The plan names a group '{name}' that this space lacks.", "Was it made for another network?")
        masks = []
        for group in self.groups:
            mask = np.zeros(group.width, dtype=bool)
            kept = plan.keep.get(group.name)
            if kept is None:
                mask[:] = True
            elif kept[-1] >= group.width:
                raise CompressorError(
                    f"The plan keeps channel {kept[-1]} of group '{group.name}', which has {group.width}.",
                    "Was it made for another network?",
                )
            else:
                mask[list(kept)] = True
            masks.append(mask)
        return masks


# -------------------------------------------------------------------- construction
def _exclude(resolved: Resolved, frozen: Sequence[str], scope: str) -> None:
    if isinstance(frozen, str):
        frozen = (frozen,)
    for pattern in frozen:
        names = {n for found in resolved.groups for n in (found.name, *found.members)} | {s.name for s in resolved.skipped}
        if not fnmatch.filter(names, pattern):
            raise CompressorError(f"The pattern '{pattern}' of frozen groups matches nothing.", f"Names: {_some(sorted(names), pattern)}.")
    for index in reversed(range(len(resolved.groups))):
        found = resolved.groups[index]
        if any(fnmatch.fnmatchcase(n, p) for p in frozen for n in (found.name, *found.members)):
            resolved.leave_dense(index, "frozen by the caller")
        elif scope == "inner" and found.coupled:
            resolved.leave_dense(index, "it runs through residual additions (scope 'inner')")


def _groups(resolved: Resolved, granularity: Any, min_width: Any) -> tuple[Group, ...]:
    names = [found.name for found in resolved.groups]
    groups = []
    for index, found in enumerate(resolved.groups):
        width = int(found.classes.size)
        step = _setting(granularity, found.name, 1, names, "granularity")
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 1:
            raise CompressorError(f"The granularity must be a whole number from 1 on, not {step!r}.", "8 suits FP16, 32 INT8.")
        # Granularity counts channels; a unit of several channels needs fewer units to be a multiple.
        step = int(step) // math.gcd(int(step), found.unit)
        least = _setting(min_width, found.name, MIN_SHARE, names, "min_width")
        if isinstance(least, bool) or not isinstance(least, (int, float, np.integer)) or not 0 <= least:
            raise CompressorError(f"A smallest width must be channels or a share, not {least!r}.", "0.1 is a tenth.")
        if isinstance(least, float):
            if least > 1:
                raise CompressorError(f"A smallest width of {least} is no share of the dense width.", "Give an int for channels.")
            least = math.ceil(least * width - 1e-9)
        least = max(step, -(-int(least) // step) * step)
        groups.append(Group(found.name, index, width, found.unit, step, min(least, width), found.coupled, found.members))
    return tuple(groups)


def _setting(value: Any, name: str, default: Any, names: Sequence[str], what: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    for pattern in value:
        if not fnmatch.filter(names, pattern):
            raise CompressorError(f"The pattern '{pattern}' of {what} matches no group.", f"Groups: {_some(list(names), pattern)}.")
    for pattern, item in value.items():
        if fnmatch.fnmatchcase(name, pattern):
            return item
    return default


def _choices(group: Group) -> Ints:
    legal = set(range(group.min_width, group.width + 1, group.granularity)) if group.min_width % group.granularity == 0 else set()
    return np.array(sorted(legal | {group.width}), dtype=np.int64)


def _layers(facts: Facts, resolved: Resolved) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            call.name, call.kind, call.module_class, call.kernel, call.stride, call.padding, call.dilation, call.groups,
            call.in_hw, call.out_hw, resolved.affine(call.in_channels), resolved.affine(call.out_channels),
        )
        for call in facts.layers
    )


def _terms(terms: Sequence[tuple[int, Sequence[Any]]], resolved: Resolved) -> list[tuple[int, list[Affine]]]:
    return [(constant, [resolved.affine(size) for size in sizes]) for constant, sizes in terms]


def _param_terms(model: nn.Module, facts: Facts, resolved: Resolved) -> list[tuple[int, list[Affine]]]:
    terms = []
    for name, parameter in model.named_parameters():
        axes = facts.params.get(name, (None,) * parameter.dim())
        sizes = [size if axis is None else axis for size, axis in zip(parameter.shape, axes, strict=True)]
        terms.append((1, [resolved.affine(size) for size in sizes]))
    return terms


def _some(names: Sequence[str], wanted: str) -> str:
    import difflib

    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.3) or list(names)[:5]
    return ", ".join(near) + (", ..." if len(names) > len(near) else "")

