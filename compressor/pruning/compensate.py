"""Compensation: refits the layers of a sliced network, in closed form, to the dense network's outputs.

No labels and no training are needed. `docs/method/compensation.md` has formulas, sources and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.models.computed import evaluated
from compressor.pruning.calibration import QUICK, THOROUGH, Images, Space, dense_copy, recorded
from compressor.pruning.least_squares import LARGEST, Fit, Regression, Samples
from compressor.pruning.moments import DenseMoments
from compressor.pruning.moves import moved_back
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.refit import TOO_LARGE, Refit, along
from compressor.pruning.replay import State, counterpart
from compressor.pruning.sites import Site, find_sites, shortcuts_first
from compressor.pruning.skeleton import named_tensors
from compressor.pruning.verdict import Compensation, Exact, judged

METHODS = ("layers", "quick", "moments")


def compensate(
    space: Space,
    plan: ChannelPlan,
    batches: Iterable[Any] | DenseMoments,
    method: str = "layers",
    *,
    seed: int = 0,
) -> Compensation:
    """Slice the space's network, and refit the layers whose inputs changed.

    An eighth of the images judges the network that comes out: if its outputs on them are not closer to the dense
    network's than those of the network that is only sliced, that network is returned.

    Args:
        plan: A plan of the space.
        batches: Inputs: tensors, or tuples that begin with the network's inputs (labels are ignored). For "moments"
            also `DenseMoments`, which several plans can share.
        method: "layers" fits each layer to what the slim network feeds it, in order of execution. "quick" does so with
            fewer positions, strengths and steps. "moments" solves from second moments of the dense network's inputs,
            without running the slim network.
        seed: Seed of the roles of the images and of the sampled positions.

    Raises:
        CompressorError: The method is unknown, there are fewer than three images, or the network cannot be replayed.
    """
    if method not in METHODS:
        raise CompressorError(f"There is no method '{method}' of compensation.", f"Choose one of {', '.join(METHODS)}.")
    with torch.no_grad():
        if method == "moments":
            moments = batches if isinstance(batches, DenseMoments) else DenseMoments(space, batches, seed=seed)
            return moments.judged(plan)
        if isinstance(batches, DenseMoments):
            raise CompressorError("Moments do not hold the images.", "Pass batches, or method='moments'.")
        effort = QUICK if method == "quick" else THOROUGH
        return _Walk(space, plan, Images.of(space, batches, seed, plan, effort)).run()


class _Walk:
    """Runs both networks side by side on all chunks, and refits each layer of the slim one before it runs."""

    def __init__(self, space: Space, plan: ChannelPlan, images: Images) -> None:
        self.space, self.plan, self.images = space, plan, images
        self.small = space.apply(plan)
        self._network = dense_copy(space)
        self.dense = recorded(self._network, images)
        with evaluated(self.small):
            self.slim = recorded(self.small, images)
        if [call.name for call in self.dense.calls] != [call.name for call in self.slim.calls]:
            raise CompressorError(
                "The slim network runs other operations than the dense one and cannot be compensated.",
                "Use the network that `apply` returns.",
            )
        self.slim.order(shortcuts_first(self.dense))
        self.states = [
            (self.dense.start(chunk), self.slim.start(chunk)) for chunk in images.chunks[: images.judge.start]
        ]
        sites, self.left = find_sites(self.dense)
        dense, slim, kept = named_tensors(space.model), named_tensors(self.small), space.indices(plan)
        layers = {
            site.number: Refit(space, site, dense, slim, kept.get(site.weight, {})) for site in sites
        }
        first = next((place for place, site in enumerate(sites) if layers[site.number].lost), len(sites))
        self.ends: dict[int, list[Site]] = {}
        self.large: dict[int, Site] = {}
        self.layers: dict[int, Refit] = {}
        self.sites: list[Site] = []
        for site in sites[first:]:
            layer = layers[site.number]
            if layer.width > LARGEST and layer.mixing is None:
                self.left[site.layer] = TOO_LARGE
                continue
            self.sites.append(site)
            self.layers[site.number] = layer
            self.ends.setdefault(site.end, []).append(site)
            if layer.width > LARGEST:
                self.large[site.number] = site
        #: Of each chunk and call: the dense network's results to which layers are fitted, and inputs of large layers.
        self.goals: dict[tuple[int, int], Tensor] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.refitted: dict[str, float] = {}

    def run(self) -> Compensation:
        """Refit all layers from the first one that lost inputs on."""
        for site in self.sites:
            refit = self._refit_channels if site.number in self.large else self._refit
            found = refit(site, self.layers[site.number])
            if found is not None:
                self.refitted[site.layer] = found.error / max(found.before, 1e-300)
        exact = Exact.of(self.images, self._network)
        return judged(
            self.space, self.plan, self.small, self.sites, self.refitted, self.left, exact, self.images
        )

    def _refit(self, site: Site, layer: Refit) -> Fit | None:
        seen, left_out = Samples(), Samples()
        for index, (_, slim) in enumerate(self.states):
            goal, offset = self._advance(site, layer, index)
            geometry, x = layer.geometry, slim.values[self._slim_value(site.number, site.source)]
            places = self.images.places(site, geometry, x, goal, index, layer.width)
            samples = left_out if index in self.images.choose else seen
            samples.x.append(geometry.patches(x, places))
            samples.goal.append(geometry.rows(goal - offset, places))
            samples.offset.append(
                offset.reshape(geometry.groups, 1, -1) if site.shortcut is None else geometry.rows(offset, places)
            )
        effort = self.images.effort
        regression = Regression(seen.joined(), left_out.joined(), site.limits, site.constant is not None)
        found = regression.fit(layer.old, effort.strengths, effort.steps)
        if found is not None:
            layer.write(found.weight, found.constant)
        return found

    def _refit_channels(self, site: Site, layer: Refit) -> Fit | None:
        """Refit a layer of large patches: the dense network's input channels are fitted, not the outputs."""
        seen, left_out = Samples(), Samples()
        ends = []
        for index, (_, slim) in enumerate(self.states):
            ends.append(self._advance(site, layer, index))
            x, goal = slim.values[self._slim_value(site.number, site.source)], self.inputs.pop((index, site.number))
            rows = [layer.channels(each) for each in (x, goal)]
            places = self.images.places(site, None, rows[0], rows[1], index, rows[0].shape[-1])
            samples = left_out if index in self.images.choose else seen
            samples.x.append(rows[0][None] if places is None else rows[0][places][None])
            samples.goal.append(rows[1][None] if places is None else rows[1][places][None])
            samples.offset.append(rows[1].new_zeros(1, 1, 1))
        mixing = layer.mixing
        if mixing is None:
            return None
        regression = Regression(seen.joined(), left_out.joined(), None, site.constant is not None)
        mixed = regression.fit(mixing, self.images.effort.strengths)
        if mixed is None:
            return None
        before, stored = self._output_error(site, layer, ends), layer.stored()
        layer.write(*layer.folded(mixed.weight, mixed.constant))
        error = self._output_error(site, layer, ends)
        if error < before:
            return replace(mixed, error=error, before=before)
        layer.restore(stored)
        return None

    def _output_error(self, site: Site, layer: Refit, ends: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Return the squared error of a layer's output on the images that choose."""
        total = 0.0
        for index, (goal, offset) in enumerate(ends):
            if index in self.images.choose:
                found = layer.scaled(self.slim.result(self.states[index][1], site.number)) + offset
                if site.limits is not None:
                    found, goal = found.clamp(*site.limits), goal.clamp(*site.limits)
                total += float((found - goal).double().square().sum())
        return total

    def _advance(self, site: Site, layer: Refit, index: int) -> tuple[Tensor, Tensor]:
        """Run both networks up to a layer; returns the goal, and what is added to the layer's scaled product."""
        dense, slim = self.states[index]
        self.dense.advance(dense, site.end + 1, partial(self._catch, index))
        self.slim.advance(slim, site.number)
        goal = self.goals.pop((index, site.end))
        offset = along(layer.shift, goal, site.axis)
        if site.shortcut is None:
            return goal, offset
        shortcut = slim.values[self._slim_value(site.end, site.shortcut)]
        return goal, offset + moved_back(self.slim, site.path, shortcut, self.slim.calls[site.number].shapes[0])

    def _slim_value(self, number: int, value: int) -> int:
        """Return the number in the slim network of a value that a call of the dense one reads."""
        return counterpart(self.dense.calls[number], self.slim.calls[number], value)

    def _catch(self, index: int, number: int, state: State) -> None:
        """Keep the dense network's outputs that the slim one's are fitted to."""
        for site in self.ends.get(number, ()):
            value = state.values[self.dense.calls[number].outs[0]]
            value = moved_back(self.dense, site.path, value, self.dense.calls[site.number].shapes[0])
            kept = self.layers[site.number].kept_out
            self.goals[index, number] = (
                value.clone() if kept is None else value.index_select(site.axis, kept.to(value.device))
            )
        if (large := self.large.get(number)) is not None:
            self.inputs[index, number] = state.values[large.source].clone()
