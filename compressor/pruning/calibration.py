"""Calibration images of a compensation, and what their outputs say about a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.models.computed import evaluated
from compressor.pruning.counts import Layer
from compressor.pruning.least_squares import COARSE, LARGEST, STRENGTHS
from compressor.pruning.moves import moved_back
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.replay import Recording, State
from compressor.pruning.sites import Geometry, Site, find_sites, shortcuts_first
from compressor.pruning.skeleton import copy_structure, named_tensors, walk
from compressor.pruning.slicer import Slicer, swap
from export.convert.trees import channels_last, outputs_of, rebuilt, tensors_in

CHUNK = 32
"""Images that run through the networks at once, at most."""
CHOOSE, JUDGE = 0.25, 0.125
"""Shares of the images that choose between fits, and that judge the network that comes out. Fits have the others."""
MEMORY = 4 * 2**30
"""Bytes of inputs and activations that are held at once, at most; of more images only the first of a random order are
used."""
GOAL_BYTES = 2**30
"""Bytes of the dense network's goals that are kept for the next plans, at most; else they are computed again."""
SAMPLE_BYTES = 256 * 2**20
"""Bytes of the inputs of these positions, at most."""


@dataclass(frozen=True)
class Effort:
    """How thoroughly a layer is fitted.

    Args:
        samples, samples_of_groups, samples_per_input: Output positions that a layer is fitted to, at least; of one with
            groups; and for each of its inputs.
        strengths: Ridge strengths that are tried.
        steps: Steps in which the activation after the layer is taken into account.
    """

    samples: int
    samples_of_groups: int
    samples_per_input: int
    strengths: tuple[float, ...]
    steps: int


THOROUGH = Effort(20_000, 4_000, 20, STRENGTHS, 6)
QUICK = Effort(6_000, 1_500, 8, COARSE, 2)


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

    def indices(self, plan: ChannelPlan) -> dict[str, dict[int, Tensor]]: ...

    def replaced(self, plan: ChannelPlan) -> dict[str, str]: ...


@dataclass(frozen=True)
class Images:
    """Chunks of calibration images of equal size, in random order.

    The chunks in `fit` are those that layers are fitted to; those in `choose` choose the strength of a fit and whether
    it is kept, after which the layer is fitted to both. Those in `judge` are seen by neither.
    """

    chunks: list[tuple[Any, ...]]
    fit: range
    choose: range
    judge: range
    seed: int
    effort: Effort = THOROUGH

    @classmethod
    def of(
        cls,
        space: Space,
        batches: Iterable[Any],
        seed: int,
        effort: Effort = THOROUGH,
    ) -> Images:
        """Collect inputs, within the memory that activations may take."""
        form = tuple(space.example_input)
        rows = [
            ((batch,) if isinstance(batch, Tensor) else tuple(batch))[: len(form)] for batch in batches
        ]
        leaves = [tensors_in(row) for row in rows]
        images = sum(len(row[0]) for row in leaves)
        if images < 3:
            raise CompressorError(
                f"Compensation needs at least three images, not {images}.",
                "Pass batches of inputs: for each layer one to fit, one to choose and one to judge; better hundreds.",
            )
        parameter = next(space.model.parameters())
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
        one = [each[:1].to(parameter.device) if isinstance(each, Tensor) else each for each in rows[0]]
        order = order[: max(3, most_images(dense_copy(space), one))]
        size = max(1, min(CHUNK, len(order) // 8))
        # a tensor without a row for each image belongs to all of them
        shared = [not one.dim() or len(one) != len(leaves[0][0]) for one in leaves[0]]
        whole = [
            column[0].to(parameter.device) if alone else torch.cat(column)[order].to(parameter.device)
            for column, alone in zip(zip(*leaves, strict=True), shared, strict=True)
        ]
        chunks = [
            rebuilt(
                rows[0],
                [
                    one if alone else one[start : start + size]
                    for one, alone in zip(whole, shared, strict=True)
                ],
            )
            for start in range(0, len(order) - size + 1, size)
        ]
        count = len(chunks)
        judge = count - max(1, round(count * JUDGE))
        choose = judge - max(1, round(count * CHOOSE))
        return cls(chunks, range(choose), range(choose, judge), range(judge, count), seed, effort)

    def __len__(self) -> int:
        return sum(len(tensors_in(chunk)[0]) for chunk in self.chunks)

    def run(self, network: nn.Module, which: range) -> list[list[Tensor]]:
        """Return a network's outputs for some of the chunks, in the memory format in which convolutions are fast."""
        return [outputs_of(network(*channels_last(self.chunks[index]))) for index in which]

    def outputs(self, network: nn.Module, which: range) -> list[list[Tensor]]:
        """As `run`, in eval mode and without gradients."""
        with evaluated(network), torch.no_grad():
            return self.run(network, which)

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
        effort = self.effort
        least = effort.samples if groups == 1 else effort.samples_of_groups
        wanted = max(least, effort.samples_per_input * width)
        wanted = min(wanted, SAMPLE_BYTES // (4 * groups * width))
        positions = len(y) if geometry is None else geometry.positions(y)
        alike = len(x) if geometry is not None and geometry.rank else 1
        each = math.ceil(wanted / (self.judge.start * alike))
        if each >= positions:
            return None
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + site.number * 1_009 + index)
        return torch.randperm(positions, generator=random)[:each].sort().values.to(x.device)


class Reference:
    """The dense network and the calibration images: what the compensations of all plans share.

    Args:
        space: The space; its network's present weights are used.
        batches, seed: As for `compensate`.
        effort: How thoroughly layers are fitted.

    Attributes:
        images: The images, with their roles.
        recording: The network's calls; each shortcut is computed before the last layer of its branch.
        order: Numbers in that order of the calls of `recording`.
        sites, left: Layers that can be refitted, and others, as `find_sites` returns them.
    """

    def __init__(self, space: Space, batches: Iterable[Any], *, seed: int = 0, effort: Effort = THOROUGH) -> None:
        self.space = space
        with torch.no_grad():
            self.images = Images.of(space, batches, seed, effort)
            self.network = dense_copy(space)
            self.tensors = named_tensors(self.network)
            self.recording = recorded(self.network, self.images)
            self.names = [call.name for call in self.recording.calls]
            self.order = shortcuts_first(self.recording)
            self.sites, self.left = find_sites(self.recording)

    @cached_property
    def choosing(self) -> list[list[Tensor]]:
        """Outputs for the images that choose."""
        return self.images.outputs(self.network, self.images.choose)

    @cached_property
    def judging(self) -> list[list[Tensor]]:
        """Outputs for the images that judge."""
        return self.images.outputs(self.network, self.images.judge)

    @cached_property
    def goals(self) -> dict[tuple[int, int], Tensor] | None:
        """Goal of each layer by chunk and number of the site, of all channels; None if they take too much memory."""
        chunks = range(self.images.judge.start)
        numbers = sum(math.prod(self.recording.calls[site.number].shapes[0]) for site in self.sites)
        if len(chunks) * numbers * next(self.network.parameters()).element_size() > GOAL_BYTES:
            return None
        found: dict[tuple[int, int], Tensor] = {}
        ends: dict[int, list[Site]] = {}
        for site in self.sites:
            ends.setdefault(site.end, []).append(site)

        def keep(index: int, number: int, state: State) -> None:
            for site in ends.get(number, ()):
                found[index, site.number] = self.goal(site, state, number)

        for index in chunks:
            self.recording.finish(self.recording.start(self.images.chunks[index]), partial(keep, index))
        return found

    def goal(self, site: Site, state: State, end: int) -> Tensor:
        """Return what a layer is fitted to: the result of the call `end`, which a replay has just run."""
        value = state.values[self.recording.calls[end].outs[0]]
        return moved_back(self.recording, site.path, value, self.recording.calls[site.number].shapes[0]).clone()


def most_images(network: nn.Module, one: Sequence[Any]) -> int:
    """Return the number of images whose inputs and activations `MEMORY` holds.

    Between two calls, both networks' values are held of each image; while a call runs, those of one chunk besides. A
    slim network has no more channels than the dense one, but may lack blocks: the dense one then runs ahead to the end
    of one.

    Args:
        network: The dense network.
        one: Its inputs for one image.
    """
    recording = Recording(network, one)
    shortcuts_first(recording)
    sites, _ = find_sites(recording)
    held, running = recording.elements()
    ahead = list(accumulate(reversed(held), max))[::-1]  # from each call on
    tensors, sizes = named_tensors(network), [math.prod(recording.calls[site.number].shapes[0]) for site in sites]
    large = {site.number for site in sites if site.geometry.matrix(tensors[site.weight]).shape[1] > LARGEST}
    most = reached = 0
    for place, site in enumerate(sites):
        reached = max(reached, site.end + 1)
        both = held[site.number] + ahead[reached]
        kept = sum(sizes[later] for later in range(place + 1, len(sites)) if sites[later].end < reached)
        if large:
            kept += sum(held[number] for number in large if site.number < number < reached)
            kept += 2 * sizes[place] if site.number in large else 0
        most = max(most, both + kept)
    size = next(network.parameters()).element_size()
    each, chunk = size * (held[0] + most), size * running
    return max(MEMORY // (each + math.ceil(chunk / 8)), (MEMORY - CHUNK * chunk) // each)


def recorded(network: nn.Module, images: Images) -> Recording:
    """Record a network on a chunk of images, after it has run on them once.

    What a network keeps for the shape of its input, such as the anchors of a detector, is then kept by all networks.

    Raises:
        CompressorError: It cannot be replayed.
    """
    with torch.no_grad():
        network(*images.chunks[0])
    recording = Recording(network, images.chunks[0])
    if not recording.repeats(images.chunks[0]):
        raise CompressorError(
            "The network cannot be compensated: replaying the calls of its forward pass gives other outputs.",
            "Does its forward compute outside of torch, or mix the images of a batch?",
        )
    return recording


def dense_copy(space: Space) -> nn.Module:
    """Return the dense network over the same memory, with the classes that slim networks have."""
    dense = copy_structure(space.model, lambda tensor: tensor.detach()).eval()
    by_path = dict(walk(dense))
    for path, name in space.slicer.swaps.items():
        swap(by_path[path], name)
    return dense
