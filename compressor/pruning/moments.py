"""Compensation from second moments of the dense network, which any number of plans share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from compressor.pruning.calibration import Reference, Space
from compressor.pruning.least_squares import LARGEST, Gram, Moments
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.refit import TOO_LARGE, Refit
from compressor.pruning.replay import Recording, State
from compressor.pruning.sites import Site
from compressor.pruning.skeleton import named_tensors
from compressor.pruning.verdict import Compensation, judged


class DenseMoments:
    """Second moments of the inputs of the dense network's layers, from which any plan is compensated.

    Gathered once for given weights. They take about 16 p (p + o) bytes for a layer with p inputs and o outputs, in all
    `bytes`.

    Args:
        space: The space; its network's present weights are used.
        batches, seed: As for `compensate`.
    """

    def __init__(self, space: Space, batches: Iterable[Any], *, seed: int = 0) -> None:
        self.space = space
        self.reference = Reference(space, batches, seed=seed)
        self.images = images = self.reference.images
        self._dense, recording = self.reference.tensors, self.reference.recording
        with torch.no_grad():
            #: Number of the call -> layer that reads channels of a group.
            self.readers = readers = {
                site.number: Refit(space, site, self._dense, self._dense, {})
                for site in self.reference.sites
                if self._reads_groups(site)
            }
            #: Number of the call -> moments for fits, and those that choose.
            self._moments: dict[int, tuple[Moments, Moments]] = {}
            parts = [self._gathered(recording, readers, which) for which in (images.fit, images.choose)]
            for number, gram in parts[0].items():
                weight = readers[number].old if readers[number].width <= LARGEST else None
                self._moments[number] = (Moments.of(gram, weight), Moments.of(parts[1][number], weight))

    @property
    def bytes(self) -> int:
        """Memory of the moments."""
        held = [each for pair in self._moments.values() for part in pair for each in (part.gram.square, part.xy)]
        return sum({each.data_ptr(): each.nbytes for each in held}.values())

    def total(self, number: int) -> Moments | None:
        """Return the moments of a reader on the images that fit and choose; None if they were too large to form."""
        pair = self._moments.get(number)
        return None if pair is None else pair[0] + pair[1]

    def _reads_groups(self, site: Site) -> bool:
        """Whether channels that a layer reads can be removed, other than whole groups."""
        return any(axis == 1 - site.geometry.transposed for axis, _ in self.space.slicer.axes.get(site.weight, ()))

    def _gathered(self, recording: Recording, readers: Mapping[int, Refit], which: range) -> dict[int, Gram]:
        """Return the moments of the inputs of layers on some of the chunks."""
        grams: dict[int, Gram] = {}

        def gather(index: int, number: int, state: State) -> None:
            layer = readers.get(number)
            if layer is None:
                return
            site = layer.site
            x, y = (state.values[each] for each in (site.source, recording.calls[number].outs[0]))
            if layer.width <= LARGEST:
                places = self.images.places(site, site.geometry, x, y, index, layer.width)
                patches = site.geometry.patches(x, places)
            elif layer.mixing is not None:
                rows = layer.channels(x)
                places = self.images.places(site, None, rows, rows, index, rows.shape[1])
                patches = (rows if places is None else rows[places])[None]
            else:
                return
            gram = Gram.of(patches)
            grams[number] = grams[number] + gram if number in grams else gram

        for index in which:
            recording.finish(recording.start(self.images.chunks[index]), partial(gather, index))
        return grams

    def apply(self, plan: ChannelPlan) -> nn.Module:
        """Slice the space's network, and refit the layers that lost inputs; no image runs through it."""
        with torch.no_grad():
            return self._applied(plan)[0]

    def judged(self, plan: ChannelPlan) -> Compensation:
        """Compensate a plan as `apply`, and compare outputs on the images that judge; see `compensate`."""
        with torch.no_grad():
            small, refitted, left = self._applied(plan)
            return judged(self.reference, plan, small, refitted, left)

    def _applied(self, plan: ChannelPlan) -> tuple[nn.Module, dict[str, float], dict[str, str]]:
        small = self.space.apply(plan)
        slim, kept = named_tensors(small), self.space.indices(plan)
        refitted, left = {}, dict(self.reference.left)
        for site in self.reference.sites:
            if site.weight not in slim:
                continue  # it is part of a removed block
            layer = Refit(self.space, site, self._dense, slim, kept.get(site.weight, {}))
            if not layer.lost:
                continue
            if site.number not in self._moments:
                whole = layer.geometry.groups < site.geometry.groups
                left[site.layer] = "its groups lost no inputs" if whole else TOO_LARGE
                continue
            found = layer.from_moments(*self._moments[site.number])
            if found is not None:
                refitted[site.layer] = found.error / max(found.before, 1e-300)
        return small, refitted, left
