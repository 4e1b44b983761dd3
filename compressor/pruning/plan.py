"""Channel plans: the kept units of each group, and the blocks that are removed whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.files import parse_json


@dataclass(frozen=True)
class ChannelPlan:
    """The kept units of every group, and the removed blocks; besides the weights, all later steps need only this.

    Args:
        keep: Name of each group -> kept units, ascending and distinct.
        removed: Names of the blocks that are removed whole; sorted.

    Example: `ChannelPlan({"conv1": (0, 2, 5)}).widths == {"conv1": 3}`.
    """

    keep: Mapping[str, tuple[int, ...]]
    removed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked = {}
        for name, units in self.keep.items():
            kept = tuple(int(unit) for unit in units)
            if not kept:
                raise CompressorError(
                    f"A plan keeps no channel of group '{name}'.", "Keep at least one channel of every group."
                )
            if kept[0] < 0 or any(a >= b for a, b in pairwise(kept)):
                raise CompressorError(
                    f"The kept channels of group '{name}' are not ascending, distinct and non-negative.", "Sort them."
                )
            checked[str(name)] = kept
        object.__setattr__(self, "keep", MappingProxyType(checked))
        object.__setattr__(self, "removed", tuple(sorted({str(name) for name in self.removed})))

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Number of kept units of each group."""
        return MappingProxyType({name: len(units) for name, units in self.keep.items()})

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the plan's JSON; equal for equal plans, on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelPlan):
            return False
        return dict(self.keep) == dict(other.keep) and self.removed == other.removed

    def __hash__(self) -> int:
        return hash(self.checksum)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ChannelPlan, (dict(self.keep), self.removed))

    def to_json(self) -> str:
        """Return the plan as JSON with sorted keys and without spaces."""
        content: dict[str, Any] = {"keep": {name: list(units) for name, units in self.keep.items()}}
        if self.removed:
            content["removed"] = list(self.removed)
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """Parse the output of `to_json`.

        Raises:
            CompressorError: The text is not JSON, or not a plan.
        """
        content = parse_json(text, "A channel plan", "Save it again with to_json().")
        keep = content.get("keep") if isinstance(content, dict) else None
        if not isinstance(keep, dict) or not all(
            isinstance(units, list) and all(type(unit) is int for unit in units) for units in keep.values()
        ):
            raise CompressorError(
                'A channel plan must look like {"keep": {"group": [0, 1, ...]}}.', "Save it again with to_json()."
            )
        removed = content.get("removed", [])
        if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
            raise CompressorError(
                'The removed blocks of a channel plan must be a list of names: {"keep": {...}, "removed": ["block"]}.',
                "Save it again with to_json().",
            )
        return cls({name: tuple(units) for name, units in keep.items()}, tuple(removed))
