"""Compensation: refits the layers of a sliced network, in closed form, to the dense network's outputs.

No labels and no training are needed. `docs/method/compensation.md` has formulas, sources and numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.counts import Layer
from compressor.pruning.least_squares import LARGEST, Fit, Gram, Regression, Samples, fit_moments
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.replay import Recording, State, outputs
from compressor.pruning.sites import Geometry, Site, find_sites, shortcuts_first
from compressor.pruning.skeleton import copy_structure, named_tensors, walk
from compressor.pruning.slicer import Slicer, swap

METHODS = ("layers", "moments")
NO_BETTER = "no fit has a lower error on the images left out"
COMPUTED = "its weights are computed while the network runs"
TOO_LARGE = f"its patches have more than {LARGEST} values"
CHUNK = 32
"""Images that run through the networks at once."""
LEFT_OUT = 0.25
"""Share of the images that choose the strengths, and whether a fit is kept."""
MEMORY = 4 * 2**30
"""Bytes of activations that are held at most; of more images only the first of a random order are used."""
SAMPLES, SAMPLES_OF_GROUPS, SAMPLES_PER_INPUT = 20_000, 4_000, 20
"""Output positions that a layer is fitted to, at least; of one with groups; and for each of its inputs."""
SAMPLE_BYTES = 256 * 2**20
"""Bytes of the inputs of these positions, at most."""


class Space(Protocol):
    """What is used of a `PruningSpace`."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def example_input(self) -> tuple[Any, ...]: ...

    @property
    def slicer(self) -> Slicer: ...

    @property
    def layers(self) -> Sequence[Layer]: ...

    def apply(self, plan: ChannelPlan) -> nn.Module: ...

    def dense(self) -> ChannelPlan: ...

    def widths(self, x: Any) -> Any: ...

    def activations(self, widths: Any) -> Any: ...

    def indices(self, plan: ChannelPlan) -> dict[str, dict[int, Tensor]]: ...


@dataclass(frozen=True)
class Compensation:
    """A compensated network, and what was done to it.

    Args:
        network: The slim network.
        refitted: Layer -> its squared error on the images left out, as a share of the sliced layer's.
        left: Layer that lost inputs and is as sliced -> the reason.
        error, error_cut: Squared error of the network's outputs on the images left out, relative to the dense
            network's outputs, and that of the network that is only sliced.
        images: Number of images used, including those left out.
        statistics: Of its batch norms: "dense", or "own" if re-estimated ones make the outputs closer.
    """

    network: nn.Module
    refitted: Mapping[str, float]
    left: Mapping[str, str]
    error: float
    error_cut: float
    images: int
    statistics: str


def compensate(
    space: Space,
    plan: ChannelPlan,
    batches: Iterable[Any] | DenseMoments,
    method: str = "layers",
    *,
    seed: int = 0,
) -> Compensation:
    """Slice the space's network, and refit the layers whose inputs changed.

    If the outputs on the images left out are not closer to the dense network's than those of the network that is only
    sliced, that network is returned.

    Args:
        plan: A plan of the space.
        batches: Inputs: tensors, or tuples that begin with the network's inputs (labels are ignored). For "moments"
            also `DenseMoments`, which several plans can share.
        method: "layers" fits each layer to what the slim network feeds it, in order of execution. "moments" solves
            from second moments of the dense network's inputs, without running the slim network.
        seed: Seed of the images left out and of the sampled positions.

    Raises:
        CompressorError: The method is unknown, there are fewer than two images, or the network cannot be replayed.
    """
    if method not in METHODS:
        raise CompressorError(f"There is no method '{method}' of compensation.", f"Choose one of {', '.join(METHODS)}.")
    with torch.no_grad():
        if method == "moments":
            moments = batches if isinstance(batches, DenseMoments) else DenseMoments(space, batches, seed=seed)
            return moments.judged(plan)
        if isinstance(batches, DenseMoments):
            raise CompressorError("Moments do not hold the images.", "Pass batches, or method='moments'.")
        return _Walk(space, plan, Images.of(space, batches, seed, plan)).run()


@dataclass(frozen=True)
class Images:
    """Chunks of calibration images of equal size, in random order; the last `held` are left out of fits."""

    chunks: list[tuple[Any, ...]]
    held: int
    seed: int

    @classmethod
    def of(cls, space: Space, batches: Iterable[Any], seed: int, plan: ChannelPlan | None = None) -> Images:
        """Collect inputs, within the memory that activations may take."""
        rows = [
            ((batch,) if isinstance(batch, Tensor) else tuple(batch))[: len(space.example_input)] for batch in batches
        ]
        images = sum(len(row[0]) for row in rows)
        if images < 2:
            raise CompressorError(f"Compensation needs at least two images, not {images}.", "Pass batches of inputs.")
        parameter = next(space.model.parameters())
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
        plans = [space.dense()] if plan is None else [space.dense(), plan]
        each = sum(space.activations(space.widths(each.widths)) for each in plans) * parameter.element_size()
        order = order[: max(2, min(images, MEMORY // max(1, each)))]
        size = max(1, min(CHUNK, len(order) // 4))
        whole = [
            torch.cat([row[place] for row in rows])[order].to(parameter.device) if isinstance(first, Tensor) else first
            for place, first in enumerate(rows[0])
        ]
        chunks = [
            tuple(each[start : start + size] if isinstance(each, Tensor) else each for each in whole)
            for start in range(0, len(order) - size + 1, size)
        ]
        return cls(chunks, max(1, round(len(chunks) * LEFT_OUT)), seed)

    def __len__(self) -> int:
        return sum(len(chunk[0]) for chunk in self.chunks)

    def left_out(self, index: int) -> bool:
        """Whether a chunk is left out of fits."""
        return index >= len(self.chunks) - self.held

    def error(self, network: nn.Module, exact: Sequence[Sequence[Tensor]]) -> float:
        """Return the squared error of a network's outputs on the images left out, as a share of the exact ones'."""
        chunks = [chunk for index, chunk in enumerate(self.chunks) if self.left_out(index)]
        with _evaluating(network):
            return difference(exact, [outputs(network(*chunk)) for chunk in chunks])

    def places(
        self, site: Site, geometry: Geometry | None, x: Tensor, y: Tensor, index: int, width: int
    ) -> Tensor | None:
        """Return the random output positions at which a layer is fitted; None for all.

        Args:
            geometry: Of the layer; None if x and y are rows.
            x, y: Its input and output for chunk `index`.
            width: Inputs of one output.
        """
        groups = 1 if geometry is None else geometry.groups
        wanted = max(SAMPLES if groups == 1 else SAMPLES_OF_GROUPS, SAMPLES_PER_INPUT * width)
        wanted = min(wanted, SAMPLE_BYTES // (4 * groups * width))
        positions = len(y) if geometry is None else geometry.positions(y)
        alike = len(x) if geometry is not None and geometry.rank else 1
        each = math.ceil(wanted / (len(self.chunks) * alike))
        if each >= positions:
            return None
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + site.number * 1_009 + index)
        return torch.randperm(positions, generator=random)[:each].sort().values.to(x.device)


def _recorded(network: nn.Module, images: Images) -> Recording:
    recording = Recording(network, images.chunks[0])
    if not recording.repeats(images.chunks[0]):
        raise CompressorError(
            "The network cannot be compensated: replaying the calls of its forward pass gives other outputs.",
            "Does its forward compute outside of torch, or mix the images of a batch?",
        )
    return recording


def _dense_copy(space: Space) -> nn.Module:
    """Return the dense network over the same memory, with the classes that slim networks have."""
    dense = copy_structure(space.model, lambda tensor: tensor.detach()).eval()
    by_path = dict(walk(dense))
    for path, name in space.slicer.swaps.items():
        swap(by_path[path], name)
    return dense


class _Layer:
    """The weights of one site in the dense and the slim network.

    Args:
        dense, slim: Parameters and buffers by name.
        kept: Axis of the weight -> kept indices.
    """

    def __init__(
        self,
        space: Space,
        site: Site,
        dense: Mapping[str, Tensor],
        slim: Mapping[str, Tensor],
        kept: Mapping[int, Tensor],
    ) -> None:
        self.site, self.tensors = site, slim
        self.weight, self.dense_weight = slim[site.weight], dense[site.weight].detach()
        out_axis, self.in_axis = (1, 0) if site.geometry.transposed else (0, 1)
        self.kept_out, self.kept_in = kept.get(out_axis), kept.get(self.in_axis)
        #: Neighbouring inputs of a linear layer that belong to one channel that was flattened.
        self.run = 1
        for axis, layout in space.slicer.axes.get(site.weight, ()):
            if axis == self.in_axis and not site.geometry.rank:
                self.run = space.slicer.layouts[layout].run
        groups = site.geometry.groups
        if groups > 1 and self.kept_out is not None:
            # Whole groups may be gone, such as channels of a depthwise convolution.
            groups = len(torch.unique(self.kept_out // (self.dense_weight.shape[0] // groups)))
        self.geometry = site.geometry.with_groups(groups)
        outs = self.weight.shape[out_axis] // (1 if site.geometry.transposed else groups)
        self.width = self.weight.numel() // (groups * outs)
        scale = torch.ones(groups * outs, dtype=torch.float64, device=self.weight.device)
        shift = torch.zeros_like(scale)
        if site.norm is not None:
            scale, shift = site.norm.affine(slim)
        if site.bias is not None:
            shift = shift + slim[site.bias].double() * scale
        self.scale, self.shift = scale.reshape(groups, 1, outs), shift

    @property
    def old(self) -> Tensor:
        """Scaled weights, (g, p, o), float64."""
        return self.geometry.matrix(self.weight.detach()).double() * self.scale

    @property
    def lost(self) -> bool:
        """Whether the layer reads fewer channels than in the dense network."""
        if self.geometry.groups < self.site.geometry.groups:
            return True
        return self.kept_in is not None and len(self.kept_in) < self.dense_weight.shape[self.in_axis]

    @property
    def mixing(self) -> Tensor | None:
        """The kept ones of the dense network's input channels, (1, slim, dense); None for a layer with groups."""
        if self.site.geometry.groups > 1 or self.dense_weight.shape[self.in_axis] // self.run > LARGEST:
            return None
        channels = self.dense_weight.shape[self.in_axis] // self.run
        whole = torch.eye(channels, dtype=torch.float64, device=self.weight.device)
        kept = self.kept_in
        return (whole if kept is None else whole[kept[:: self.run] // self.run])[None]

    def channels(self, x: Tensor) -> Tensor:
        """Return the channels of all positions of an input, (n, C)."""
        if self.geometry.rank:
            return x.movedim(1, -1).flatten(0, -2)
        return x.reshape(-1, x.shape[-1] // self.run, self.run).transpose(1, 2).flatten(0, 1)

    def folded(self, mixing: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled weights that read the dense network's channels as mixed from the slim one's."""
        full = self.full()
        full = full.reshape(mixing.shape[2], -1, full.shape[2])
        return (
            torch.einsum("sd,dko->sko", mixing[0], full).flatten(0, 1)[None],
            torch.einsum("d,dko->o", constant[0], full)[None],
        )

    def full(self) -> Tensor:
        """Return the dense network's scaled weights for the outputs that are left, (g, all inputs, o)."""
        weight = self.dense_weight
        if self.kept_out is not None:
            weight = weight.index_select(1 - self.in_axis, self.kept_out.to(weight.device))
        return self.geometry.matrix(weight).double() * self.scale

    def from_moments(self, seen: Gram, left_out: Gram) -> Fit | None:
        """Refit the layer from moments of the dense network's patches, or of its channels if there are fewer."""
        constant = self.site.constant is not None
        full, kept = self.full(), self.kept_in
        assert kept is not None
        kept = kept.to(full.device)
        if seen.mean.shape[1] == full.shape[1]:
            taps = torch.arange(self.geometry.taps, device=kept.device)
            kept = (kept[:, None] * len(taps) + taps).flatten()
            found = fit_moments(seen, left_out, kept, full, self.old, constant)
            if found is not None:
                self.write(found.weight, found.constant)
            return found
        mixing = self.mixing
        assert mixing is not None
        whole = torch.eye(mixing.shape[2], dtype=torch.float64, device=full.device)[None]
        found = fit_moments(seen, left_out, kept[:: self.run] // self.run, whole, mixing, constant)
        if found is not None:
            self.write(*self.folded(found.weight, found.constant))
        return found

    def scaled(self, output: Tensor) -> Tensor:
        """Return the scaled product of weights and inputs from the layer's output."""
        axis = self.site.axis
        if self.site.bias is not None:
            output = output - along(self.tensors[self.site.bias].detach(), output, axis)
        return output * along(self.scale.flatten(), output, axis)

    def stored(self) -> list[Tensor]:
        """Return copies of what `write` changes."""
        return [each.detach().clone() for each in self._changed()]

    def restore(self, stored: Sequence[Tensor]) -> None:
        """Undo `write`."""
        for tensor, before in zip(self._changed(), stored, strict=True):
            tensor.copy_(before)

    def _changed(self) -> list[Tensor]:
        return [self.weight, *([self.tensors[self.site.constant]] if self.site.constant is not None else [])]

    def write(self, weight: Tensor, constant: Tensor) -> None:
        """Store the scaled weight, (g, p, o), and constant, (g, o); outputs of no scale stay as they are."""
        scale = torch.where(self.scale.abs() > 1e-4 * self.scale.abs().amax(), self.scale, math.inf)
        plain = self.geometry.matrix(self.weight.detach()).double()
        self.weight.copy_(self.geometry.weight(plain + (weight - plain * self.scale) / scale, self.weight))
        if self.site.constant is not None:
            added = (constant / scale[:, 0]).flatten()
            holder = self.tensors[self.site.constant]
            holder.add_((added if self.site.constant == self.site.bias else -added).to(holder.dtype))


class _Walk:
    """Runs both networks side by side on all chunks, and refits each layer of the slim one before it runs."""

    def __init__(self, space: Space, plan: ChannelPlan, images: Images) -> None:
        self.space, self.plan, self.images = space, plan, images
        self.small = space.apply(plan)
        self.dense = _recorded(_dense_copy(space), images)
        with _evaluating(self.small):
            self.slim = _recorded(self.small, images)
        if [call.name for call in self.dense.calls] != [call.name for call in self.slim.calls]:
            raise CompressorError(
                "The slim network runs other operations than the dense one and cannot be compensated.",
                "Use the network that `apply` returns.",
            )
        self.slim.order(shortcuts_first(self.dense))
        self.states = [(self.dense.start(chunk), self.slim.start(chunk)) for chunk in images.chunks]
        sites, self.left = find_sites(self.dense)
        dense, slim, kept = named_tensors(space.model), named_tensors(self.small), space.indices(plan)
        layers = {
            site.number: _Layer(space, site, dense, slim, kept.get(site.weight, {})) for site in sites
        }
        first = next((place for place, site in enumerate(sites) if layers[site.number].lost), len(sites))
        self.ends: dict[int, list[Site]] = {}
        self.large: dict[int, Site] = {}
        self.layers: dict[int, _Layer] = {}
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
        exact = [
            self.dense.finish(dense) for i, (dense, _) in enumerate(self.states) if self.images.left_out(i)
        ]
        return _judged(
            self.space, self.plan, self.small, self.sites, self.refitted, self.left, exact, self.images
        )

    def _refit(self, site: Site, layer: _Layer) -> Fit | None:
        seen, left_out = Samples(), Samples()
        for index, (_, slim) in enumerate(self.states):
            goal, offset = self._advance(site, layer, index)
            geometry, x = layer.geometry, slim.values[site.source]
            places = self.images.places(site, geometry, x, goal, index, layer.width)
            samples = left_out if self.images.left_out(index) else seen
            samples.x.append(geometry.patches(x, places))
            samples.goal.append(geometry.rows(goal - offset, places))
            samples.offset.append(
                offset.reshape(geometry.groups, 1, -1) if site.shortcut is None else geometry.rows(offset, places)
            )
        found = Regression(seen, left_out, site.limits, site.constant is not None).fit(layer.old)
        if found is not None:
            layer.write(found.weight, found.constant)
        return found

    def _refit_channels(self, site: Site, layer: _Layer) -> Fit | None:
        """Refit a layer of large patches: the dense network's input channels are fitted, not the outputs."""
        seen, left_out = Samples(), Samples()
        ends = []
        for index, (_, slim) in enumerate(self.states):
            ends.append(self._advance(site, layer, index))
            x, goal = slim.values[site.source], self.inputs.pop((index, site.number))
            rows = [layer.channels(each) for each in (x, goal)]
            places = self.images.places(site, None, rows[0], rows[1], index, rows[0].shape[-1])
            samples = left_out if self.images.left_out(index) else seen
            samples.x.append(rows[0][None] if places is None else rows[0][places][None])
            samples.goal.append(rows[1][None] if places is None else rows[1][places][None])
            samples.offset.append(rows[1].new_zeros(1, 1, 1))
        mixing = layer.mixing
        mixed = None if mixing is None else Regression(seen, left_out, None, site.constant is not None).fit(mixing)
        if mixed is None:
            return None
        before, stored = self._output_error(site, layer, ends), layer.stored()
        layer.write(*layer.folded(mixed.weight, mixed.constant))
        error = self._output_error(site, layer, ends)
        if error < before:
            return replace(mixed, error=error, before=before)
        layer.restore(stored)
        return None

    def _output_error(self, site: Site, layer: _Layer, ends: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Return the squared error of a layer's output on the images left out."""
        total = 0.0
        for index, (goal, offset) in enumerate(ends):
            if self.images.left_out(index):
                found = layer.scaled(self.slim.result(self.states[index][1], site.number)) + offset
                if site.limits is not None:
                    found, goal = found.clamp(*site.limits), goal.clamp(*site.limits)
                total += float((found - goal).double().square().sum())
        return total

    def _advance(self, site: Site, layer: _Layer, index: int) -> tuple[Tensor, Tensor]:
        """Run both networks up to a layer; returns the goal, and what is added to the layer's scaled product."""
        dense, slim = self.states[index]
        self.dense.advance(dense, site.end + 1, partial(self._catch, index))
        self.slim.advance(slim, site.number)
        goal = self.goals.pop((index, site.end))
        offset = along(layer.shift, goal, site.axis)
        return goal, offset if site.shortcut is None else offset + slim.values[site.shortcut]

    def _catch(self, index: int, number: int, state: State) -> None:
        """Keep the dense network's outputs that the slim one's are fitted to."""
        for site in self.ends.get(number, ()):
            value = state.values[self.dense.calls[number].outs[0]]
            kept = self.layers[site.number].kept_out
            self.goals[index, number] = (
                value.clone() if kept is None else value.index_select(site.axis, kept.to(value.device))
            )
        if (large := self.large.get(number)) is not None:
            self.inputs[index, number] = state.values[large.source].clone()


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
            self.dense = _dense_copy(space)
            self._recording = recording = _recorded(self.dense, self.images)
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
        layer = _Layer(self.space, site, tensors, tensors, {})
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
        small, refitted, left = self._applied(plan)
        return _judged(self.space, plan, small, self.sites, refitted, left, self.exact, self.images)

    def _applied(self, plan: ChannelPlan) -> tuple[nn.Module, dict[str, float], dict[str, str]]:
        small = self.space.apply(plan)
        dense, slim, kept = named_tensors(self.dense), named_tensors(small), self.space.indices(plan)
        refitted, left = {}, dict(self.left)
        for site in self.sites:
            layer = _Layer(self.space, site, dense, slim, kept.get(site.weight, {}))
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


def _judged(
    space: Space,
    plan: ChannelPlan,
    small: nn.Module,
    sites: Iterable[Site],
    refitted: Mapping[str, float],
    left: Mapping[str, str],
    exact: Sequence[Sequence[Tensor]],
    images: Images,
) -> Compensation:
    """Return the network whose outputs on the images left out are closest to the dense network's, and the report.

    It is the compensated one, the same with batch-norm statistics of its own, or the one that is only sliced.
    """
    widths = [space.widths(each.widths)[None] for each in (space.dense(), plan)]
    lost = [each.name for each in space.layers if each.in_channels(widths[1])[0] < each.in_channels(widths[0])[0]]
    error, error_cut = images.error(small, exact), images.error(cut := space.apply(plan), exact)
    statistics = "dense"
    own = own_statistics(small, [chunk for index, chunk in enumerate(images.chunks) if not images.left_out(index)])
    if own is not None and (found := images.error(own, exact)) < error:
        small, error, statistics = own, found, "own"
    if error > error_cut:
        reason = "the outputs on the images left out are closer to the dense network's without compensation"
        return Compensation(cut, {}, dict.fromkeys(lost, reason), error_cut, error_cut, len(images), "dense")
    names = {site.layer for site in sites}
    named = {
        name: left.get(name, NO_BETTER if name in names else COMPUTED) for name in lost if name not in refitted
    }
    return Compensation(small, refitted, named, error, error_cut, len(images), statistics)


def own_statistics(network: nn.Module, chunks: Sequence[tuple[Any, ...]]) -> nn.Module | None:
    """Return a copy of a network whose batch norms have the statistics of these inputs; None if it has none."""
    network = copy.deepcopy(network)
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [each for each in network.modules() if isinstance(each, kinds) and each.track_running_stats]
    before = [norm.momentum for norm in norms]
    with _evaluating(network), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # all chunks have equal weight
            norm.train()
        for chunk in chunks if norms else ():
            network(*chunk)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return network if norms else None


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Set eval mode, and restore each module's own afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    """Return a vector in the type of `like` that is broadcast along one of its axes."""
    shape = [-1 if each == axis % like.dim() else 1 for each in range(like.dim())]
    return vector.to(like.dtype).reshape(shape)


def difference(exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> float:
    """Return the squared error of outputs, as a share of the squares of the exact ones."""
    pairs = [(a, b) for x, y in zip(exact, other, strict=True) for a, b in zip(x, y, strict=True)]
    total = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return total / max(1e-300, sum(float(a.double().square().sum()) for a, _ in pairs))
