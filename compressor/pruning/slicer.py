"""Slices a network: kept indices of every tensor, updated attributes, and the smaller network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.pruning.attention import slim_class
from compressor.pruning.counts import Affine, Ints
from compressor.pruning.facts import Facts, Tie
from compressor.pruning.groups import Resolved
from compressor.pruning.removal import inside, remove
from compressor.pruning.skeleton import copy_structure, named_tensors, walk

Keep = Sequence[NDArray[np.bool_]]
Cut = tuple[int, Tensor, int]
"""An axis, its kept indices, and the length of the runs of neighbouring indices."""

RECORD = "_compressor_slim"
"""Attribute of a slim network: the plan and the changes that `artefact.save` stores."""


NOTHING_REPLACED: Mapping[str, str] = {}


@dataclass(frozen=True)
class Layout:
    """Layout of an axis: the group of each index (-1 if it is always kept) and its unit.

    Each `run` of neighbouring indices is kept or removed together (such as the 49 positions of a channel that was
    flattened from 7x7), so that they can be copied together.
    """

    group: NDArray[np.int64]
    unit: NDArray[np.int64]
    groups: tuple[int, ...]
    run: int

    @classmethod
    def of(cls, group: NDArray[np.int64], unit: NDArray[np.int64]) -> Layout:
        """Create the layout of an axis from the groups and units of its indices."""
        changes = np.flatnonzero((np.diff(group) != 0) | (np.diff(unit) != 0)) + 1
        run = int(np.gcd.reduce(np.append(changes, group.size)))
        return cls(group, unit, tuple(np.unique(group[group >= 0]).tolist()), run)

    def spread(self, values: Sequence[NDArray[Any]], rest: Any) -> NDArray[Any]:
        """Return a value for each index: that of its unit, from one array per group; `rest` for those always kept."""
        if len(self.groups) == 1 and (self.group >= 0).all():
            return np.asarray(values[self.groups[0]][self.unit])
        spread = np.full(self.group.size, rest)
        for index in self.groups:
            here = self.group == index
            spread[here] = values[index][self.unit[here]]
        return spread

    def kept(self, keep: Keep) -> Tensor:
        """Return the kept indices, ascending, for one mask over units per group."""
        return torch.from_numpy(np.flatnonzero(self.spread(keep, True)))


class Slicer:
    """Slices networks by masks over units; built once from a trace, which maps axes of tensors to groups."""

    def __init__(self, facts: Facts, resolved: Resolved, swaps: Mapping[str, str]) -> None:
        layouts: dict[bytes, int] = {}
        self.layouts: list[Layout] = []
        self.axes: dict[str, tuple[tuple[int, int], ...]] = {}
        for name, axes in facts.params.items():
            found = []
            for axis, labels in enumerate(axes):
                if labels is None:
                    continue
                group = resolved.group[labels]
                if (group < 0).all():
                    continue
                unit = resolved.unit[labels]
                key = group.tobytes() + unit.tobytes()
                if key not in layouts:
                    layouts[key] = len(self.layouts)
                    self.layouts.append(Layout.of(group, unit))
                found.append((axis, layouts[key]))
            if found:
                self.axes[name] = tuple(found)
        edits: dict[tuple[str, str, int | None], tuple[Tie, Affine]] = {}
        for tie in facts.ties:
            count = resolved.affine(tie.labels)
            if not count.is_constant:
                edits.setdefault((tie.path, tie.attribute, tie.index), (tie, count))
        #: Attributes of modules that are channel counts, with these counts.
        self.edits = tuple(edits.values())
        touched = {name.rpartition(".")[0] for name in self.axes}
        #: Modules whose parameters may shrink, for the attributes that follow from shapes.
        self.touched = tuple(sorted(touched))
        self.swaps = {
            path: name for path, name in swaps.items() if any(t == path or t.startswith(path + ".") for t in touched)
        }

    def indices(self, keep: Keep) -> list[Tensor | None]:
        """Return the kept indices of each layout; None if all are kept."""
        found = [(layout.kept(keep), layout.group.size) for layout in self.layouts]
        return [None if index.numel() == size else index for index, size in found]

    def build(
        self,
        model: nn.Module,
        keep: Keep,
        widths: Ints,
        slice_: Callable[..., Tensor],
        replaced: Mapping[str, str] = NOTHING_REPLACED,
    ) -> nn.Module:
        """Build the smaller network.

        Args:
            model: The dense network (its tensors are only read).
            keep: One mask over units per group.
            widths: Number of kept units of each group, (G,).
            slice_: (tensor, [(axis, kept indices, run length)]) -> its smaller copy.
            replaced: Path of each module of removed blocks -> what takes its place, as for `removal.place`.
        """
        kept = self.indices(keep)
        gone = {id(each) for name, each in named_tensors(model).items() if inside(name, replaced)} if replaced else ()
        plan = {
            id(tensor): [
                (axis, index, self.layouts[layout].run)
                for axis, layout in self.axes[name]
                if (index := kept[layout]) is not None
            ]
            for name, tensor in named_tensors(model).items()
            if name in self.axes
        }
        with torch.no_grad():
            small = copy_structure(
                model, lambda tensor: tensor if id(tensor) in gone else slice_(tensor, plan.get(id(tensor), ()))
            )
        remove(small, replaced)
        edits: list[list[Any]] = []
        changed = any(plan.values())
        swaps = {path: name for path, name in self.swaps.items() if changed and not inside(path, replaced)}
        if changed:
            by_path = dict(walk(small))
            for tie, count in self.edits:
                if not inside(tie.path, replaced):
                    _set(by_path[tie.path], tie, int(count(widths)) // tie.block, edits)
            for path in self.touched:
                if inside(path, replaced):
                    continue
                held = by_path[path].__dict__
                for attribute, value in following(by_path[path]):
                    if held[attribute] != value:
                        held[attribute] = value
                        edits.append([path, attribute, list(value) if isinstance(value, tuple) else value])
            for path, name in swaps.items():
                swap(by_path[path], name)
        small.__dict__[RECORD] = {"edits": edits, "swaps": swaps, "replaced": dict(replaced)}
        return small


def _set(module: nn.Module, tie: Tie, value: int, edits: list[list[Any]]) -> None:
    """Set an attribute that is a channel count, or an item of one, and record it."""
    before = getattr(module, tie.attribute)
    after: Any = value
    if tie.index is not None:
        items = list(before)
        items[tie.index] = value
        after = type(before)(items)
    if after != before:
        setattr(module, tie.attribute, after)
        edits[:] = [edit for edit in edits if edit[:2] != [tie.path, tie.attribute]]
        edits.append([tie.path, tie.attribute, list(after) if isinstance(after, tuple) else after])


def swap(module: nn.Module, name: str) -> None:
    """Change a module's class to one that runs at any width."""
    kind = slim_class(name)
    assert kind is not None
    module.__class__ = kind
    if name == "multi_head_attention":
        # Prevents torch's fused encoder layer, which assumes the dense layout, from using the weights.
        module._qkv_same_embed_dim = False  # type: ignore[assignment]


def following(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the attributes of torch's own modules that follow from the shapes of their parameters."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and "weight" in module._parameters and weight is not None:
        first, second = weight.shape[0], weight.shape[1] * module.groups
        names = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        return [(names[0], first), (names[1], second)]
    if isinstance(module, nn.Linear) and weight is not None:
        return [("out_features", weight.shape[0]), ("in_features", weight.shape[1])]
    if isinstance(module, nn.modules.batchnorm._NormBase):
        sized = weight if weight is not None else module._buffers.get("running_mean")
        return [] if sized is None else [("num_features", sized.shape[0])]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        return [("normalized_shape", tuple(weight.shape))]
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return [("num_channels", weight.shape[0])]
    if isinstance(module, nn.PReLU) and weight is not None:
        return [("num_parameters", weight.shape[0])]
    if isinstance(module, nn.Embedding) and weight is not None:
        return [("num_embeddings", weight.shape[0]), ("embedding_dim", weight.shape[1])]
    return []


def cut(tensor: Tensor, kept: Sequence[Cut]) -> Tensor:
    """Copy the kept indices, with the same memory format, type and device; to be called without gradients."""
    if not kept:
        return tensor.detach().clone()
    source = tensor.detach()
    if len(kept) > 1:
        # The axis that loses most is cut first, so that less data is copied for the others.
        kept = sorted(kept, key=lambda item: item[1].numel() / tensor.shape[item[0]])
    for axis, index, run in kept:
        if index.device != source.device:
            index = index.to(source.device)
        if run > 1:
            parts = source.reshape(*source.shape[:axis], -1, run, *source.shape[axis + 1 :])
            whole = parts.index_select(axis, index[::run] // run)
            source = whole.flatten(axis, axis + 1)
        else:
            source = source.index_select(axis, index)
    return source.contiguous(memory_format=torch.channels_last) if is_channels_last(tensor) else source


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is in channels-last format, and not in the default one as well."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def cut_meta(tensor: Tensor, kept: Sequence[Cut]) -> Tensor:
    """Return a tensor with the shape of `cut` on the meta device."""
    shape = list(tensor.shape)
    for axis, index, _ in kept:
        shape[axis] = index.numel()
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
