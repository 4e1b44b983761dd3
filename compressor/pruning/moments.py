"""Compensation from second moments of the dense network, which any number of plans share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.pruning.calibration import Images, Space, dense_copy, recorded
from compressor.pruning.least_squares import LARGEST, Gram
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.refit import TOO_LARGE, Refit
from compressor.pruning.replay import State
from compressor.pruning.sites import Site, find_sites
from compressor.pruning.skeleton import named_tensors
from compressor.pruning.verdict import Compensation, judged


class DenseMoments:
    """Second moments of the inputs of the dense network's layers, from which any plan is compensated.

    Gathered once for given weights. They take 16 p^2 bytes for a layer with p inputs, in all `bytes`.

    Args:
        space: The space; its network's present weights are used.
        batches, seed: As for `compensate`.
    """

    def __init__(self, space: Space, batches: Iterable[Any], *, seed: int = 0) -> None:
        self.space = space
        self.images = Images.of(space, batches, seed)
        self.exact: list[list[Tensor]] = []
        with torch.no_grad():
            self.dense = dense_copy(space)
            self._recording = recording = recorded(self.dense, self.images)
            self.sites, self.left = find_sites(recording)
            self._grams: dict[tuple[int, bool], Gram] = {}
            self._readers = {site.number: site for site in self.sites if self._reads_groups(site)}
            for index, chunk in enumerate(self.images.chunks):
                found = recording.finish(recording.start(chunk), partial(self._gather, index))
                if self.images.left_out(index):
                    self.exact.append(found)

    @property
    def bytes(self) -> int:
        """Memory of the moments."""
        return sum(8 * (gram.square.numel() + gram.mean.numel()) for gram in self._grams.values())

    def _reads_groups(self, site: Site) -> bool:
        """Whether channels that a layer reads can be removed, other than whole groups."""
        return any(axis == 1 - site.geometry.transposed for axis, _ in self.space.slicer.axes.get(site.weight, ()))

    def _gather(self, index: int, number: int, state: State) -> None:
        site = self._readers.get(number)
        if site is None:
            return
        tensors = named_tensors(self.dense)
        layer = Refit(self.space, site, tensors, tensors, {})
        x, y = (state.values[each] for each in (site.source, self._recording.calls[number].outs[0]))
        width = layer.width
        if width > LARGEST:
            if layer.mixing is None:
                return
            rows = layer.channels(x)
            places = self.images.places(site, None, rows, rows, index, rows.shape[1])
            patches = (rows if places is None else rows[places])[None]
        else:
            places = self.images.places(site, site.geometry, x, y, index, width)
            patches = site.geometry.patches(x, places)
        key = (number, self.images.left_out(index))
        gram = Gram.of(patches)
        self._grams[key] = self._grams[key] + gram if key in self._grams else gram

    def apply(self, plan: ChannelPlan) -> nn.Module:
        """Slice the space's network, and refit the layers that lost inputs; no image runs through it."""
        with torch.no_grad():
            return self._applied(plan)[0]

    def judged(self, plan: ChannelPlan) -> Compensation:
        """Compensate a plan as `apply`, and compare outputs on the images left out; see `compensate`."""
        with torch.no_grad():
            small, refitted, left = self._applied(plan)
            return judged(self.space, plan, small, self.sites, refitted, left, self.exact, self.images)

    def _applied(self, plan: ChannelPlan) -> tuple[nn.Module, dict[str, float], dict[str, str]]:
        small = self.space.apply(plan)
        dense, slim, kept = named_tensors(self.dense), named_tensors(small), self.space.indices(plan)
        refitted, left = {}, dict(self.left)
        for site in self.sites:
            layer = Refit(self.space, site, dense, slim, kept.get(site.weight, {}))
            if not layer.lost:
                continue
            grams = [self._grams.get((site.number, held)) for held in (False, True)]
            if grams[0] is None or grams[1] is None:
                whole = layer.geometry.groups < site.geometry.groups
                left[site.layer] = "its groups lost no inputs" if whole else TOO_LARGE
                continue
            found = layer.from_moments(grams[0], grams[1])
            if found is not None:
                refitted[site.layer] = found.error / max(found.before, 1e-300)
        return small, refitted, left
