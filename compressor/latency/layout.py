"""The part of a pruning space that a table needs, as plain data inside a remote bundle.

The results of a device may be turned into a table long after the bundle was written, and on another machine. The bundle
therefore contains the needed facts about the network: no model has to be built, and no model code has to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.latency.operators import network_signature
from compressor.pruning.counts import Affine, Layer, Product, positions_of
from compressor.pruning.groups import Group

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

Count = Annotated[int, Field(ge=0, le=1 << 24)]
Pair = Annotated[tuple[Count, ...], Field(max_length=3)]
Name = Annotated[str, Field(max_length=400)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AffineFields(_Part):
    """A channel count: constant + sum of (group, channels per unit of its width)."""

    constant: Count
    terms: tuple[tuple[Count, Count], ...] = ()


class LayerFields(_Part):
    """A weight-bearing operator, as in `PruningSpace.layers`."""

    name: Name
    kind: Name
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: Count
    in_hw: tuple[Count, Count]
    out_hw: tuple[Count, Count]
    images: Annotated[int, Field(ge=1, le=1 << 24)] = 1
    in_channels: AffineFields
    out_channels: AffineFields
    reads: AffineFields


class GroupFields(_Part):
    """A group, as in `PruningSpace.groups`."""

    name: Name
    width: Count
    granularity: Annotated[int, Field(ge=1, le=1 << 24)]


class LayoutFields(_Part):
    """A network's layers and groups."""

    layers: Annotated[tuple[LayerFields, ...], Field(min_length=1, max_length=5000)]
    groups: Annotated[tuple[GroupFields, ...], Field(max_length=5000)]

    @model_validator(mode="after")
    def _known_groups(self) -> LayoutFields:
        for layer in self.layers:
            for group, _ in (*layer.in_channels.terms, *layer.out_channels.terms, *layer.reads.terms):
                if group >= len(self.groups):
                    raise ValueError(f"layer {layer.name} depends on group {group} of {len(self.groups)}")
        return self


@dataclass(frozen=True)
class Layout:
    """The part of a `PruningSpace` from which a table is built; functions that read only this accept either.

    Its networks have all blocks.
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    depth: ClassVar[bool] = False


def layout_fields(space: PruningSpace) -> LayoutFields:
    """Convert a space to plain data."""

    def affine(count: Affine) -> AffineFields:
        return AffineFields(
            constant=int(count.constant), terms=tuple((int(g), int(c)) for g, c in count.terms)
        )

    return LayoutFields(
        layers=tuple(
            LayerFields(
                name=layer.name, kind=layer.kind, kernel=_numbers(layer.kernel), stride=_numbers(layer.stride),
                padding=_numbers(layer.padding), dilation=_numbers(layer.dilation), groups=int(layer.groups),
                in_hw=layer.in_hw, out_hw=layer.out_hw, images=layer.images,
                in_channels=affine(layer.in_channels), out_channels=affine(layer.out_channels),
                reads=affine(layer.reads),
            )
            for layer in space.layers
        ),
        groups=tuple(
            GroupFields(name=group.name, width=group.width, granularity=group.granularity) for group in space.groups
        ),
    )  # fmt: skip


def layout_of(fields: LayoutFields) -> Layout:
    """Convert plain data to layers and groups."""
    return Layout(
        layers=tuple(
            Layer(
                layer.name, layer.kind, "", layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups,
                layer.in_hw, layer.out_hw, layer.images,
                Affine(layer.in_channels.constant, layer.in_channels.terms),
                Affine(layer.out_channels.constant, layer.out_channels.terms),
                Affine(layer.reads.constant, layer.reads.terms),
                Product(layer.images * positions_of(layer.kind, layer.in_hw, layer.out_hw)),
            )
            for layer in fields.layers
        ),
        groups=tuple(
            Group(group.name, index, group.width, 1, group.granularity, 1, False, ())
            for index, group in enumerate(fields.groups)
        ),
    )  # fmt: skip


def signature(layout: Layout | PruningSpace) -> str:
    """Return the `network_signature` of a layout or a space."""
    return network_signature(as_space(layout))


def as_space(layout: Layout | PruningSpace) -> PruningSpace:
    """Cast a layout to a space, for functions that read only its layers and groups."""
    given: Any = layout
    return given  # type: ignore[no-any-return]


def _numbers(values: int | Sequence[int]) -> tuple[int, ...]:
    return (int(values),) if isinstance(values, int) else tuple(int(value) for value in values)
