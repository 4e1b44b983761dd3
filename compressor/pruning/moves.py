"""What only moves the elements of a layer's output on their way to a residual sum, or scales its channels.

In a ConvNeXt block these are a permutation and the layer scale, in a Swin block the views that join windows and the
roll. The sum and the other operand are arranged as the layer's output is, so that the layer can be fitted to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.pruning.replay import Call, Recording, Value, filled, values_in

MOVES = (
    *("permute", "transpose", "swapaxes", "movedim", "moveaxis", "view", "reshape", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "contiguous", "clone", "roll", "getitem"),
)
"""Operations that move elements."""


class Moves:
    """Follows the calls after layer `number` that move its output."""

    def __init__(self, recording: Recording, number: int) -> None:
        self.recording, self.path = recording, list[int]()
        self.gain: str | None = None
        call = recording.calls[number]
        self._start = call.shapes[0]
        self._axis = len(self._start) - 1 if call.name == "linear" else 1
        self._places: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """The number of the layer's output element at each place."""
        if self._places is None:
            self._places = torch.arange(math.prod(self._start)).reshape(self._start)
        return self._places

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output where it is now."""
        return tuple(self.places.shape) if self.path else self._start

    @property
    def whole(self) -> bool:
        """Whether every element is still there, once; padding that is cut off again leaves some out."""
        return not self.path or self.places.numel() == math.prod(self._start)

    def follow(self, number: int, value: int) -> bool:
        """Follow a call that reads `value`; returns whether it only moves elements or scales the layer's channels."""
        call = self.recording.calls[number]
        if call.name == "mul":
            if self.gain is not None or (gain := self._gain(call, value)) is None:
                return False
            self.gain = gain
        elif call.name in MOVES and [each.index for each in values_in([call.args, dict(call.kwargs)])] == [value]:
            self._places = _moved(call, self.places)
        else:
            return False
        self.path.append(number)
        return True

    def _gain(self, call: Call, value: int) -> str | None:
        """Return the name of the parameter that scales the channels; None if something else is multiplied."""
        others = [each for each in call.args if not (isinstance(each, Value) and each.index == value)]
        if len(others) != 1 or call.kwargs:
            return None
        other, shape = others[0], call.shapes[0]
        if isinstance(other, Tensor):
            shape = tuple(other.shape)
        elif isinstance(other, Value) and other.index in self.recording.maker:
            maker = self.recording.calls[self.recording.maker[other.index]]
            if maker.reads or maker.name not in MOVES:
                return None
            other, shape = maker.args[0], maker.shapes[0]
        channels = self._start[self._axis]
        if not isinstance(other, Tensor) or other.numel() != channels or call.shapes[0] != self.shape:
            return None
        channel = self.places // math.prod(self._start[self._axis + 1 :]) % channels
        same = torch.equal(torch.arange(channels).reshape(shape).expand(self.shape), channel)
        return self.recording.names.get(id(other)) if same else None


def moved_back(recording: Recording, path: Sequence[int], value: Tensor, shape: Sequence[int]) -> Tensor:
    """Arrange a value at the end of a path as the layer's output of this shape at its start.

    A shortcut may have fewer axes than the sum, or axes of one element: it is repeated along the others.
    """
    if not path:
        return value.expand(tuple(shape))
    places = torch.arange(math.prod(shape), device=value.device).reshape(tuple(shape))
    for number in path:
        if recording.calls[number].name != "mul":
            places = _moved(recording.calls[number], places)
    back = torch.empty(math.prod(shape), dtype=value.dtype, device=value.device)
    back[places.flatten()] = value.expand(places.shape).flatten()
    return back.reshape(tuple(shape))


def _moved(call: Call, places: Tensor) -> Tensor:
    given = [call.args, dict(call.kwargs)]
    index = values_in(given)[0].index
    args, kwargs = filled(given, {index: places})
    moved: Tensor = call.func(*args, **kwargs)
    return moved
