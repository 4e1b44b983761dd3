"""Records the activations that a forward pass writes and reads in each step, for `liveness`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from compressor.pruning.atoms import Labels

VIEWS = """
    reshape expand broadcast permute transpose turned movedim unsqueeze squeeze split unbind select narrow getitem
"""
_VIEWS = frozenset(VIEWS.split())
_IN_PLACE = frozenset(("elementwise", "batch_norm", "prelu"))



class Marks(Protocol):
    """Protocol of the `Tracer`'s information about tensors."""

    def active(self, tensor: Tensor) -> bool:
        """Whether the tensor was computed from the network's input."""

    def sizes(self, tensor: Tensor) -> list[int | Labels]:
        """Return the tensor's axes, as numbers or as labels of their channels."""


@dataclass
class Traffic:
    """The activations that a forward pass writes and reads in each step.

    Attributes:
        sizes: Axes of each buffer, as constants or labels.
        steps: Buffers read, buffers written, and whether the step is elementwise.
    """

    sizes: list[list[int | Labels]] = field(default_factory=list)
    steps: list[tuple[list[int], list[int], bool]] = field(default_factory=list)
    _of: dict[int, int] = field(default_factory=dict)

    def record(self, marks: Marks, rule: str, inputs: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Add a step by the name of its rule; tensors that do not depend on the network's input are ignored."""
        reads = [self._piece(marks, tensor) for tensor in inputs if marks.active(tensor)]
        writes = []
        for tensor in results:
            if marks.active(tensor):
                if rule in _VIEWS and reads:
                    self._of.setdefault(id(tensor), reads[0])
                writes.append(self._piece(marks, tensor))
        self.steps.append((reads, writes, rule in _IN_PLACE))

    def _piece(self, marks: Marks, tensor: Tensor) -> int:
        # The tracer keeps every marked tensor alive, so that ids are not reused.
        if id(tensor) not in self._of:
            self._of[id(tensor)] = len(self.sizes)
            self.sizes.append(marks.sizes(tensor))
        return self._of[id(tensor)]
