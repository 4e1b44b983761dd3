"""Traces one forward pass and labels every axis of every tensor with its channels.

`Tracer` is a torch function mode: it intercepts each call of the public torch API, runs it (on the meta device, where
nothing is computed), and applies the rule of that operation (`registry`) to the atoms of the axes. Unlike a graph from
autograd this preserves the exact index of every channel through concatenation, splitting, reshaping and shuffling, and
it sees the operations that fvcore counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.core.errors import CompressorError
from compressor.pruning.facts import (
    MEETS_FIXED,
    Atoms,
    Axes,
    Call,
    Counted,
    Event,
    Facts,
    Frame,
    Labels,
    Settings,
    Step,
    Tie,
    Visit,
)
from compressor.pruning.registry import is_own, rule_of, works_in_place
from compressor.pruning.shapes import shape_only
from export.convert.trees import tensors_in

_DATA_DEPENDENT = frozenset({"__bool__", "item", "tolist", "__int__", "__float__", "__index__", "nonzero", "numpy"})
_VIEWS = """
    reshape expand broadcast permute transpose turned movedim unsqueeze squeeze split select narrow getitem
"""
_VIEW_RULES = frozenset(_VIEWS.split())
_NEVER_COUNTS = frozenset({"training", "call_super_init", "dump_patches", "T_destination"})
"""Attributes of modules that are never channel counts; they stay plain numbers."""
_IN_PLACE_RULES = frozenset(("elementwise", "batch_norm", "prelu"))


class Tracer(TorchFunctionMode):
    """Follows one forward pass and collects its facts; rules call it.

    A rule reads the labels of the arguments (`axes`), states which channels meet (`merge`) or must stay (`fix`), and
    records the labels of each result (`mark`, with `active` of what it was computed from). Where the operation takes a
    number of channels from an attribute of a module, `tie` lets that shrink as well. A result that no rule marks has no
    channels.

    Args:
        tensors: Name -> parameter or buffer of the traced network (its own objects, by identity).
        settings: Decisions and exceptions from earlier passes.
        check: For the lockstep check of a pruned network: called instead of the rules, with the call, its results and
            the running module's path; raises if the results are wrong.
        quick: Whether the tensors are on the meta device, so that shapes of common operations are known without
            running them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        settings: Settings,
        check: Callable[[Call, list[Tensor], str], None] | None = None,
        quick: bool = False,
    ) -> None:
        super().__init__()
        self.atoms = Atoms()
        self.facts = Facts(self.atoms)
        self.settings = settings
        self._check = check
        self._quick = quick
        self._ties: dict[tuple[str, str, int | None], list[Tie]] = {}
        #: Set for a second pass that only determines which channels belong together.
        self.uncounted = False
        self._buffers: dict[int, int] = {}
        self._values: dict[int, int] = {}
        #: Tensors that hold numbers of channels -> these channels, and the operation that chose among them.
        self._numbers: dict[int, list[tuple[Labels, str]]] = {}
        #: Tensors that choose among channels -> the number of these channels.
        self._choices: dict[int, int] = {}
        self._marks: dict[int, tuple[Tensor, Axes, bool]] = {}
        self._names: dict[int, str] = {id(tensor): name for name, tensor in tensors.items()}
        self._keep = list(tensors.values())
        self.stack: list[Frame] = [Frame("", None)]
        #: Whether a rule of the user's runs.
        self._users_rule = False
        #: The innermost module whose forward pass ended with an error.
        self.failed: Frame | None = None

    # ---------------------------------------------------------------- used by rules
    def axes(self, tensor: Tensor) -> Axes:
        """Return the labels of each axis of `tensor`, one per channel; None for an axis whose size stays.

        Parameters get theirs on first use.
        """
        mark = self._marks.get(id(tensor))
        if mark is not None:
            return mark[1]
        name = self._names.get(id(tensor))
        if name is None:
            return (None,) * tensor.dim()
        axes = tuple(self.atoms.fresh(size) if size > 1 else None for size in tensor.shape)
        self._marks[id(tensor)] = (tensor, axes, False)
        self.facts.params[name] = axes
        return axes

    def name_of(self, tensor: Any) -> str | None:
        """Return the name of `tensor` if it is a parameter or buffer, else None."""
        return self._names.get(id(tensor))

    def active(self, tensor: Any) -> bool:
        """Whether `tensor` was computed from the network's input."""
        mark = self._marks.get(id(tensor))
        return mark is not None and mark[2]

    def mark(self, tensor: Tensor, axes: Iterable[Labels | None], active: bool) -> None:
        """Record the labels of a result, one entry for each axis.

        Args:
            tensor: The result.
            axes: Its labels; None for an axis whose size stays.
            active: Whether it was computed from the network's input.

        Raises:
            ValueError: The numbers of labels are not those of channels; the rule is reported with it.
        """
        axes = tuple(axes)
        if self._users_rule:
            _check_labels(tensor, axes)
        self._marks[id(tensor)] = (tensor, axes, active)

    def merge(self, a: Labels | None, b: Labels | None) -> Labels | None:
        """Tie two axes of the same size index by index: their channels are kept or removed together.

        Returns:
            The labels of the result's axis. None if one of the two axes has a fixed size; the other is then fixed too.

        Raises:
            ValueError: The axes differ in size; the rule is reported with it.
        """
        if a is None or b is None:
            self.fix(a if b is None else b, MEETS_FIXED)
            return None
        if self._users_rule and a.shape != b.shape:
            raise ValueError(f"merge needs two axes of one size, and got labels of {a.size} and {b.size} channels")
        self.atoms.unify(a, b)
        return a

    def fix(self, labels: Labels | None, reason: str) -> None:
        """Keep these channels.

        Args:
            labels: Labels of an axis; None has no effect.
            reason: A clause that follows "left dense:"; the running module is added.
        """
        if labels is not None:
            where = self.stack[-1].path
            self.atoms.fix(labels, f"{reason} (in {where})" if where else reason)

    def fix_all(self, call: Call, reason: str) -> None:
        """Keep all channels that a call uses."""
        for tensor in call.tensors:
            for labels in self.axes(tensor):
                self.fix(labels, reason)

    def choose(self, labels: Labels | None, results: Sequence[Tensor], operation: str) -> None:
        """Record that `results` choose among these channels (max, argmax): the last one holds the channels' numbers.

        The channels are kept if an operation reads the numbers, or the network returns them.
        """
        if labels is not None:
            self._numbers.setdefault(id(results[-1]), []).append((labels, operation))
            self._choices.update((id(tensor), labels.size) for tensor in results)

    def choices(self, tensor: Tensor) -> int:
        """Return the number of channels among which `tensor`, or all that it was computed from, chooses; else 0."""
        return self._choices.get(id(tensor), 0)

    def read(self, tensors: Sequence[Tensor], results: Iterable[Tensor] = ()) -> None:
        """Keep the channels whose numbers are among `tensors`, from which `results` are computed."""
        for tensor in tensors:
            for labels, operation in self._numbers.get(id(tensor), ()):
                self.fix(labels, f"the number of a channel is used ({operation})")
        found = [self.choices(tensor) for tensor in tensors]
        if found and all(found):
            self._choices.update((id(tensor), found[0]) for tensor in results)

    def fold(self, block: Labels, axis: int) -> Labels:
        """Tie all channels with the same index on one axis of `block`, so that this axis alone is pruned.

        Returns:
            One label for each index of the axis.
        """
        lines = np.moveaxis(block, axis, 0).reshape(block.shape[axis], -1)
        first = np.ascontiguousarray(lines[:, 0])
        if lines.shape[1] > 1:
            self.atoms.unify(np.repeat(first, lines.shape[1]), lines)
        return first

    def even(self, labels: Labels, parts: int) -> Labels:
        """Tie the channels of equal parts by position, so that all keep as many; returns one part's labels."""
        return self.fold(labels.reshape(parts, -1), 1)

    def producer(self, weight: Tensor, axis: int) -> None:
        """Record that `axis` of `weight` produces channels: importance reads it, and its module names the group."""
        name = self._names.get(id(weight)) or self._source(weight, axis)
        if name is not None:
            self.facts.outputs.setdefault((name, axis), name.rpartition(".")[0] or name)

    def _source(self, weight: Tensor, axis: int) -> str | None:
        """Return the parameter from which a weight was computed.

        It is one of the running module (weight standardisation), else one of its submodules with the same channels
        (branches that are fused in forward).
        """
        path = self.stack[-1].path
        inside = [name for name in self.facts.params if name.rpartition(".")[0] == path]
        if inside:
            return f"{path}.weight" if f"{path}.weight" in inside else inside[0]
        labels = self.axes(weight)[axis]
        if labels is None:
            return None
        for name, own in self.facts.params.items():
            part = (not path or name.startswith(f"{path}.")) and len(own) == weight.dim()
            if part and (known := own[axis]) is not None and np.array_equal(known, labels):
                return name
        return None

    def count(self, operation: str, constant: int, *sizes: int | Labels, rounded: bool = False) -> None:
        """Add `constant * product(sizes)` to the multiply-adds outside of layers; labels stand for kept channels."""
        if not self.uncounted:
            self.facts.terms.append(Counted(operation, *factored(constant, sizes), rounded))

    def sizes(self, tensor: Tensor) -> list[int | Labels]:
        """Return the axes of `tensor` as factors for `count`."""
        return [size if axis is None else axis for size, axis in zip(tensor.shape, self.axes(tensor), strict=True)]

    def decide(self, call: Call, default: str, labels: Labels) -> str:
        """Decide how a split of channels is pruned; recorded so that a poor choice can be reversed."""
        chosen = self.settings.decisions.get(call.key, default)
        entry = self.facts.decisions.setdefault(call.key, (chosen, []))
        entry[1].append(labels)
        return chosen

    def tie(self, size: Any, labels: Labels, block: int = 1, others: Iterable[Labels | None] = ()) -> bool:
        """Tie the attribute from which `size` was read to the number of these channels (in blocks of `block`).

        If the size was computed from an attribute (such as half of it), the attribute is tied to the axis among
        `labels` and `others` whose channel count equals its value. Returns whether anything was tied.
        """
        if not isinstance(size, Attribute):
            return False
        tied = False
        for path, attribute, index, value in size.origins:
            if not size.derived:
                self._tie(Tie(path, attribute, index, labels, block))
                tied = True
                continue
            for axis in (labels, *others):
                if axis is not None and axis.size == value:
                    self._tie(Tie(path, attribute, index, axis))
                    tied = True
                    break
        return tied

    def tie_attribute(self, attribute: str, labels: Labels, index: int | None = None, block: int = 1) -> None:
        """Tie the running module's `attribute` to the number of these channels (in blocks of `block`)."""
        self._tie(Tie(self.stack[-1].path, attribute, index, labels, block))

    def _tie(self, tie: Tie) -> None:
        for other in self._ties.setdefault((tie.path, tie.attribute, tie.index), []):
            if other.block == tie.block and other.labels.size == tie.labels.size:
                # One attribute is the size of both, so that both must shrink equally.
                self.atoms.unify(other.labels, tie.labels)
        self._ties[tie.path, tie.attribute, tie.index].append(tie)
        self.facts.ties.append(tie)

    # ---------------------------------------------------------------- the mode
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        name, rule = rule_of(func)
        if rule is None:
            if name in _DATA_DEPENDENT and args and self.active(args[0]):
                raise _data_dependent(name, self.stack[-1])
            return func(*args, **kwargs)
        frame = self.stack[-1]
        key = (frame.pattern, frame.calls)
        frame.calls += 1
        given = [*args, *kwargs.values()]
        reads = self.values(tensors_in(given)) if self.follows else ()
        before = (len(self.facts.layers), len(self.facts.terms))
        out = shape_only(name, works_in_place(func), args, kwargs) if self._quick else None
        if out is None:
            out = func(*args, **kwargs)
        if self._choices:
            self.read(tensors_in(given), tensors_in(out))
        if name == "setitem":
            self._written(args)
            if self.follows:
                self._event(name, frame.path, given, reads, [args[0]], before, returns=False)
        results = tensors_in(out)
        if not results:
            return out
        call = Call(name, args, kwargs, out, key)
        if self._check is not None:
            self._check(call, results, frame.path)
            return out
        inputs = call.tensors
        live = any(self.active(tensor) for tensor in inputs)
        if is_own(rule):
            rule(self, call)
        else:
            self._call_users_rule(rule, call, results)
        for tensor in results:
            if id(tensor) not in self._marks or not self._marks[id(tensor)][2]:
                self.mark(tensor, self.axes(tensor), live)
        labelled = [axis for tensor in [*inputs, *results] for axis in self.axes(tensor) if axis is not None]
        if self.uncounted:
            return out
        self.record_traffic(rule.__name__ if is_own(rule) else "", inputs, results)
        self._event(name, frame.path, given, reads, results, before)
        if key in self.settings.frozen:
            for axis in labelled:
                self.fix(axis, self.settings.frozen[key])
        self.facts.steps.append(
            Step(name, key, frame.path, [(tuple(t.shape), self.axes(t)) for t in results], labelled)
        )
        return out

    def _call_users_rule(self, rule: Callable[[Any, Call], None], call: Call, results: Iterable[Tensor]) -> None:
        self._users_rule = True
        try:
            rule(self, call)
        except CompressorError:
            raise
        except Exception as error:  # user code may raise anything
            raise RuleFailed(rule, call.name, error) from error
        finally:
            self._users_rule = False
        if not any(id(tensor) in self._marks for tensor in results):
            self.fix_all(call, f"the operation {call.name!r}: its rule did not mark the result")

    def record_traffic(self, rule: str, inputs: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Add a step to `facts.traffic`; tensors that do not depend on the network's input are ignored.

        Args:
            rule: Name of the toolkit's rule, which says whether results are views or written in place.
        """
        reads = [self._buffer(tensor) for tensor in inputs if self.active(tensor)]
        writes = []
        for tensor in filter(self.active, results):
            if rule in _VIEW_RULES and reads:
                self._buffers.setdefault(id(tensor), reads[0])
            writes.append(self._buffer(tensor))
        self.facts.traffic.steps.append((reads, writes, rule in _IN_PLACE_RULES))

    def _buffer(self, tensor: Tensor) -> int:
        # Every marked tensor is kept alive, so that ids are not reused.
        if id(tensor) not in self._buffers:
            self._buffers[id(tensor)] = len(self.facts.traffic.sizes)
            self.facts.traffic.sizes.append(self.sizes(tensor))
        return self._buffers[id(tensor)]

    # ---------------------------------------------------------------- how values run
    @property
    def follows(self) -> bool:
        """Whether events and visits are recorded: in the pass that counts."""
        return self._check is None and not self.uncounted

    def values(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """Return the present values of those tensors that are results or inputs of the network, without repetition."""
        return tuple(dict.fromkeys(self._values[id(each)] for each in tensors if id(each) in self._values))

    def new_value(self, tensor: Tensor) -> int:
        """Give a tensor a new value: it was computed, or changed in place."""
        flow = self.facts.flow
        value = self._values[id(tensor)] = len(flow.shapes)
        flow.shapes.append(tuple(tensor.shape))
        if self.active(tensor):
            flow.active.add(value)
        return value

    def _event(
        self,
        name: str,
        path: str,
        given: list[Any],
        reads: tuple[int, ...],
        results: list[Tensor],
        before: tuple[int, int],
        returns: bool = True,
    ) -> None:
        """Record a call; `before` are the numbers of layers and terms before it."""
        facts, inputs = self.facts, tensors_in(given)
        writes = [self.new_value(tensor) for tensor in results]
        changed = {id(tensor) for tensor in results} & {id(tensor) for tensor in inputs}
        for buffer in {self._buffers[each] for each in changed if each in self._buffers}:
            # Views of a tensor that is changed in place change with it.
            views = [each for each, own in self._buffers.items() if own == buffer and each not in changed]
            writes += [self.new_value(self._marks[each][0]) for each in views]
        facts.flow.events.append(
            Event(
                name,
                path,
                reads,
                tuple(writes),
                tuple(named for tensor in inputs if (named := self.name_of(tensor)) is not None),
                len(facts.steps) if returns else -1,
                range(before[0], len(facts.layers)),
                range(before[1], len(facts.terms)),
                len(facts.traffic.steps) - 1 if returns else -1,
                all(each in (None, False, True, "none") for each in given if not tensors_in([each])),
                bool(changed),
            )
        )

    def _written(self, args: tuple[Any, ...]) -> None:
        """Keep the size of all axes involved in writing values into a part of a tensor."""
        for tensor in tensors_in(args):
            for axis in self.axes(tensor):
                self.fix(axis, "values are written into a part of a tensor")
        if self.active(args[2]):
            self.mark(args[0], self.axes(args[0]), True)

    def watch(self, paths: Iterable[tuple[str, nn.Module]]) -> None:
        """Track the running module: wraps `forward` of the modules of a skeleton for tracing."""
        for path, module in paths:
            if self._check is None:
                _remember(path, module)
            module.__dict__["forward"] = _Watched(self, path, module, type(module).forward)


class RuleFailed(Exception):
    """A rule of the user's raised an exception.

    Args:
        rule: The rule.
        operation: Name of the operation that was called.
        error: What it raised.
    """

    def __init__(self, rule: Callable[..., Any], operation: str, error: Exception) -> None:
        line, trace = rule.__code__.co_firstlineno if hasattr(rule, "__code__") else 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals.get("__name__") == rule.__module__:
                line = trace.tb_lineno
            trace = trace.tb_next
        super().__init__(
            f"The rule of {operation!r} ({rule.__module__}, line {line}) raised {type(error).__name__}: {error}"
        )


def _check_labels(tensor: Tensor, axes: Axes) -> None:
    if len(axes) != tensor.dim():
        raise ValueError(
            f"mark needs an entry for each of the result's {tensor.dim()} axes {tuple(tensor.shape)}, and "
            f"got {len(axes)}"
        )
    for axis, (labels, size) in enumerate(zip(axes, tensor.shape, strict=True)):
        if labels is not None and labels.shape != (size,):
            raise ValueError(
                f"mark needs a label for each of the {size} channels of the result's axis {axis}, and got "
                f"{' x '.join(map(str, labels.shape))}"
            )


def factored(constant: int, sizes: Iterable[int | Labels]) -> tuple[int, list[Labels]]:
    """Split a product of sizes into its constant and the axes with labels."""
    labels = []
    for size in sizes:
        if isinstance(size, (int, np.integer)):
            constant *= int(size)
        else:
            labels.append(size)
    return constant, labels


class _Watched:
    """`forward` of one module, which notifies the tracer of its start and end."""

    def __init__(self, tracer: Tracer, path: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.tracer, self.path, self.module, self.forward = tracer, path, module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = Frame(self.path, self.module, inputs=args)
        self.tracer.stack.append(frame)
        visit = self._begin(args, kwargs) if self.tracer.follows else None
        try:
            out = self.forward(self.module, *args, **kwargs)
            if visit is not None:
                self._end(visit, out)
            return out
        except BaseException:
            self.tracer.failed = self.tracer.failed or frame
            raise
        finally:
            self.tracer.stack.pop()

    def _begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Visit:
        flow = self.tracer.facts.flow
        given = tensors_in([*args, *kwargs.values()])
        single = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        flow.visits.append(Visit(self.path, self.tracer.values(given), len(flow.events), single))
        return flow.visits[-1]

    def _end(self, visit: Visit, out: Any) -> None:
        flow = self.tracer.facts.flow
        visit.end, visit.last = len(flow.events), len(flow.visits)
        visit.writes = self.tracer.values(tensors_in([out]))
        if isinstance(out, Tensor):
            visit.outputs = 0
        elif type(out) is tuple:
            visit.outputs = len(out)


def _data_dependent(name: str, frame: Frame) -> CompressorError:
    """Return the error for a forward pass with data-dependent control flow."""
    where = f"module '{frame.path}' ({frame.kind})" if frame.path else f"the network's own forward ({frame.kind})"
    return CompressorError(
        f"The network's control flow depends on its data: {where} reads a tensor's value ('{name}') while it "
        "runs, so that one pass does not show the complete structure.",
        "Replace the branch by tensor operations (torch.where), or prune the part of the network around it.",
    )


# ---------------------------------------------------------------- attributes of modules
class Attribute(int):
    """An integer that was read from an attribute of a module, and knows which; products and quotients know it too.

    Code such as `x.reshape(b, n, self.num_heads, self.head_dim)` stores channel counts in attributes. In the traced
    network every integer attribute is an `Attribute`, so that a call that receives it identifies the attribute that
    must follow the pruned width.

    Args:
        value: The number.
        origins: (path of the module, attribute, index in it or None, value of the attribute).
        derived: Whether it is the result of arithmetic.
    """

    origins: tuple[tuple[str, str, int | None, int], ...]
    derived: bool

    def __new__(
        cls, value: int, origins: tuple[tuple[str, str, int | None, int], ...], derived: bool = False
    ) -> Attribute:
        number = super().__new__(cls, value)
        number.origins = origins
        number.derived = derived
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (int(self),))


def _derived(operation: Callable[[int, Any], Any]) -> Callable[[Attribute, Any], Any]:
    """Return an operation of `int` whose result knows the attributes of both operands."""

    def apply(self: Attribute, other: Any) -> Any:
        value = operation(self, other)
        if type(value) is not int:
            return value
        more = other.origins if isinstance(other, Attribute) else ()
        return Attribute(value, self.origins + more, derived=True)

    return apply


for _name in ("__mul__", "__rmul__", "__floordiv__", "__add__", "__radd__", "__sub__"):
    setattr(Attribute, _name, _derived(getattr(int, _name)))


def _remember(path: str, module: nn.Module) -> None:
    """Convert the integer attributes of a module, and its lists and tuples of integers, to `Attribute`s."""
    held = module.__dict__
    for name, value in list(held.items()):
        if name.startswith("_") or name in _NEVER_COUNTS:
            continue
        if type(value) is int and value > 0:
            held[name] = Attribute(value, ((path, name, None, value),))
        elif type(value) in (list, tuple) and value and all(type(item) is int for item in value):
            held[name] = type(value)(
                Attribute(item, ((path, name, index, item),)) if item > 0 else item for index, item in enumerate(value)
            )
