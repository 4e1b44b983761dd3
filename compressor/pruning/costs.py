"""The costs of a traced network, with all of its blocks or as functions of which are present."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compressor.pruning.blocks import Block, Branch
from compressor.pruning.counts import (
    WHOLE,
    Activations,
    AffineOf,
    Layer,
    MultiplyAdds,
    Presence,
    parameters_of,
)
from compressor.pruning.facts import Facts
from compressor.pruning.removal import inside
from compressor.pruning.slicer import Slicer


class Costs:
    """Multiply-adds, parameters and activations of candidates.

    Args:
        model, facts, affine: The dense network, and the result of its trace.
        layers: Its layers.
        columns: Columns of a candidate's row: its groups, and with `presence` its blocks.
        presence: What belongs to which block.
    """

    def __init__(
        self,
        model: nn.Module,
        facts: Facts,
        affine: AffineOf,
        layers: Sequence[Layer],
        columns: int,
        presence: Presence = WHOLE,
    ) -> None:
        self.macs = MultiplyAdds(facts, affine, layers, columns, presence)
        self.params = parameters_of(model, facts, affine, columns, presence)
        self.activations = Activations(facts.traffic, affine, presence)


def blocks_of(branches: Sequence[Branch], facts: Facts, slicer: Slicer) -> tuple[Block, ...]:
    """Return blocks with the groups and layers that are theirs alone."""
    found = []
    for index, branch in enumerate(branches):
        layers = sorted(layer for each in branch.events for layer in facts.flow.events[each].layers)
        own: set[int] = set()
        others: set[int] = set()
        for name, axes in slicer.axes.items():
            groups = {group for _, layout in axes for group in slicer.layouts[layout].groups}
            if inside(name, branch.replaced):
                own |= groups
            else:
                others |= groups
        found.append(Block(branch.name, index, tuple(sorted(own - others)), tuple(layers), branch.replaced))
    return tuple(found)


def presence_of(
    model: nn.Module, branches: Sequence[Branch], blocks: Sequence[Block], facts: Facts, groups: int
) -> Presence:
    """Return what belongs to which block."""
    layers: dict[int, int] = {}
    terms: dict[int, int] = {}
    steps: dict[int, int] = {}
    for block, branch in zip(blocks, branches, strict=True):
        for each in branch.events:
            event = facts.flow.events[each]
            layers.update(dict.fromkeys(event.layers, block.index))
            terms.update(dict.fromkeys(event.terms, block.index))
            if event.traffic >= 0:
                steps[event.traffic] = block.index
    named = {
        name: block.index for name, _ in model.named_parameters() for block in blocks if inside(name, block.replaced)
    }
    return Presence(groups, layers, terms, steps, named)
