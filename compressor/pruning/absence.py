"""What a network without some blocks runs of the dense one's calls, and what its layers are then fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compressor.pruning.calibration import Reference
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.removal import ACTIVATIONS, IDENTITY, REPEATABLE
from compressor.pruning.replay import Call, Recording, Value
from compressor.pruning.sites import Site

CUTS = (*REPEATABLE, "hardtanh")
"""Activations that change nothing when they are applied again, and whose limits a fit takes into account."""


@dataclass
class Absence:
    """The calls of the dense network that a slim one lacks.

    A layer whose output ends in the input of a removed block is fitted to the block's output instead, which is what
    all later layers read in the dense network.

    Args:
        replaced: Modules of the removed blocks, as `space.replaced` returns them.
        names: Names of the calls that the slim network runs, in the order of its forward pass.
        order: Numbers in that order of its calls in the order of the reference's.
        places: Number of a call in the reference -> its number in the slim network.
        ends: End of a site -> the call that ends the removed blocks after it, whose result is its goal.
    """

    replaced: Mapping[str, str]
    names: list[str]
    order: list[int]
    places: dict[int, int]
    ends: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, reference: Reference, plan: ChannelPlan) -> Absence:
        """Find the calls of the plan's removed blocks."""
        replaced = reference.space.replaced(plan) if plan.removed else {}
        gone, additions = _gone(reference, replaced) if replaced else (set[int](), [])
        kept = [number for number in range(len(reference.names)) if number not in gone]
        rank = {number: place for place, number in enumerate(kept)}
        stays = [place for place, number in enumerate(reference.order) if number in rank]
        found = cls(
            replaced,
            [reference.names[number] for number in kept],
            [rank[reference.order[place]] for place in stays],
            {place: index for index, place in enumerate(stays)},
        )
        at = {number: place for place, number in enumerate(reference.order)}
        found._follow(reference, [at[number] for number in additions])
        return found

    def _follow(self, reference: Reference, additions: Sequence[int]) -> None:
        """Find the sites before removed blocks; the last block of several in a row comes first."""
        recording = reference.recording
        after: dict[int, int] = {}  # a call -> the addition of the removed blocks that begin with its result
        for number in sorted(additions, reverse=True):
            last = after.get(_last(recording, number), number)
            for value in recording.calls[number].reads:
                after[_written(recording, value, number)] = last
        for site in reference.sites:
            if site.end in self.places and (call := _last(recording, site.end)) in after:
                self.ends[site.end] = after[call]

    def same_calls(self, slim: Recording) -> bool:
        """Whether a slim network runs the dense one's calls that are left, so that its replay is right too."""
        return [call.name for call in slim.calls] == self.names

    def end(self, site: Site) -> int:
        """Return the number of the call whose result in the dense network is fitted."""
        return self.ends.get(site.end, site.end)

    def touches(self, site: Site) -> bool:
        """Whether a layer is fitted to something else, or runs after the first removed call."""
        return site.end in self.ends or self.places[site.number] < site.number


def _last(recording: Recording, number: int) -> int:
    """Return the activation that cuts a call's result, if nothing else reads the result; else the call itself.

    Behind another activation a block's output is no goal of the layer before it: applied to the goal, the activation
    changes it.
    """
    following = recording.only_reader(recording.calls[number].outs[0], number)
    return number if following is None or recording.calls[following].name not in CUTS else following


def _written(recording: Recording, value: int, before: int) -> int:
    """Return the last call before number `before` that makes a value or changes it in place; -1 for an input."""
    return next((each for each in reversed(range(before)) if value in recording.calls[each].outs), -1)


def _gone(reference: Reference, replaced: Mapping[str, str]) -> tuple[set[int], list[int]]:
    """Return the numbers, in the order of the forward pass, of the calls that go, and of the additions among them."""
    with torch.no_grad():
        recording = Recording(reference.network, reference.images.chunks[0], watched=replaced)
    gone: set[int] = set()
    made: set[int] = set()  # values of branches that code which stays adds
    additions: list[int] = []
    for path, word in replaced.items():
        span = recording.spans[path]
        if word in ACTIVATIONS:
            span = range(span.start, span.stop - 1)
        gone.update(span)
        if word.startswith("nothing"):
            made.update(value for number in span for value in recording.calls[number].outs)
        else:
            additions.append(span.stop - 1 if word != IDENTITY else _last_addition(recording, span))
    for number, call in enumerate(recording.calls):
        if number not in gone and call.name == "add" and _absent(call, made):
            gone.add(number)
            additions.append(number)
    return gone, additions


def _last_addition(recording: Recording, span: range) -> int:
    """Return the addition at the end of a block, which an activation may follow that goes as well."""
    return next(number for number in reversed(span) if recording.calls[number].name == "add")


def _absent(call: Call, made: set[int]) -> bool:
    return any(isinstance(each, Value) and each.index in made for each in call.args)
