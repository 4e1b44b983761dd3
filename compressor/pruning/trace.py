"""Traces one forward pass and labels every axis of every tensor with its channels.

`Tracer` is a torch function mode: it intercepts each call of the public torch API, runs it (on the meta device, where
nothing is computed), and applies the rule of that operation (`registry`) to the atoms of the axes. Unlike a graph from
autograd this preserves the exact index of every channel through concatenation, splitting, reshaping and shuffling, and
it sees the operations that fvcore counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.core.errors import CompressorError
from compressor.pruning.atoms import Atoms, Axes, Labels
from compressor.pruning.facts import MEETS_FIXED, Call, Counted, Facts, Frame, Settings, Step, Tie, tensors_in
from compressor.pruning.provenance import Attribute, remember
from compressor.pruning.quick import shape_only
from compressor.pruning.registry import is_own, rule_of, works_in_place

_DATA_DEPENDENT = frozenset(
    {"__bool__", "item", "tolist", "__int__", "__float__", "__index__", "nonzero", "numpy"}
)


class Tracer(TorchFunctionMode):
    """Follows one forward pass, and is what a rule says its facts to.

    A rule reads the labels of the arguments (`axes`), says which channels meet (`merge`) or must stay (`fix`), and
    records the labels of each result (`mark`, with `active` of what it was computed from). Where the operation takes a
    number of channels from an attribute of a module, `tie` lets that shrink as well. What is not marked carries no
    channels.

    Args:
        tensors: Name -> parameter or buffer of the traced network (its own objects, by identity).
        settings: Decisions and exceptions from earlier passes.
        check: For the lockstep check of a pruned network: called instead of the rules, with the number of each step,
            the call, its results and the running module's path; raises if the results are wrong.
        quick: Whether the tensors are on the meta device, so that shapes of common operations are known without
            running them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        settings: Settings,
        check: Callable[[int, Call, list[Tensor], str], None] | None = None,
        quick: bool = False,
    ) -> None:
        super().__init__()
        self.atoms = Atoms()
        self.facts = Facts(self.atoms)
        self.settings = settings
        self._check = check
        self._quick = quick
        self._steps = 0
        self._ties: dict[tuple[str, str, int | None], list[Tie]] = {}
        #: Set for a second pass that only determines which channels belong together.
        self.uncounted = False
        self._marks: dict[int, tuple[Tensor, Axes, bool]] = {}
        self._names: dict[int, str] = {id(tensor): name for name, tensor in tensors.items()}
        self._keep = list(tensors.values())
        self.stack: list[Frame] = [Frame("", None)]
        #: The innermost module whose forward pass ended with an error.
        self.failed: Frame | None = None

    # ---------------------------------------------------------------- what rules use
    def axes(self, tensor: Tensor) -> Axes:
        """The labels of each axis of `tensor`, one for each channel; None for an axis whose size stays (batch, space).

        Parameters get theirs when they are first met.
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
        """
        self._marks[id(tensor)] = (tensor, tuple(axes), active)

    def merge(self, a: Labels | None, b: Labels | None) -> Labels | None:
        """Two axes of the same size meet index by index: their channels are kept or removed together.

        Returns:
            The labels of the result's axis; None, and the other axis is fixed, where one of the two is of fixed size.
        """
        if a is None or b is None:
            self.fix(a if b is None else b, MEETS_FIXED)
            return None
        self.atoms.unify(a, b)
        return a

    def fix(self, labels: Labels | None, reason: str) -> None:
        """These channels must stay.

        Args:
            labels: Of an axis; None says nothing.
            reason: A clause that follows "left dense:"; the running module is added.
        """
        if labels is not None:
            where = self.stack[-1].path
            self.atoms.fix(labels, f"{reason} (in {where})" if where else reason)

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
            part = not path or name.startswith(f"{path}.")
            if part and len(own) == weight.dim() and _same(own[axis], labels):
                return name
        return None

    def count(self, operation: str, constant: int, *sizes: int | Labels, rounded: bool = False) -> None:
        """Add `constant * product(sizes)` to the multiply-adds outside of layers; labels stand for kept channels."""
        if not self.uncounted:
            self.facts.terms.append(Counted(operation, *factored(constant, sizes), rounded))

    def sizes(self, tensor: Tensor) -> list[int | Labels]:
        """Return the axes of `tensor` as factors for `count`."""
        return [
            size if axis is None else axis for size, axis in zip(tensor.shape, self.axes(tensor), strict=True)
        ]

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
        for path, attribute, place, value in size.origins:
            if not size.derived:
                self._tie(Tie(path, attribute, place, labels, block))
                tied = True
                continue
            for axis in (labels, *others):
                if axis is not None and axis.size == value:
                    self._tie(Tie(path, attribute, place, axis))
                    tied = True
                    break
        return tied

    def tie_attribute(self, attribute: str, labels: Labels, place: int | None = None, block: int = 1) -> None:
        """Tie the running module's `attribute` to the number of these channels (in blocks of `block`)."""
        self._tie(Tie(self.stack[-1].path, attribute, place, labels, block))

    def _tie(self, tie: Tie) -> None:
        for other in self._ties.setdefault((tie.path, tie.attribute, tie.place), []):
            if other.block == tie.block and other.labels.size == tie.labels.size:
                # One attribute is the size of both, so that both must shrink equally.
                self.atoms.unify(other.labels, tie.labels)
        self._ties[tie.path, tie.attribute, tie.place].append(tie)
        self.facts.ties.append(tie)

    # ---------------------------------------------------------------- the mode itself
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
                raise data_dependent(name, self.stack[-1])
            return func(*args, **kwargs)
        frame = self.stack[-1]
        key = (frame.pattern, frame.calls)
        frame.calls += 1
        out = shape_only(name, works_in_place(func), args, kwargs) if self._quick else None
        if out is None:
            out = func(*args, **kwargs)
        if name == "setitem":
            self._written(args)
        results = list(tensors_in([out]))
        if not results:
            return out
        call = Call(name, args, kwargs, out, key)
        if self._check is not None:
            self._check(self._steps, call, results, frame.path)
            self._steps += 1
            return out
        inputs = call.tensors
        live = any(self.active(tensor) for tensor in inputs)
        rule(self, call)
        for tensor in results:
            if id(tensor) not in self._marks or not self._marks[id(tensor)][2]:
                self.mark(tensor, self.axes(tensor), live)
        labelled = [axis for tensor in [*inputs, *results] for axis in self.axes(tensor) if axis is not None]
        if self.uncounted:
            return out
        self.facts.traffic.record(self, rule.__name__ if is_own(rule) else "", inputs, results)
        if key in self.settings.frozen:
            for axis in labelled:
                self.fix(axis, self.settings.frozen[key])
        self.facts.steps.append(
            Step(name, key, frame.path, [(tuple(t.shape), self.axes(t)) for t in results], labelled)
        )
        return out

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
                remember(path, module)
            module.__dict__["forward"] = _Watched(self, path, module, type(module).forward)


def _same(a: Labels | None, b: Labels) -> bool:
    return a is not None and np.array_equal(a, b)


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
        try:
            return self.forward(self.module, *args, **kwargs)
        except BaseException:
            self.tracer.failed = self.tracer.failed or frame
            raise
        finally:
            self.tracer.stack.pop()


def data_dependent(name: str, frame: Frame) -> CompressorError:
    """Return the error for a forward pass with data-dependent control flow."""
    where = (
        f"module '{frame.path}' ({frame.kind})" if frame.path else f"the network's own forward ({frame.kind})"
    )
    return CompressorError(
        f"The network's control flow depends on its data: {where} reads a tensor's value ('{name}') while it "
        "runs, so that one pass does not show the complete structure.",
        "Replace the branch by tensor operations (torch.where), or prune the part of the network around it.",
    )
