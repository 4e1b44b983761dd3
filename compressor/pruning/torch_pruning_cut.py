"""Applies torch-pruning to a copy of a network with numbered elements, so that its tensors show what was kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.pruning.plan import ChannelPlan
from compressor.pruning.skeleton import copy_structure, named_tensors
from export.convert.trees import moved

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

SECONDS_A_GROUP = 15.0
"""Time limit of torch-pruning's search for the elements tied to a group, in seconds."""

MOST_STEPS = 4000
"""Limit of the steps of that search: through some attention modules it grows without bound, and so does its memory."""


class Unable(Exception):
    """torch-pruning cannot remove a group's channels."""


class Cutter:
    """A numbered copy of the dense network, and torch-pruning's graph of it."""

    def __init__(self, space: PruningSpace, plan: ChannelPlan) -> None:
        import torch_pruning

        self.space = space
        self.keep = space.unit_masks(plan)
        self.model = copy_structure(space.model, lambda tensor: tensor.detach().to("cpu", copy=True)).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.graph: Any = torch_pruning.DependencyGraph()
        self._lose_whole_groups(torch_pruning)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            self.graph.build_dependency(
                self.model, example_inputs=list(moved(space.example_input, "cpu")), verbose=False
            )
        self._end, self._steps = math.inf, 0
        for node in self.graph.module2node.values():
            for dep in node.dependencies:
                dep.is_triggered_by = partial(self._in_time, dep.is_triggered_by)
        #: The dense shapes of the numbered tensors.
        self.dense: dict[str, tuple[int, ...]] = {}
        for name, tensor in named_tensors(self.model).items():
            if is_numbered(tensor):
                self.dense[name] = tuple(tensor.shape)
                tensor.data = numbered(tensor)
        self.layouts = {
            (name, axis): space.slicer.layouts[place]
            for name, axes in space.slicer.axes.items()
            for axis, place in axes
            if name in self.dense
        }
        #: Tensors that no node of its graph owns.
        self.unreached = frozenset(name for name in self.dense if not self._reaches(name))
        self.by_group: dict[int, list[tuple[str, int]]] = {}
        for key, layout in self.layouts.items():
            for group in layout.groups:
                self.by_group.setdefault(group, []).append(key)

    def _lose_whole_groups(self, torch_pruning: Any) -> None:
        """Register a custom layer with torch-pruning for grouped convolutions that lose whole groups.

        Its own pruner does not change the number of groups. The dependencies of the groups' channels are still found
        by its graph.
        """
        dense = self.space.dense_widths

        class WholeGroups(nn.Conv2d):
            pass

        class Pruner(torch_pruning.pruner.function.ConvPruner):  # type: ignore[misc]
            def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
                size = layer.in_channels // layer.groups
                if len(idxs) != size * len({place // size for place in idxs}):
                    raise ValueError("a part of a convolution's group would go")
                layer.groups -= len(idxs) // size
                layer.in_channels -= len(idxs)
                return super().prune_out_channels(layer, idxs)

            prune_in_channels = prune_out_channels

        for layer in self.space.layers:
            whole = layer.kind == "grouped" and layer.group_size
            if whole and int(layer.in_channels(dense)) == int(layer.out_channels(dense)):
                found = dict(self.model.named_modules()).get(layer.name)
                if type(found) is nn.Conv2d:
                    found.__class__ = WholeGroups
        self.graph.register_customized_layer(WholeGroups, Pruner())

    def _in_time(self, triggers: Callable[[Any], bool], function: Any) -> bool:
        """Enforce the limits on each step of its search, which cannot be bounded otherwise."""
        if time.monotonic() > self._end:
            raise Unable(f"it does not find within {SECONDS_A_GROUP:.0f} s what goes with them")
        triggered = triggers(function)
        self._steps += triggered
        if self._steps > MOST_STEPS:
            raise Unable(f"it does not find in {MOST_STEPS} steps what goes with them")
        return triggered

    def _reaches(self, name: str) -> bool:
        known = self.graph.module2node
        path, _, attribute = name.rpartition(".")
        parts = path.split(".") if path else []
        owners = [self.model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
        return any(owner in known for owner in owners) or owners[-1]._parameters.get(attribute) in known

    def remove(self, group: int, take_back: bool = True) -> tuple[str, str]:
        """Remove a group's channels from all layers that produce them.

        Returns:
            Description of elements that it keeps but the plan removes, and of elements that it removes but the plan
            keeps, which are restored; '' if there are none.

        Raises:
            Unable: It fails, or its graph lacks the layer that produces them; changes are undone.
        """
        undo: list[Callable[[], None]] = []
        touched: set[str] = set()
        self._end, self._steps = time.monotonic() + SECONDS_A_GROUP, 0
        try:
            for name, axis in self.space.makers[group]:
                if (name, axis) not in self.layouts:
                    continue
                places = np.flatnonzero(np.isin(self._left(name, axis), self._gone(group, name, axis)))
                if not places.size:
                    continue  # already removed with an earlier layer
                module = self._module(name, axis)
                if module is None:
                    raise Unable(f"its graph has no node that makes axis {axis} of '{name}'")
                pruner = self.graph.get_pruner_of_module(module)
                taken = self.graph.get_pruning_group(module, pruner.prune_out_channels, places.tolist())
                for dep, _ in taken:
                    touched |= self._remember(dep.target, undo)
                taken.prune(record_history=False)
            left, more = self._difference(group, touched)
        except Exception as error:  # its pruners may raise anything on unsupported modules
            _take_back(undo)
            raise (error if isinstance(error, Unable) else Unable(f"it fails with {first_line(error)}")) from error
        if (left or more) and take_back:
            _take_back(undo)
        return left, more

    def _module(self, name: str, axis: int) -> Any:
        """Return the module whose output channels torch-pruning removes to shrink `axis` of a parameter."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        known = self.graph.module2node
        transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
        if attribute == "weight" and module in known and axis == int(transposed or isinstance(module, nn.Embedding)):
            return module
        parameter = module._parameters.get(attribute)
        if parameter is None or parameter not in known:
            return None
        return parameter if known[parameter].pruning_dim % parameter.dim() == axis else None

    def _gone(self, group: int, name: str, axis: int) -> Any:
        """Return the dense indices of an axis that the plan removes for this group."""
        layout = self.layouts[name, axis]
        here = layout.group == group
        return np.flatnonzero(here)[~self.keep[group][layout.unit[here]]]

    def _left(self, name: str, axis: int) -> Any:
        """Return the dense indices of an axis that the copy's tensor still has, in its order."""
        tensor, shape = self.tensor(name), self.dense[name]
        line = tensor.detach()[tuple(slice(None) if place == axis else 0 for place in range(len(shape)))]
        return line.numpy().astype(np.int64) // int(np.prod(shape[axis + 1 :])) % shape[axis]

    def tensor(self, name: str) -> Tensor:
        """Return the copy's tensor by its dense name."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        found = module._parameters.get(attribute)
        tensor = module._buffers.get(attribute) if found is None else found
        return getattr(module, attribute) if tensor is None else tensor

    def with_values(self) -> nn.Module:
        """Return the copy with the dense network's values in place of the indices."""
        dense = named_tensors(self.space.model)
        for name in self.dense:
            tensor, values = self.tensor(name), dense[name].detach().cpu().flatten()
            tensor.data = values[tensor.detach().flatten().long()].reshape(tensor.shape)
        return self.model

    def _difference(self, group: int, touched: set[str]) -> tuple[str, str]:
        """Describe which elements of the touched tensors are kept or lost in contradiction to the plan."""
        keys = {(name, axis) for name in touched for axis in range(len(self.dense[name]))}
        extra: list[str] = []
        for name, axis in sorted({*keys, *self.by_group.get(group, ())}):
            if name in self.unreached:
                continue
            if self.tensor(name).dim() != len(self.dense[name]) or 0 in self.tensor(name).shape:
                return "", f"nothing is left of '{name}'"
            left = self._left(name, axis)
            layout = self.layouts.get((name, axis))
            if layout is not None and group in layout.groups and np.isin(self._gone(group, name, axis), left).any():
                return f"it leaves channels in axis {axis} of '{name}'", ""
            kept = np.arange(self.dense[name][axis]) if layout is None else layout.kept(self.keep).numpy()
            lost = np.setdiff1d(kept, left)
            if lost.size:
                extra.append(f"it also removes {lost.size} of {kept.size} in axis {axis} of '{name}'")
        places = f" and in {len(extra) - 1} more places" if len(extra) > 1 else ""
        return "", extra[0] + places if extra else ""

    def _remember(self, node: Any, undo: list[Callable[[], None]]) -> set[str]:
        """Record how to undo the pruning of a node; returns the names of the tensors that it may change."""
        target = node.module
        if isinstance(target, nn.Parameter):
            name = self.graph._param_to_name[target]
            path, _, attribute = name.rpartition(".")
            parent = self.model.get_submodule(path)

            def restore() -> None:
                new = parent._parameters[attribute]
                parent._parameters[attribute] = target
                if new is not target:
                    self.graph._param_to_name.pop(new)
                    self.graph.module2node.pop(new)
                self.graph._param_to_name[target], self.graph.module2node[target] = name, node
                node.module = target

            undo.append(restore)
            return {name} & set(self.dense)
        names: set[str] = set()
        for module in target.modules():
            held = {
                key: copy.copy(value) if isinstance(value, list | dict) else value
                for key, value in module.__dict__.items()
            }
            undo.append(partial(module.__dict__.update, held))
            path = self.graph._module2name.get(module)
            if path is not None:
                own = [*module._parameters, *module._buffers]
                names |= {f"{path}.{each}" if path else each for each in own}
        return names & set(self.dense)


def _take_back(undo: Sequence[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def numbered(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape with the index of each element, represented exactly."""
    dtype = torch.float32 if tensor.numel() < 1 << 24 else torch.float64
    return torch.arange(tensor.numel(), dtype=dtype).reshape(tensor.shape)


def is_numbered(tensor: Tensor) -> bool:
    """Whether a tensor has channels that can be numbered."""
    return tensor.is_floating_point() and tensor.dim() > 0


def first_line(error: Exception) -> str:
    """Return an error's class and the first line of its message."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"
