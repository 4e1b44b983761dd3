"""Records a forward pass as a list of calls of the torch API, and replays it call by call.

Two networks whose recordings run side by side show, at each call, what both compute from the same images, and the
weights of a layer may change just before it runs. A recording also shows which call reads which result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from compressor.pruning.registry import rule_of
from compressor.pruning.skeleton import named_tensors
from export.convert.trees import mapped, outputs_of, tensors_in


@dataclass(frozen=True)
class Value:
    """A result of a call, or an input of the network."""

    index: int


@dataclass(eq=False)
class Call:
    """One recorded call; its arguments hold `Value`s for earlier results, and parameters and buffers themselves."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    outs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    #: Values that no later call reads.
    last: list[int] = field(default_factory=list)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Return the argument at `index`, or by `name`, or `default`."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)


@dataclass
class State:
    """The values of a replay that later calls read, and the next call."""

    values: dict[int, Tensor]
    at: int = 0


class Recording:
    """The calls of one forward pass of `model` in eval mode on `inputs`.

    Args:
        model: A network in eval mode without control flow that depends on data.
        inputs: Positional arguments of its forward. Replays need the same shapes.
        watched: Paths of modules of which `spans` are wanted; each runs once.

    Attributes:
        spans: Path of a watched module -> numbers of its calls.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], watched: Iterable[str] = ()) -> None:
        self.calls: list[Call] = []
        self.spans: dict[str, range] = {}
        hooks = [hook for path in watched for hook in self._watch(model, path)]
        self.names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        self._model = model
        self._recorder = _Recorder(self)
        self._args = tuple(self._recorder.stored(each) for each in inputs)
        self._shapes = [[tuple(tensor.shape) for tensor in tensors_in([each])] for each in inputs]
        with torch.no_grad(), self._recorder:
            out = model(*inputs)
        for hook in hooks:
            hook.remove()
        results = outputs_of(out)
        self.results: tuple[int, ...] = tuple(self._recorder.known.get(each, -1) for each in results)
        self.first_outputs = [each.detach().clone() for each in results]
        self._recorder.known.clear()
        self.readers: dict[int, list[int]] = {}
        self.maker: dict[int, int] = {}
        self.order(range(len(self.calls)))

    def _watch(self, model: nn.Module, path: str) -> list[Any]:
        """Record where the calls of a module begin and end."""

        def begin(module: nn.Module, args: Any) -> None:
            self.spans[path] = range(len(self.calls), len(self.calls))

        def end(module: nn.Module, args: Any, out: Any) -> None:
            self.spans[path] = range(self.spans[path].start, len(self.calls))

        module = model.get_submodule(path)
        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def order(self, numbers: Sequence[int]) -> None:
        """Put the calls into another order."""
        self.calls = [self.calls[number] for number in numbers]
        self.readers.clear()
        self.maker.clear()
        for number, call in enumerate(self.calls):
            call.last.clear()
            for each in call.reads:
                self.readers.setdefault(each, []).append(number)
            for each in call.outs:
                self.maker.setdefault(each, number)
        self._mark_last()

    def hoisted(self, value: int, number: int) -> list[int] | None:
        """Return an order in which `value` is computed before call `number`; None if it depends on that call.

        Calls that change a tensor in place are not moved, nor are calls moved across a change of what they read.
        """
        needed: set[int] = set()
        wanted = [value]
        while wanted:
            maker = self.maker.get(wanted.pop(), -1)
            if maker == number:
                return None
            if maker > number and maker not in needed:
                needed.add(maker)
                wanted.extend(self.calls[maker].reads)
        read = {each for maker in needed for each in self.calls[maker].reads}
        end = max(needed, default=number)
        for between in range(number, end + 1):
            call = self.calls[between]
            changed = set(call.outs) & (set(call.reads) if between in needed else read)
            if changed or call.name == "setitem":
                return None
        rest = [each for each in range(number, len(self.calls)) if each not in needed]
        return [*range(number), *sorted(needed), *rest]

    def only_reader(self, value: int, after: int) -> int | None:
        """Return the call after `after` that reads `value`, if it is the only one or changes the value in place."""
        readers = [number for number in self.readers.get(value, ()) if number > after]
        if not readers or (value in self.results and value not in self.calls[readers[0]].outs):
            return None
        return readers[0] if len(readers) == 1 or value in self.calls[readers[0]].outs else None

    def _mark_last(self) -> None:
        seen = set(self.results)
        for call in reversed(self.calls):
            for each in (*call.reads, *call.outs):
                if each not in seen:
                    seen.add(each)
                    call.last.append(each)

    def elements(self) -> tuple[list[int], int]:
        """Return how many elements the values of a replay have before each call and at the end, and at most."""
        sizes: dict[int, int] = {}
        for stored, given in zip(self._args, self._shapes, strict=True):
            sizes |= {place.index: math.prod(shape) for place, shape in zip(values_in(stored), given, strict=True)}
        held = [sum(sizes.values())]
        most = held[0]
        for call in self.calls:
            sizes |= {index: math.prod(shape) for index, shape in zip(call.outs, call.shapes, strict=True)}
            most = max(most, sum(sizes.values()))
            for index in call.last:
                sizes.pop(index, None)
            held.append(sum(sizes.values()))
        return held, most

    def start(self, inputs: Sequence[Any]) -> State:
        """Begin a replay on other inputs of the same shapes."""
        values: dict[int, Tensor] = {}
        for stored, given in zip(self._args, inputs, strict=True):
            for place, tensor in zip(values_in(stored), tensors_in([given]), strict=True):
                values[place.index] = tensor
        return State(values)

    def advance(self, state: State, until: int, watch: Callable[[int, State], None] | None = None) -> None:
        """Run the calls before number `until`; `watch` is called with each number after that call has run."""
        values = state.values
        while state.at < until:
            call = self.calls[state.at]
            out = call.func(*filled(call.args, values), **filled(call.kwargs, values))
            for index, tensor in zip(call.outs, tensors_in([out]), strict=True):
                values[index] = tensor
            if watch is not None:
                watch(state.at, state)
            for index in call.last:
                values.pop(index, None)
            state.at += 1

    def result(self, state: State, number: int) -> Tensor:
        """Run the next call alone, without changing the state, and return its result."""
        assert state.at == number
        call = self.calls[number]
        found: Tensor = call.func(*filled(call.args, state.values), **filled(call.kwargs, state.values))
        return found

    def finish(self, state: State, watch: Callable[[int, State], None] | None = None) -> list[Tensor]:
        """Run the remaining calls, and return the network's output tensors."""
        self.advance(state, len(self.calls), watch)
        return [state.values[index] for index in self.results]

    def repeats(self, inputs: Sequence[Any]) -> bool:
        """Whether a replay computes what the network does, on the recorded `inputs` in another order of images."""
        if -1 in self.results:
            return False
        turned = mapped(lambda each: each.roll(1, 0) if each.dim() else each, list(inputs))
        found = self.finish(self.start(turned))
        return all(
            a.shape == b.shape
            and torch.allclose(a.float(), b.roll(1, 0).float(), rtol=1e-2, atol=1e-3 * float(b.abs().amax()))
            for a, b in zip(found, self.first_outputs, strict=True)
        )


class _Recorder(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.known: Any = WeakIdKeyDictionary()
        self._count = 0

    def stored(self, value: Any) -> Any:
        """Replace the tensors of a network's inputs by new values."""
        return _mapped(value, self._new)

    def _new(self, tensor: Tensor) -> Value:
        if tensor not in self.known:
            self.known[tensor] = self._count
            self._count += 1
        return Value(self.known[tensor])

    def _reference(self, tensor: Tensor) -> Any:
        index = self.known.get(tensor)
        return tensor if index is None else Value(index)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = rule_of(func)[0]
        stored_args, stored_kwargs = _mapped(args, self._reference), _mapped(kwargs, self._reference)
        out = func(*args, **kwargs)
        results = list(tensors_in([out]))
        if results or name == "setitem":
            reads = tuple(dict.fromkeys(each.index for each in values_in([stored_args, stored_kwargs])))
            outs = tuple(self._new(tensor).index for tensor in results)
            shapes = tuple(tuple(tensor.shape) for tensor in results)
            self.recording.calls.append(Call(name, func, stored_args, stored_kwargs, reads, outs, shapes))
        return out


def counterpart(call: Call, other: Call, value: int) -> int:
    """Return what the same call of another network reads where `call` reads `value`.

    Numbers of values differ: `contiguous` makes a copy of one network's tensor, and returns the other's as it is.
    """
    pairs = zip(*(values_in([each.args, dict(each.kwargs)]) for each in (call, other)), strict=True)
    found: int = next(theirs.index for ours, theirs in pairs if ours.index == value)
    return found


def _mapped(value: Any, tensor: Callable[[Tensor], Any]) -> Any:
    """Replace all tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, tensor) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: _mapped(item, tensor) for key, item in value.items()}
    return value


def values_in(value: Any) -> list[Value]:
    """Return the recorded values in the arguments of a call."""
    if isinstance(value, Value):
        return [value]
    if isinstance(value, (list, tuple)):
        return [each for item in value for each in values_in(item)]
    return [each for item in value.values() for each in values_in(item)] if isinstance(value, dict) else []


def filled(value: Any, values: Mapping[int, Tensor]) -> Any:
    """Put tensors in the place of recorded values."""
    if isinstance(value, Value):
        return values[value.index]
    if isinstance(value, (list, tuple)):
        items = [filled(item, values) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: filled(item, values) for key, item in value.items()}
    return value
