"""torch-pruning removes the same channels from a copy of the dense network, as a check of the slicing.

Its dependency graph is made from autograd's, and shares nothing with the tracer of the pruning space. The copy's
tensors are numbered: every element holds its place in its dense tensor, so that after torch-pruning has cut the copy,
each tensor says which elements it kept, in which order. They must be those of the slim network.

torch-pruning's graph cannot express everything (parts of a reshape, heads of torch's attention, whole groups of a
grouped convolution). A group of channels in which it removes something else is taken back and left dense on both
sides, and named with the operation. Where all of a group's operations are ones that it follows exactly, the
disagreement is an error.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.progress import say
from compressor.pruning.counted import Check, Disagreement, confirm_macs, first_line
from compressor.pruning.facts import moved
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.skeleton import copy_structure, named_tensors

if TYPE_CHECKING:
    from compressor.pruning.construct import Layer
    from compressor.pruning.space import PruningSpace

SECONDS = 120.0
"""No further group is checked after this long."""

SECONDS_A_GROUP = 15.0
"""Its search for what goes with a group is given up after this long: through some attention it grows without end."""

_EXACT = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm layer_norm prelu relu
    relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu celu selu mish softplus clamp dropout
    dropout2d add sub mul div iadd isub imul cat concat concatenate mean flatten contiguous detach clone max_pool2d
    avg_pool2d max_pool2d_with_indices boolean_dispatch adaptive_avg_pool2d adaptive_max_pool2d
"""
EXACT = frozenset(_EXACT.split())
"""Operations through which its graph follows channels exactly."""


@dataclass
class Comparison:
    """What torch-pruning made of a plan.

    Attributes:
        agreed: Names of the groups of which it removes exactly the plan's channels.
        different: Name of each group of which it removes something else -> what.
        unable: Name of each group that it could not remove -> why.
        failed: Why nothing could be compared; empty where something was.
        codes: Its tensors, by name: the place of each element in the dense tensor.
        unreached: Names of tensors that its graph does not reach, such as those that only training uses.
    """

    agreed: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    codes: dict[str, Tensor] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()


def checks(space: PruningSpace, plan: ChannelPlan, slim: nn.Module) -> dict[str, dict[str, Any]]:
    """Both independent checks of a slim network, as the manifest has them.

    Args:
        space: what the network was cut from; its model is only read.
        plan: which channels each group keeps.
        slim: the network that is delivered; its weights may have been trained since.

    Raises:
        Disagreement: a check contradicts the network; nothing may be exported then.
    """
    found = {}
    asked: tuple[tuple[str, str, Callable[[], Check]], ...] = (
        ("torch_pruning", "Removed channels", lambda: confirm_cut(space, plan, slim)),
        ("fvcore", "Multiply-adds", lambda: confirm_macs(space, space.widths(plan.widths), slim)),
    )
    for name, what, check in asked:
        start = time.monotonic()
        made = check()
        found[name] = {**made.record(), "seconds": round(time.monotonic() - start, 1)}
        say(f"{what}: {made.words} ({found[name]['seconds']} s).")
    return found


def confirm_cut(space: PruningSpace, plan: ChannelPlan, slim: nn.Module) -> Check:
    """Compare the slim network with what torch-pruning makes of the dense one by the same plan.

    Args:
        space: what the network was cut from; its model is only read.
        plan: which channels each group keeps.
        slim: the network that is delivered; its weights may have been trained since.

    Raises:
        Disagreement: torch-pruning keeps other elements of a tensor, or the delivered network has other shapes.
    """
    _compare_shapes(space, plan, slim)
    found = compare(space, plan)
    if found.failed:
        return Check(None, f"not checked: {found.failed}")
    for name, what in found.different.items():
        if not obstacles(space, name):
            raise Disagreement(
                f"torch-pruning disagrees with the slim network about the channels of '{name}': {what}."
            )
    compared = {name: codes for name, codes in found.codes.items() if name not in found.unreached}
    _compare_tensors(
        space, ChannelPlan({name: plan.keep[name] for name in found.agreed}), compared, found.unreached
    )
    skipped = {**found.different, **found.unable}
    changed = len(found.agreed) + len(skipped)
    if not skipped and not found.unreached:
        return Check(
            True, f"confirmed by torch-pruning: {len(compared)} tensors, {changed} groups of channels"
        )
    lacks = []
    if skipped:
        reasons = Counter(", ".join(obstacles(space, name)) for name in found.different)
        kinds = [f"{count} through {operations}" for operations, count in reasons.most_common(3)]
        kinds += [f"{len(found.unable)} that it cannot remove"] if found.unable else []
        first, what = next(iter(skipped.items()))
        count = f"{len(skipped)} group{'s' if len(skipped) > 1 else ''}"
        lacks.append(f"its graph cannot express {count} ({'; '.join(kinds)}), such as {first}: {what}")
    if found.unreached:
        lacks.append(f"its graph does not reach {len(found.unreached)} tensors, such as {found.unreached[0]}")
    start = f"{len(found.agreed)} of {changed} groups of channels confirmed by torch-pruning; "
    return Check(None, f"{start if found.agreed else ''}not checked: {'; '.join(lacks)}")


def obstacles(space: PruningSpace, group: str) -> tuple[str, ...]:
    """Operations on a group's channels that torch-pruning's graph need not follow exactly."""
    index = next(each.index for each in space.groups if each.name == group)
    found = [name for name in space.operations(index) if name not in EXACT]
    for layer in space.layers:
        touched = index in {each for each, _ in (*layer.in_channels.terms, *layer.out_channels.terms)}
        if touched and layer.groups > 1 and not _is_depthwise(space, layer):
            found.append("grouped convolution")
            break
    return tuple(sorted(found))


def _is_depthwise(space: PruningSpace, layer: Layer) -> bool:
    """Whether each channel has a filter of its own, and one only: what torch-pruning knows as depthwise."""
    dense = space.dense_widths
    return layer.groups == int(layer.in_channels(dense)) == int(layer.out_channels(dense))


def compare(space: PruningSpace, plan: ChannelPlan, seconds: float = SECONDS) -> Comparison:
    """Remove a plan's channels by torch-pruning, one group of the space after the other.

    Args:
        space, plan: as `confirm_cut` takes them.
        seconds: after this long the remaining groups are left out, as unable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cutter = Cutter(space, plan)
        except Exception as error:  # it runs the user's code under its own tracer, and may fail in any way
            return Comparison(failed=f"its graph cannot trace the network ({first_line(error)})")
        found, end = Comparison(), time.monotonic() + seconds
        for group in space.groups:
            if len(plan.keep.get(group.name, range(group.width))) == group.width:
                continue
            if time.monotonic() > end:
                found.unable[group.name] = f"it was not reached in {seconds:.0f} s"
                continue
            try:
                problem = cutter.remove(group.index)
            except Unable as error:
                found.unable[group.name] = str(error)
                continue
            if problem:
                found.different[group.name] = problem
            else:
                found.agreed.append(group.name)
    found.codes = {name: cutter.tensor(name).detach() for name in cutter.dense}
    changing = {
        name
        for group in space.groups
        if group.name in found.agreed
        for name, _ in cutter.by_group[group.index]
    }
    found.unreached = tuple(name for name in cutter.dense if name in cutter.unreached & changing)
    return found


class Unable(Exception):
    """torch-pruning cannot remove a group's channels."""


class Cutter:
    """A numbered copy of the dense network, and torch-pruning's graph of it."""

    def __init__(self, space: PruningSpace, plan: ChannelPlan) -> None:
        import torch_pruning

        self.space = space
        self.keep = space._masks(plan)
        self.model = copy_structure(space.model, lambda tensor: tensor.detach().to("cpu", copy=True)).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.graph: Any = torch_pruning.DependencyGraph()
        self._lose_whole_groups(torch_pruning)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            self.graph.build_dependency(
                self.model, example_inputs=list(moved(space.example_input, "cpu")), verbose=False
            )
        self._end = math.inf
        for node in self.graph.module2node.values():
            for dep in node.dependencies:
                dep.is_triggered_by = partial(self._in_time, dep.is_triggered_by)
        #: The dense shapes of the numbered tensors.
        self.dense: dict[str, tuple[int, ...]] = {}
        for name, tensor in named_tensors(self.model).items():
            if _is_numbered(tensor):
                self.dense[name] = tuple(tensor.shape)
                tensor.data = numbered(tensor)
        self.layouts = {
            (name, axis): space.slicer.layouts[place]
            for name, axes in space.slicer.axes.items()
            for axis, place in axes
            if name in self.dense
        }
        #: Tensors that none of its graph's nodes owns.
        self.unreached = frozenset(name for name in self.dense if not self._reaches(name))
        self.by_group: dict[int, list[tuple[str, int]]] = {}
        for key, layout in self.layouts.items():
            for group in layout.groups:
                self.by_group.setdefault(group, []).append(key)

    def _lose_whole_groups(self, torch_pruning: Any) -> None:
        """Teach it grouped convolutions that lose whole groups, by way of its register for layers of a user's own.

        Its own pruner leaves their number of groups as it is. What the channels of the groups are tied to is still
        found by its graph.
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

    def _in_time(self, asked: Callable[[Any], bool], function: Any) -> bool:
        """Asked on each step of its search, which cannot be bounded otherwise."""
        if time.monotonic() > self._end:
            raise Unable(f"it does not find within {SECONDS_A_GROUP:.0f} s what goes with them")
        return asked(function)

    def _reaches(self, name: str) -> bool:
        known = self.graph.module2node
        path, _, attribute = name.rpartition(".")
        parts = path.split(".") if path else []
        owners = [self.model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
        return any(owner in known for owner in owners) or owners[-1]._parameters.get(attribute) in known

    def remove(self, group: int, take_back: bool = True) -> str:
        """Remove a group's channels wherever they are made.

        Returns:
            How the copy's tensors then differ from what the plan makes of them, after taking it back; '' where they
            do not.

        Raises:
            Unable: it fails, or its graph lacks the layer that makes them; what was done is taken back.
        """
        undo: list[Callable[[], None]] = []
        touched: set[str] = set()
        self._end = time.monotonic() + SECONDS_A_GROUP
        try:
            for name, axis in self.space.makers[group]:
                if (name, axis) not in self.layouts:
                    continue
                places = np.flatnonzero(np.isin(self._left(name, axis), self._gone(group, name, axis)))
                if not places.size:
                    continue  # an earlier layer took these along
                module = self._module(name, axis)
                if module is None:
                    raise Unable(f"its graph has no node that makes axis {axis} of '{name}'")
                pruner = self.graph.get_pruner_of_module(module)
                taken = self.graph.get_pruning_group(module, pruner.prune_out_channels, places.tolist())
                for dep, _ in taken:
                    touched |= self._remember(dep.target, undo)
                taken.prune(record_history=False)
            problem = self._difference(group, touched)
        except Exception as error:  # its pruners run on modules that they were not written for
            _take_back(undo)
            raise (
                error if isinstance(error, Unable) else Unable(f"it fails with {first_line(error)}")
            ) from error
        if problem and take_back:
            _take_back(undo)
        return problem

    def _module(self, name: str, axis: int) -> Any:
        """What torch-pruning removes the output channels of, so that `axis` of a parameter shrinks."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        known = self.graph.module2node
        transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
        if (
            attribute == "weight"
            and module in known
            and axis == int(transposed or isinstance(module, nn.Embedding))
        ):
            return module
        parameter = module._parameters.get(attribute)
        if parameter is None or parameter not in known:
            return None
        return parameter if known[parameter].pruning_dim % parameter.dim() == axis else None

    def _gone(self, group: int, name: str, axis: int) -> Any:
        """The dense places on an axis that the plan removes for this group."""
        layout = self.layouts[name, axis]
        here = layout.group == group
        return np.flatnonzero(here)[~self.keep[group][layout.unit[here]]]

    def _left(self, name: str, axis: int) -> Any:
        """The dense places on an axis that the copy's tensor still has, in its order."""
        tensor, shape = self.tensor(name), self.dense[name]
        line = tensor.detach()[tuple(slice(None) if place == axis else 0 for place in range(len(shape)))]
        return line.numpy().astype(np.int64) // int(np.prod(shape[axis + 1 :])) % shape[axis]

    def tensor(self, name: str) -> Tensor:
        """The copy's tensor of that dense name."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        found = module._parameters.get(attribute)
        tensor = module._buffers.get(attribute) if found is None else found
        return getattr(module, attribute) if tensor is None else tensor

    def _difference(self, group: int, touched: set[str]) -> str:
        """How the touched tensors differ from what the plan makes of them."""
        keys = {(name, axis) for name in touched for axis in range(len(self.dense[name]))}
        extra: list[str] = []
        for name, axis in sorted({*keys, *self.by_group.get(group, ())}):
            if name in self.unreached:
                continue
            if self.tensor(name).dim() != len(self.dense[name]) or 0 in self.tensor(name).shape:
                return f"nothing is left of '{name}'"
            left = self._left(name, axis)
            layout = self.layouts.get((name, axis))
            if (
                layout is not None
                and group in layout.groups
                and np.isin(self._gone(group, name, axis), left).any()
            ):
                return f"it leaves channels in axis {axis} of '{name}'"
            kept = np.arange(self.dense[name][axis]) if layout is None else layout.kept(self.keep).numpy()
            lost = np.setdiff1d(kept, left)
            if lost.size:
                extra.append(f"it also removes {lost.size} of {kept.size} in axis {axis} of '{name}'")
        return extra[0] + (f" and in {len(extra) - 1} more places" if len(extra) > 1 else "") if extra else ""

    def _remember(self, node: Any, undo: list[Callable[[], None]]) -> set[str]:
        """Note how to take back what pruning a node changes; names of the tensors that it may change."""
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
    """A tensor of the same shape that holds the place of each element, exact to the last."""
    dtype = torch.float32 if tensor.numel() < 1 << 24 else torch.float64
    return torch.arange(tensor.numel(), dtype=dtype).reshape(tensor.shape)


def _compare_tensors(
    space: PruningSpace, plan: ChannelPlan, codes: dict[str, Tensor], without: Sequence[str]
) -> None:
    """The slicing on numbered tensors, and on the network's own, against torch-pruning's tensors.

    Raises:
        Disagreement: a tensor differs.
    """
    ours = named_tensors(space.apply(plan, copy_structure(space.model, _numbered_or_copy)))
    real, dense = named_tensors(space.apply(plan)), named_tensors(space.model)
    for name in sorted(
        {name for name, tensor in ours.items() if _is_numbered(tensor)} - {*without} | {*codes}
    ):
        theirs, mine = codes.get(name), ours.get(name)
        if theirs is None or mine is None:
            raise Disagreement(
                f"Tensor '{name}' is only in {'torch-pruning' if mine is None else 'our'} cut of the dense network."
            )
        if theirs.shape != mine.shape or not torch.equal(theirs.to(mine.dtype), mine):
            raise Disagreement(
                f"torch-pruning keeps other elements of '{name}' than the slim network: {tuple(theirs.shape)} beside "
                f"{tuple(mine.shape)}."
            )
        gathered = dense[name].detach().flatten()[theirs.long().to(dense[name].device).flatten()]
        if not torch.equal(gathered.reshape(theirs.shape), real[name]):
            raise Disagreement(
                f"The values of '{name}' in the slim network are not those that torch-pruning keeps."
            )


def _numbered_or_copy(tensor: Tensor) -> Tensor:
    return numbered(tensor) if _is_numbered(tensor) else tensor.detach().clone()


def _is_numbered(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 0


def _compare_shapes(space: PruningSpace, plan: ChannelPlan, slim: nn.Module) -> None:
    indices, delivered = space.indices(plan), slim.state_dict()
    for name, tensor in space.model.state_dict().items():
        expected: Sequence[int] = [
            indices[name][axis].numel() if axis in indices.get(name, {}) else size
            for axis, size in enumerate(tensor.shape)
        ]
        if name not in delivered or list(delivered[name].shape) != expected:
            found = tuple(delivered[name].shape) if name in delivered else "missing"
            raise Disagreement(
                f"Tensor '{name}' of the slim network is {found}, the plan says {tuple(expected)}."
            )
