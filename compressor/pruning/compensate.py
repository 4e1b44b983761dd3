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
from compressor.pruning.absence import Absence
from compressor.pruning.calibration import QUICK, THOROUGH, Reference, Space
from compressor.pruning.least_squares import LARGEST, Fit, Regression, Samples
from compressor.pruning.moments import DenseMoments
from compressor.pruning.moves import moved_back
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.refit import TOO_LARGE, Refit, along
from compressor.pruning.removal import inside
from compressor.pruning.replay import Recording, State, counterpart
from compressor.pruning.sites import Site
from compressor.pruning.skeleton import named_tensors
from compressor.pruning.verdict import Compensation, judged

METHODS = ("layers", "quick", "moments")
EFFORTS = {"layers": THOROUGH, "quick": QUICK}
"""How thoroughly the methods fit that run the slim network."""


def compensate(
    space: Space,
    plan: ChannelPlan,
    batches: Iterable[Any] | Reference | DenseMoments,
    method: str = "layers",
    *,
    seed: int = 0,
) -> Compensation:
    """Slice the space's network, and refit the layers whose inputs changed.

    An eighth of the images judges the network that comes out: if its outputs on them are not closer to the dense
    network's than those of the network that is only sliced, that network is returned.

    Args:
        plan: A plan of the space.
        batches: Inputs: tensors, or tuples that begin with the network's inputs (labels are ignored). Several plans can
            share a `Reference`, which has the method's effort, or for "moments" `DenseMoments`.
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
        if isinstance(batches, DenseMoments):
            if method != "moments":
                raise CompressorError("Moments do not hold the images.", "Pass batches, or method='moments'.")
            return batches.judged(plan)
        if isinstance(batches, Reference):
            return _Walk(batches, plan).run()
        if method == "moments":
            return DenseMoments(space, batches, seed=seed).judged(plan)
        return _Walk(Reference(space, batches, seed=seed, effort=EFFORTS[method]), plan).run()


class _Walk:
    """Runs both networks side by side on all chunks, and refits each layer of the slim one before it runs."""

    def __init__(self, reference: Reference, plan: ChannelPlan) -> None:
        self.reference, self.plan, self.images = reference, plan, reference.images
        space, images, self.dense = reference.space, reference.images, reference.recording
        self.small = space.apply(plan)
        with evaluated(self.small):
            self.slim = Recording(self.small, images.chunks[0])
            self.absence = absence = Absence.of(reference, plan)
            if not absence.same_calls(self.slim):  # it has kept now what it computes once for a shape of inputs
                self.slim = Recording(self.small, images.chunks[0])
        if not absence.same_calls(self.slim):
            raise CompressorError(
                "The slim network runs other operations than the dense one and cannot be compensated.",
                "Use the network that `apply` returns.",
            )
        self.slim.order(absence.order)
        self.states = [
            (self.dense.start(chunk), self.slim.start(chunk)) for chunk in images.chunks[: images.judge.start]
        ]
        sites = [site for site in reference.sites if site.number in absence.places and site.end in absence.places]
        self.left = {name: why for name, why in reference.left.items() if not inside(name, absence.replaced)}
        dense, slim, kept = named_tensors(space.model), named_tensors(self.small), space.indices(plan)
        layers = {
            site.number: Refit(space, site, dense, slim, kept.get(site.weight, {})) for site in sites
        }
        first = next(
            (place for place, site in enumerate(sites) if layers[site.number].lost or absence.touches(site)), len(sites)
        )
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
            self.ends.setdefault(absence.end(site), []).append(site)
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
        return judged(self.reference, self.plan, self.small, self.refitted, self.left)

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
                found = layer.scaled(self.slim.result(self.states[index][1], self._slim_number(site.number))) + offset
                if site.limits is not None:
                    found, goal = found.clamp(*site.limits), goal.clamp(*site.limits)
                total += float((found - goal).double().square().sum())
        return total

    def _advance(self, site: Site, layer: Refit, index: int) -> tuple[Tensor, Tensor]:
        """Run both networks up to a layer; returns the goal, and what is added to the layer's scaled product."""
        slim = self.states[index][1]
        number = self._slim_number(site.number)
        self.slim.advance(slim, number)
        goal = self._goal(site, index)
        if layer.kept_out is not None:
            goal = goal.index_select(site.axis, layer.kept_out.to(goal.device))
        offset = along(layer.shift, goal, site.axis)
        if site.shortcut is None:
            return goal, offset
        shortcut = slim.values[self._slim_value(site.end, site.shortcut)]
        path = [self._slim_number(each) for each in site.path]
        return goal, offset + moved_back(self.slim, path, shortcut, self.slim.calls[number].shapes[0])

    def _slim_number(self, number: int) -> int:
        """Return the number in the slim network of a call of the dense one."""
        return self.absence.places[number]

    def _slim_value(self, number: int, value: int) -> int:
        """Return the number in the slim network of a value that a call of the dense one reads."""
        return counterpart(self.dense.calls[number], self.slim.calls[self._slim_number(number)], value)

    def _goal(self, site: Site, index: int) -> Tensor:
        """Return the dense network's outputs that a layer is fitted to, of all its channels."""
        if self.reference.goals is not None and not self.large and not self.absence.ends:
            return self.reference.goals[index, site.number]
        self.dense.advance(self.states[index][0], self.absence.end(site) + 1, partial(self._catch, index))
        return self.goals.pop((index, site.number))

    def _catch(self, index: int, number: int, state: State) -> None:
        """Keep the dense network's outputs that the slim one's are fitted to."""
        for site in self.ends.get(number, ()):
            self.goals[index, site.number] = self.reference.goal(site, state, number)
        if (large := self.large.get(number)) is not None:
            self.inputs[index, number] = state.values[large.source].clone()
