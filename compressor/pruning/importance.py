"""Importance of channels: scores for the units of each group, and the ranking from which plans are built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning import reconstruction
from compressor.pruning.calibration import Space
from compressor.pruning.groups import Group
from compressor.pruning.moments import DenseMoments
from compressor.pruning.skeleton import copy_structure, named_tensors

Scores = NDArray[np.float64]
UserFunction = Callable[[Group, Mapping[str, Tensor]], Any]
Importance = str | UserFunction
METHODS = ("l1", "l2", "bn", "taylor", "fpgm", "random", "reconstruction")


class Rankable(Space, Protocol):
    """Protocol of objects whose channels can be scored, such as a `PruningSpace`."""

    @property
    def groups(self) -> Sequence[Group]:
        """Its groups, in order."""

    @property
    def makers(self) -> Sequence[Sequence[tuple[str, int]]]:
        """Tensors that produce the channels of each group, with the axis."""


@dataclass(frozen=True)
class Ranking:
    """Scores of all units, (width,) for each group; units with higher scores are kept, ties by lower index.

    `by_l1` are the names of groups that the method could not score, and that have L1 scores instead.
    """

    method: str
    scores: tuple[Scores, ...]
    order: tuple[NDArray[np.int64], ...]
    by_l1: tuple[str, ...] = ()

    def kept(self, group: int, width: int) -> tuple[int, ...]:
        """Return the `width` best units of a group, in their original order."""
        return tuple(sorted(self.order[group][:width].tolist()))


def rank(space: Rankable, importance: Importance, data: Any = None, seed: int = 0) -> Ranking:
    """Score all units of all groups on the present weights.

    Methods; the first four are sums over the layers of a group, each layer scaled to mean 1 so that all have equal
    weight:
        l1, l2: Norm of the filters that produce the channel (Li et al., ICLR 2017).
        bn: |scale| of its batch-norms (Liu et al., ICCV 2017); L1 norm of the filters if a group has none.
        fpgm: Distance of a filter to all others of its layer (He et al., CVPR 2019).
        taylor: |sum of weight * gradient| over all elements that are removed with the channel (Molchanov et al.,
            CVPR 2019).
        random: Uniform, by `seed`.
        reconstruction: The step at which a channel goes if each time that goes which costs least after the layers
            that read the group are refitted (`reconstruction`). L1 where no such layer has moments.

    Args:
        data: For "taylor" pairs of (inputs, labels), or a function of the model that returns a loss; for
            "reconstruction" batches as for `space.compensate`, or their `DenseMoments`.
        seed: Of "random", and of the positions at which "reconstruction" takes moments.

    Raises:
        CompressorError: The method is unknown, it needs data and has none, or scores have a wrong size or are not
            finite.
    """
    tensors = {name: tensor.detach() for name, tensor in named_tensors(space.model).items()}
    by_l1: list[str] = []
    if callable(importance):
        name = getattr(importance, "__name__", "function")
        scores = [_from_user(importance, group, tensors) for group in space.groups]
    elif importance not in METHODS:
        raise CompressorError(
            f"There is no importance '{importance}'.", f"Choose one of {', '.join(METHODS)}, or a function."
        )
    else:
        name = importance
        if importance == "random":
            random = np.random.default_rng(seed)
            scores = [random.random(group.width) for group in space.groups]
        elif importance == "taylor":
            scores = _taylor(space, data)
        elif importance == "reconstruction":
            scores = _reconstruction(space, data, seed, tensors, by_l1)
        else:
            scores = [_magnitude(space, group, importance, tensors) for group in space.groups]
    for group, values in zip(space.groups, scores, strict=True):
        if not np.isfinite(values).all():
            raise CompressorError(
                f"Scores of group '{group.name}' are not finite.", "Are the weights (or the loss) NaN?"
            )
    order = tuple(np.argsort(-values, kind="stable") for values in scores)
    return Ranking(name, tuple(scores), order, tuple(by_l1))


def _from_user(function: UserFunction, group: Group, tensors: Mapping[str, Tensor]) -> Scores:
    values = function(group, tensors)
    values = (
        values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    )
    if values.shape != (group.width,):
        raise CompressorError(
            f"The importance function gave shape {values.shape} for group '{group.name}', which has "
            f"{group.width} units.",
            "Return one number per unit.",
        )
    return np.asarray(values, dtype=np.float64)


def _by_unit(space: Rankable, group: Group, name: str, axis: int, line: Tensor) -> Scores:
    """Sum values along an axis of a tensor into the units of a group."""
    layout = space.slicer.layouts[dict(space.slicer.axes[name])[axis]]
    here = layout.group == group.index
    values = line.detach().cpu().double().numpy()
    summed = np.bincount(layout.unit[here], weights=values[here], minlength=group.width)
    return np.asarray(summed, dtype=np.float64)


def _magnitude(space: Rankable, group: Group, method: str, tensors: Mapping[str, Tensor]) -> Scores:
    total = np.zeros(group.width)
    if method == "bn":
        for name, axes in space.slicer.axes.items():
            if _is_norm_scale(space.model, name) and _runs_through(space, group, axes[0][1]):
                total += _scaled(_by_unit(space, group, name, 0, tensors[name].double().abs()))
        if total.any():
            return total
        method = "l1"
    for name, axis in space.makers[group.index]:
        weight = (
            tensors[name].double().movedim(axis, 0).flatten(1)
            if tensors[name].dim() > 1
            else tensors[name].double()[:, None]
        )
        if method == "l1":
            line = weight.abs().sum(1)
        elif method == "l2":
            line = weight.square().sum(1)
        else:
            line = torch.cdist(weight[None], weight[None])[0].sum(1)
        units = _by_unit(space, group, name, axis, line)
        total += _scaled(np.sqrt(units) if method == "l2" else units)
    return total


def _scaled(values: Scores) -> Scores:
    mean = float(values.mean())
    return values / mean if mean > 0 else values


def _runs_through(space: Rankable, group: Group, layout: int) -> bool:
    return bool((space.slicer.layouts[layout].group == group.index).any())


def _is_norm_scale(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(
        model.get_submodule(path), (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    )


def _reconstruction(
    space: Rankable, data: Any, seed: int, tensors: Mapping[str, Tensor], by_l1: list[str]
) -> list[Scores]:
    """Score all groups, and name those that have L1 scores in `by_l1`."""
    if data is None:
        raise CompressorError(
            "Reconstruction importance needs data.", "Pass data=batches of inputs; labels are ignored."
        )
    moments = data if isinstance(data, DenseMoments) else DenseMoments(space, data, seed=seed)
    scores = []
    for group, found in zip(space.groups, reconstruction.scores(moments, space.groups), strict=True):
        if found is None:
            by_l1.append(group.name)
            found = _magnitude(space, group, "l1", tensors)
        scores.append(found)
    return scores


def _taylor(space: Rankable, data: Any) -> list[Scores]:
    if data is None:
        raise CompressorError(
            "Taylor importance needs data.",
            "Pass data=[(inputs, labels), ...], or a function of the model that returns a loss.",
        )
    # A second network over the same memory receives the gradients, so that the user's model is not affected.
    twin = copy_structure(
        space.model,
        lambda t: (
            nn.Parameter(t.detach(), requires_grad=t.dtype.is_floating_point)
            if isinstance(t, nn.Parameter)
            else t.clone()
        ),
    ).eval()
    with torch.enable_grad():
        for loss in _losses(twin, data):
            loss.backward()  # type: ignore[no-untyped-call]
    scores = [np.zeros(group.width) for group in space.groups]
    for name, parameter in twin.named_parameters():
        if name not in space.slicer.axes or parameter.grad is None:
            continue
        product = parameter.detach().double() * parameter.grad.double()
        for axis, layout in space.slicer.axes[name]:
            line = product.movedim(axis, 0).flatten(1).sum(1) if product.dim() > 1 else product
            for index in np.unique(space.slicer.layouts[layout].group).tolist():
                if index >= 0:
                    scores[index] += _by_unit(space, space.groups[index], name, axis, line)
    return [np.abs(values) for values in scores]


def _losses(model: nn.Module, data: Any) -> Iterable[Tensor]:
    if callable(data):
        yield data(model)
        return
    device = next(model.parameters()).device
    count = 0
    for batch in data:
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise CompressorError(
                "Data for Taylor importance must be pairs of inputs and labels.", "[(inputs, labels), ...]"
            )
        inputs, labels = batch
        yield nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device))
        count += 1
    if count == 0:
        raise CompressorError(
            "Data for Taylor importance has no batch.", "Pass at least one pair of inputs and labels."
        )
