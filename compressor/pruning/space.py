"""The pruning space of a network: prunable groups, their costs, and the pruned network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.models.computed import computed_weights, fix_weights
from compressor.pruning.blocks import Block
from compressor.pruning.build import build, check_model, checked_inputs, find_blocks
from compressor.pruning.costs import Costs, blocks_of, presence_of
from compressor.pruning.counts import Ints, Layer, layers_of
from compressor.pruning.groups import (
    MIN_SHARE,
    Group,
    Skipped,
    checked_widths,
    exclude,
    legal_widths,
    make_groups,
    name_others,
    nearest_widths,
    some,
)
from compressor.pruning.importance import Importance, Ranking, rank
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.removal import inside
from compressor.pruning.skeleton import copy_structure, named_tensors
from compressor.pruning.slicer import RECORD, Slicer, cut

__all__ = ["Layer", "PruningSpace"]


class PruningSpace:
    """All prunable groups of `model`, from one trace.

    Args:
        model: Any network that runs in eval mode on `example_input` without data-dependent control flow. It is
            never changed; importance and `apply` read its present weights. If it computes weights from other tensors
            (weight_norm, spectral_norm), `space.model` is a copy with plain weights: train that one.
        example_input: A tensor, or a tuple of positional arguments. Only shapes, types and devices matter. A batch
            is reduced to one input, so that costs are those of one input.
        granularity: Widths are multiples of this many channels (or the dense width); by pattern of group names too.
        min_width: The smallest width: units (int), a share of the dense width (float), or either by pattern of
            group names. Default: a tenth of the dense width, at least one step.
        frozen: Patterns (fnmatch) of group or module names that stay dense.
        scope: "all", or "inner" to keep groups of residual additions dense.
        depth: Whether a search may remove `blocks`, too: its candidates are then rows of the widths of all groups and
            of 1 or 0 for each block, present or removed.

    Raises:
        CompressorError: The forward pass fails or depends on data, the model is on the meta device, the input is on
            another device than the model, or a pattern matches nothing.

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
        depth: bool = False,
    ) -> None:
        check_model(model)
        if scope not in ("all", "inner"):
            raise CompressorError(f"scope must be 'all' or 'inner', not {scope!r}.", "Choose one of the two.")
        self._given, self._given_versions = model, _versions(model)
        if computed_weights(model):
            model = fixed_copy(model)
        self.model = model
        self.example_input = checked_inputs(model, example_input)
        built = build(model, self.example_input)
        facts, resolved = built.facts, built.resolved
        name_others(model, facts, resolved)
        before = len(resolved.groups)
        exclude(resolved, frozen, scope)
        same = len(resolved.groups) == before
        self.slicer = built.slicer if same else Slicer(facts, resolved, built.slicer.swaps)
        self.groups: tuple[Group, ...] = make_groups(resolved, granularity, min_width)
        self.skipped: tuple[Skipped, ...] = tuple(resolved.skipped)
        self.dense_widths: Ints = np.array([group.width for group in self.groups], dtype=np.int64)
        self.min_widths: Ints = np.array([group.min_width for group in self.groups], dtype=np.int64)
        self.layers: tuple[Layer, ...] = layers_of(facts, resolved.affine)
        #: Tensors that produce the channels of each group, with the axis.
        self.makers: tuple[tuple[tuple[str, int], ...], ...] = tuple(found.makers for found in resolved.groups)
        #: Channels of the network's first output, or those among which it chooses: the classes of a classifier.
        self.outputs = facts.classes
        self._choices = tuple(legal_widths(group) for group in self.groups)
        self.depth = depth
        self._built = built
        self._costs = Costs(model, facts, resolved.affine, self.layers, len(self.groups))
        self._dense_shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        self._steps, self._group_of = facts.steps, resolved.group

    # ---------------------------------------------------------------- blocks
    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks that can be removed whole, in the order in which the network runs them."""
        return self._blocks[0]

    @property
    def blocks_left(self) -> tuple[Skipped, ...]:
        """What looks like a block and stays, with the reason."""
        return self._blocks[1]

    @cached_property
    def _blocks(self) -> tuple[tuple[Block, ...], tuple[Skipped, ...]]:
        # Found when they are first asked for: the network runs once more, without them.
        self._branches, left = find_blocks(self.model, self.example_input, self._built)
        return blocks_of(self._branches, self._built.facts, self.slicer), tuple(left)

    @cached_property
    def _costs_by_block(self) -> Costs:
        columns = len(self.groups) + len(self.blocks)
        presence = presence_of(self.model, self._branches, self.blocks, self._built.facts, len(self.groups))
        affine = self._built.resolved.affine
        return Costs(self.model, self._built.facts, affine, self.layers, columns, presence)

    @property
    def columns(self) -> int:
        """Number of columns of a search's rows: groups, and with `depth` blocks."""
        return len(self.groups) + (len(self.blocks) if self.depth else 0)

    @property
    def dense_row(self) -> Ints:
        """The dense network as a row of a search, (columns,)."""
        return np.append(self.dense_widths, np.ones(self.columns - len(self.groups), dtype=np.int64))

    @property
    def smallest_row(self) -> Ints:
        """The smallest network as a row of a search, (columns,): with `depth` all blocks are removed."""
        return np.append(self.min_widths, np.zeros(self.columns - len(self.groups), dtype=np.int64))

    def row(self, plan: ChannelPlan) -> Ints:
        """Return a plan as a row: widths (G,), and where the plan or a search removes blocks, 1 or 0 for each."""
        widths = self.widths(plan.widths)
        if not (plan.removed or self.depth):
            return widths
        gone = set(self._removed(plan.removed))
        return np.append(widths, [int(block.index not in gone) for block in self.blocks]).astype(np.int64)

    def settled(self, rows: Ints) -> Ints:
        """Return rows (N, columns) with dense groups in removed blocks, so that equal networks have equal rows."""
        if rows.shape[1] == len(self.groups):
            return rows
        rows = rows.copy()
        for block in self.blocks:
            here = np.flatnonzero(rows[:, len(self.groups) + block.index] == 0)
            for group in block.groups:
                rows[here, group] = self.groups[group].width
        return rows

    def present(self, rows: NDArray[Any]) -> NDArray[np.bool_]:
        """Return whether each of `layers` is there in the networks of rows (N, columns), (N, layers)."""
        found = np.ones((len(rows), len(self.layers)), dtype=bool)
        if rows.shape[1] > len(self.groups):
            for block in self.blocks:
                found[:, list(block.layers)] = rows[:, len(self.groups) + block.index, None] > 0
        return found

    def _removed(self, names: Sequence[str]) -> list[int]:
        """Return the indices of blocks by their names."""
        known = {block.name: block.index for block in self.blocks} if names else {}
        for name in names:
            if name not in known:
                reason = next((each.reason for each in self.blocks_left if each.name == name), "")
                raise CompressorError(
                    f"There is no block '{name}' that can be removed{f': {reason}' if reason else ''}.",
                    f"Blocks: {some(list(known), name) or 'none'}.",
                )
        return [known[name] for name in names]

    # ---------------------------------------------------------------- costs
    def macs(self, widths: Any) -> Any:
        """Return the multiply-adds of one input as fvcore counts them; (N, G) -> (N,) int64, (G,) -> int.

        Here and in the costs below, rows may have a further column for each block: 1 if it is present, 0 if removed.
        """
        return self._cost(lambda costs: costs.macs, widths)

    def layer_macs(self, widths: Any) -> Any:
        """Return the multiply-adds of each of `layers`; (N, G) -> (N, layers) int64, (G,) -> (layers,).

        Their sum plus that of `other_macs` is `macs`.
        """
        return self._cost(lambda costs: costs.macs.layers, widths)

    def other_macs(self, widths: Any) -> dict[str, Any]:
        """Return the multiply-adds outside of layers by operation ("batch_norm", "matmul", ...).

        Each is (N, G) -> (N,) int64, (G,) -> int. Layers that fvcore does not count (convolutions with
        `padding="same"`) have a negative entry, since `macs` excludes them.
        """
        return {
            name: self._cost(lambda costs, name=name: costs.macs.beside[name], widths)  # type: ignore[misc]
            for name in self._costs.macs.beside
        }

    def params(self, widths: Any) -> Any:
        """Return the number of parameters, tied ones counted once; (N, G) -> (N,) int64, (G,) -> int."""
        return self._cost(lambda costs: costs.params, widths)

    def activations(self, widths: Any) -> Any:
        """Return the peak number of live activation elements for one input, as `counts.Activations` counts them.

        (N, G) -> (N,) int64, (G,) -> int.
        """
        return self._cost(lambda costs: costs.activations, widths)

    def _cost(self, terms: Callable[[Costs], Callable[[Ints], Ints]], widths: Any) -> Any:
        given = np.asarray(widths, dtype=np.int64)
        columns, costs = given.shape[-1] if given.ndim in (1, 2) else -1, self._costs
        if columns != len(self.groups):
            if columns != len(self.groups) + len(self.blocks):
                raise CompressorError(
                    f"Widths must have one column for each of the {len(self.groups)} groups, not shape {given.shape}.",
                    "Pass (G,) or (N, G) whole numbers, in the order of `groups`; a row may go on with 1 or 0 for each "
                    "of `blocks`.",
                )
            costs = self._costs_by_block
        found = terms(costs)(np.atleast_2d(given))
        if given.ndim == 2:
            return found
        return int(found[0]) if found.ndim == 1 else found[0]

    def operations(self, group: int) -> tuple[str, ...]:
        """Return the names of the operations on the channels of group `group`, in order of first occurrence."""
        found: dict[str, None] = {}
        for step in self._steps:
            if step.name not in found and any((self._group_of[each] == group).any() for each in step.labelled):
                found[step.name] = None
        return tuple(found)

    # ---------------------------------------------------------------- widths
    def choices(self, group: int) -> Ints:
        """Return the legal widths of group `group`, ascending; the last is dense. Of a block's column: 0 and 1."""
        return self._choices[group].copy() if group < len(self.groups) else np.arange(2, dtype=np.int64)

    def widths(self, x: Mapping[str, int] | Sequence[int] | Ints) -> Ints:
        """Return validated widths (G,) from a mapping (omitted groups stay dense) or a sequence.

        Raises:
            CompressorError: A group is unknown, the number of widths is wrong, or a width is not legal.
        """
        return checked_widths(self.groups, self._choices, x)

    def round(self, widths: Any) -> Ints:
        """Return the legal widths nearest to the real numbers `widths`, (G,)."""
        return nearest_widths(self._choices, widths)

    # ---------------------------------------------------------------- plans
    def rank(self, importance: Importance = "l1", data: Any = None, seed: int = 0) -> Ranking:
        """Rank the channels of every group by importance on the present weights; plans can share one ranking."""
        return rank(self, importance, data, seed)

    def plan(
        self,
        widths: Mapping[str, int] | Sequence[int] | Ints,
        importance: Importance | Ranking = "l1",
        data: Any = None,
        seed: int = 0,
        *,
        removed: Sequence[str] = (),
    ) -> ChannelPlan:
        """Keep the most important channels of each group.

        Args:
            widths: Units to keep, by name (omitted groups stay dense) or in the order of `groups`; or a row of a
                search, which goes on with 1 or 0 for each of `blocks`.
            importance: "l1", "l2", "bn", "taylor", "fpgm", "random", "reconstruction", a function
                (group, weights) -> scores, or a Ranking.
            data: Batches for "taylor": pairs of (inputs, labels), or a function of the model that returns a loss.
                For "reconstruction" batches as for `compensate`, or their `DenseMoments`.
            seed: Seed of "random", and of the positions at which "reconstruction" takes moments.
            removed: Names of the `blocks` to remove whole. Their own groups are not pruned besides.
        """
        gone = self._removed(removed)
        if not isinstance(widths, Mapping) and len(widths) > len(self.groups):
            widths, present = widths[: len(self.groups)], widths[len(self.groups) :]
            if len(present) != len(self.blocks):
                raise CompressorError(
                    f"{len(widths) + len(present)} widths for {len(self.groups)} groups and {len(self.blocks)} blocks.",
                    "Pass one for each group, and then 1 or 0 for each block or nothing.",
                )
            gone += [index for index, value in enumerate(present) if not value]
        checked = self.widths(widths)
        for index in gone:
            for group in self.blocks[index].groups:
                checked[group] = self.groups[group].width
        ranking = importance if isinstance(importance, Ranking) else self.rank(importance, data, seed)
        return ChannelPlan(
            {
                group.name: ranking.kept(group.index, int(width))
                for group, width in zip(self.groups, checked, strict=True)
            },
            tuple(self.blocks[index].name for index in gone),
        )

    def uniform(
        self, ratio: float, importance: Importance | Ranking = "l1", data: Any = None, seed: int = 0
    ) -> ChannelPlan:
        """Keep `ratio` of the channels of every group, rounded to legal widths."""
        if not 0 < ratio <= 1:
            raise CompressorError(
                f"The ratio to keep must lie above 0 and at most at 1, not at {ratio}.", "0.5 keeps half."
            )
        return self.plan(self.round(ratio * self.dense_widths), importance, data, seed)

    def dense(self) -> ChannelPlan:
        """Keep everything."""
        return ChannelPlan({group.name: tuple(range(group.width)) for group in self.groups})

    def smallest(self, importance: Importance | Ranking = "l1") -> ChannelPlan:
        """Keep the smallest legal width of every group."""
        return self.plan([int(legal[0]) for legal in self._choices], importance)

    def random_widths(self, rng: np.random.Generator) -> Ints:
        """Draw a legal width for every group, all with equal probability."""
        return np.array([rng.choice(legal) for legal in self._choices], dtype=np.int64)

    # ---------------------------------------------------------------- slicing
    def apply(self, plan: ChannelPlan, model: nn.Module | None = None) -> nn.Module:
        """Create a new, physically smaller network.

        It shares nothing mutable with the dense network and has the same mode (train or eval), type, device and
        memory format. Hooks of the user are not copied.

        Args:
            plan: A plan of this space.
            model: Source of the weights instead of the space's own network: a network of the same structure, such
                as a weight average.
        """
        keep = self.unit_masks(plan)
        widths = np.array([int(mask.sum()) for mask in keep], dtype=np.int64)
        source = self.model if model is None else model
        if model is None:
            self._check_unchanged()
        elif computed_weights(model):
            source = fixed_copy(model)
        if source is not self.model:
            self._check_same(source)
        small = self.slicer.build(source, keep, widths, cut, self.replaced(plan))
        small.__dict__[RECORD]["plan"] = plan
        small.__dict__[RECORD]["dense"] = self._dense_shapes
        small.__dict__[RECORD]["outputs"] = self.outputs
        small.__dict__[RECORD]["inputs"] = self.example_input
        return small

    def replaced(self, plan: ChannelPlan) -> dict[str, str]:
        """Return path of each module of the plan's removed blocks -> what takes its place (see `removal.place`)."""
        blocks = [self.blocks[index] for index in self._removed(plan.removed)]
        return {path: word for block in blocks for path, word in block.replaced.items()}

    def compensate(
        self, plan: ChannelPlan, batches: Any, method: Literal["layers", "quick", "moments"] = "layers", seed: int = 0
    ) -> nn.Module:
        """As `apply`, and refit the layers whose inputs changed to the dense network's outputs on `batches`.

        `compressor.pruning.compensate` describes the arguments, and returns a report besides the network.
        """
        from compressor.pruning.compensate import compensate

        return compensate(self, plan, batches, method, seed=seed).network

    def _check_unchanged(self) -> None:
        """Refuse later changes of computed weights: they were fixed once, so that changes would be ignored."""
        if self._given is not self.model and _versions(self._given) != self._given_versions:
            raise CompressorError(
                "The network was changed after the space fixed the weights that it computes.",
                "Create a new PruningSpace of it, or train space.model.",
            )

    def _check_same(self, model: nn.Module) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        wrong = sorted(set(found.items()) ^ set(self._dense_shapes.items()))
        if wrong:
            raise CompressorError(
                f"The given network does not match this space: they disagree about tensor '{wrong[0][0]}'.",
                "Pass a copy of the dense network with other weights.",
            )

    def indices(self, plan: ChannelPlan) -> dict[str, dict[int, Tensor]]:
        """Return name of each prunable parameter or buffer -> axis -> kept indices, ascending."""
        keep = self.unit_masks(plan)
        found = [layout.kept(keep) for layout in self.slicer.layouts]
        return {name: {axis: found[layout] for axis, layout in axes} for name, axes in self.slicer.axes.items()}

    def keep_masks(self, plan: ChannelPlan) -> dict[str, Tensor]:
        """Return name of each prunable parameter -> bool tensor of its shape, True where the element is kept.

        All parameters of removed blocks are there, and nothing of them is kept.
        """
        indices, gone = self.indices(plan), self.replaced(plan)
        masks = {}
        for name, parameter in self.model.named_parameters():
            if gone and inside(name, gone):
                masks[name] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
                continue
            if name not in indices:
                continue
            mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            for axis, index in indices[name].items():
                line = torch.zeros(parameter.shape[axis], dtype=torch.bool, device=parameter.device)
                line[index.to(parameter.device)] = True
                mask &= _along(line, axis, parameter.dim())
            masks[name] = mask
        return masks

    def soften(self, masks: Sequence[NDArray[np.float64]]) -> nn.Module:
        """Create a dense copy of the network in which every unit is scaled by its mask.

        The weights that read a unit (axis 1 of convolutions and linear layers) are multiplied by its mask. The weights
        that produce it are not: the following batch-norm would cancel the factor. With masks of 0 and 1 the output
        equals that of the slim network if all readers of a unit have such weights, except for the effect of removed
        channels on batch-norm statistics.

        Args:
            masks: Mask of each group, (width,), values 0 to 1.
        """
        network = self.apply(self.dense())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                layout = dict(self.slicer.axes.get(name, ())).get(1)
                if layout is not None:
                    factor = self.slicer.layouts[layout].spread(masks, 1.0).astype(np.float32)
                    parameter.mul_(_along(torch.from_numpy(factor).to(parameter.device), 1, parameter.dim()))
        return network

    def unit_masks(self, plan: ChannelPlan) -> list[NDArray[np.bool_]]:
        """Return whether the plan keeps each unit of each group, (width,) per group.

        Raises:
            CompressorError: The plan names a group or a channel that this space lacks.
        """
        names = {group.name for group in self.groups}
        for name in plan.keep:
            if name not in names:
                raise CompressorError(
                    f"The plan names a group '{name}' that this space lacks.", "Was it made for another network?"
                )
        masks = []
        for group in self.groups:
            kept = plan.keep.get(group.name, range(group.width))
            if kept[-1] >= group.width:
                raise CompressorError(
                    f"The plan keeps channel {kept[-1]} of group '{group.name}', which has {group.width}.",
                    "Was it made for another network?",
                )
            mask = np.zeros(group.width, dtype=bool)
            mask[list(kept)] = True
            masks.append(mask)
        return masks


def fixed_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network in which computed weights are plain parameters."""
    copied = copy_structure(model, lambda tensor: tensor.detach().clone())
    fix_weights(copied)
    return copied


def _versions(model: nn.Module) -> list[int]:
    """Return the version counters that torch increments with each in-place change of a tensor."""
    return [tensor._version for tensor in named_tensors(model).values()]


def _along(line: Tensor, axis: int, rank: int) -> Tensor:
    """Reshape a vector so that it broadcasts along one axis of a tensor."""
    return line.reshape([-1 if each == axis else 1 for each in range(rank)])
