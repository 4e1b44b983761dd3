"""Finds the blocks of a network that can be removed whole: residual branches around which the input runs unchanged.

A block is found in the trace, not by the names of classes: an addition, one of whose operands is a value that the other
one, the branch, was computed from, and from which alone. Without the branch the addition's result is the other operand.
What is read of the branch elsewhere, and layers that run elsewhere too, keep it in the network, with a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from compressor.pruning.facts import Event, Facts, Flow, Visit
from compressor.pruning.groups import Skipped
from compressor.pruning.removal import ACTIVATIONS, IDENTITY, REPEATABLE, inside, nothing
from compressor.pruning.skeleton import aliases

CHANGED = "its input is read elsewhere, too, and its output is changed in place"
READ_ELSEWHERE = "what its layers compute is read outside of it, too"
OTHER_INPUT = "its shortcut is not the value that its layers read"
SHARED = "its layers run elsewhere, too"
LOOSE = "its layers run between operations that are no modules of their own"
HOLDS_BLOCK = "it holds the block {}"
DOES_NOT_RUN = "the network does not run without it ({})"


@dataclass(frozen=True)
class Block:
    """A part that can be removed whole.

    Args:
        name: The module that is the block; of several modules, that with the most parameters. Unique.
        index: Index in `PruningSpace.blocks`, in the order in which the network runs them.
        groups: Indices of the groups whose channels are its own, and go with it.
        layers: Indices in `PruningSpace.layers` of its layers.
        replaced: Path of each module that goes -> what takes its place, as `removal.place` takes it.
    """

    name: str
    index: int
    groups: tuple[int, ...]
    layers: tuple[int, ...]
    replaced: Mapping[str, str]


@dataclass
class Branch:
    """A block as it is found: the events that go, and what replaces its modules."""

    name: str
    events: set[int]
    replaced: dict[str, str] = field(default_factory=dict)


def find_branches(model: nn.Module, facts: Facts) -> tuple[list[Branch], list[Skipped]]:
    """Return what may be removed by the trace alone, in the order of execution, and what looks alike but stays."""
    search = _Search(model, facts.flow)
    found: list[Branch] = []
    left: list[Skipped] = []
    taken: dict[int, str] = {}
    for number, event in enumerate(facts.flow.events):
        branch = search.branch(number, event)
        if isinstance(branch, Branch) and (other := next((taken[e] for e in branch.events if e in taken), None)):
            branch = Skipped(branch.name, HOLDS_BLOCK.format(other))
        if isinstance(branch, Branch):
            found.append(branch)
            taken.update(dict.fromkeys(branch.events, branch.name))
        elif branch is not None:
            left.append(branch)
    return found, left


class _Search:
    """Follows values back from additions."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self.flow, self.model = flow, model
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        self.users: dict[str, list[int]] = {}
        for number, event in enumerate(flow.events):
            for value in event.reads:
                self.readers.setdefault(value, []).append(number)
            for value in event.writes:
                self.maker[value] = number
            for name in event.parameters:
                self.users.setdefault(name, []).append(number)
        self.runs = Counter(visit.path for visit in flow.visits)
        self.sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.tied = aliases(model)
        self.shared = _reached_twice(model)

    def branch(self, number: int, event: Event) -> Branch | Skipped | None:
        """Return the branch that ends in an event; None if the event is no addition of a branch with layers."""
        reads = [value for value in event.reads if value in self.flow.active]
        if event.name != "add" or len(reads) != 2 or len(event.writes) != 1 or not event.plain:
            return None
        shape = self.flow.shapes[event.writes[0]]
        for kept, end in (reads, reversed(reads)):
            events = self._between(kept, end)
            if events is None or not any(self.flow.events[each].layers for each in events):
                continue
            if self.flow.shapes[kept] != shape:
                continue
            return self._removal(number, kept, end, events)
        return self._unlike(event)

    def _unlike(self, event: Event) -> Skipped | None:
        """Report a module that adds a branch to something else than its own input, such as a downsampled shortcut."""
        visit = next((each for each in self.flow.visits if each.path == event.path), None)
        if visit is None or not event.path or self.runs[event.path] > 1:
            return None
        layers = any(self.flow.events[each].layers for each in range(visit.start, visit.end))
        return Skipped(event.path, OTHER_INPUT) if layers and len(visit.reads) == 1 else None

    def _between(self, start: int, end: int) -> set[int] | None:
        """Return the events that compute `end` from `start`; None if it also depends on other inputs, or not on it."""
        first = self.maker.get(start, -1)
        found: set[int] = set()
        wanted, reached = [end], False
        while wanted:
            value = wanted.pop()
            if value == start:
                reached = True
                continue
            maker = self.maker.get(value)
            if value not in self.flow.active or maker in found:
                continue
            if maker is None or maker <= first:
                return None
            found.add(maker)
            wanted.extend(self.flow.events[maker].reads)
        return found if reached else None

    def _removal(self, number: int, kept: int, end: int, events: set[int]) -> Branch | Skipped:
        """Return how a branch can be removed."""
        flow = self.flow
        name = self._name(events)
        written = {value for each in events for value in flow.events[each].writes}
        outside = {reader for value in written for reader in self.readers.get(value, ())} - events - {number}
        if outside or written & set(flow.results):
            return Skipped(name, READ_ELSEWHERE)
        parameters = {each for event in events for each in flow.events[event].parameters}
        if any(set(self.users[each]) - events for each in parameters):
            return Skipped(name, SHARED)
        if self._changes_others(number, kept, events):
            return Skipped(name, CHANGED)
        for visit in sorted(flow.visits, key=lambda each: each.end - each.start):
            whole = self._whole(visit, number, kept, events)
            if whole is not None:
                return whole
        return self._parts(name, kept, end, number, events)

    def _changes_others(self, number: int, kept: int, events: set[int]) -> bool:
        """Whether the kept value, which becomes the addition's result, would be changed before others read it."""
        (result,) = self.flow.events[number].writes
        changed = any(self.flow.events[each].in_place for each in self.readers.get(result, ()))
        others = set(self.readers.get(kept, ())) - events - {number}
        return changed and (bool(others) or kept in self.flow.results)

    def _name(self, events: set[int]) -> str:
        """Return the path of the module with the most parameters among the events."""
        sizes: Counter[str] = Counter()
        for each in events:
            for name in self.flow.events[each].parameters:
                sizes[self.flow.events[each].path] += self.sizes.get(name, 0)
        return max(sizes, key=lambda path: sizes[path])

    def _whole(self, visit: Visit, number: int, kept: int, events: set[int]) -> Branch | None:
        """Return the branch if this module is the branch, the addition and at most an activation, and nothing else."""
        flow, (result,) = self.flow, self.flow.events[number].writes
        if not (visit.path and visit.single and visit.outputs == 0 and visit.reads == (kept,)):
            return None
        own, place = {*events, number}, IDENTITY
        if visit.writes != (result,):
            after = self.readers.get(result, [])
            if len(after) != 1 or result in flow.results or visit.writes != flow.events[after[0]].writes:
                return None
            activation = flow.events[after[0]]
            if activation.name not in ACTIVATIONS or not activation.plain or activation.reads != (result,):
                return None
            own.add(after[0])
            place = self._after(kept, activation)
        span = range(visit.start, visit.end)
        if self._active(span) != own or not self._alone([visit]):
            return None
        gone = set(span) - {after[0]} if place != IDENTITY else set(span)
        return Branch(visit.path, gone, {visit.path: place})

    def _after(self, kept: int, activation: Event) -> str:
        """Return what is left of a block that ends with an activation: nothing if its input has passed it already."""
        before = self.maker.get(kept)
        made = None if before is None else self.flow.events[before]
        again = made is not None and made.name == activation.name and made.plain
        return IDENTITY if again and activation.name in REPEATABLE else activation.name

    def _parts(self, name: str, kept: int, end: int, number: int, events: set[int]) -> Branch | Skipped:
        """Return the branch as several modules, called by code that remains."""
        flow = self.flow
        written = {value for each in events for value in flow.events[each].writes}
        units: list[Visit] = []
        last = -1
        for place, visit in enumerate(flow.visits):
            known = {kept, *written}
            if place < last or not (visit.path and visit.reads and visit.writes):
                continue
            if not set(visit.reads) <= known or not set(visit.writes) <= written:
                continue
            if self._active(range(visit.start, visit.end)) <= events:
                units.append(visit)
                last = visit.last
        spans = [set(range(visit.start, visit.end)) for visit in units]
        covered = self._active(sorted(set().union(*spans)))
        if covered != events or end not in units[-1].writes or any(visit.outputs < 0 for visit in units):
            return Skipped(name, LOOSE)
        if not self._alone(units):
            return Skipped(name, SHARED)
        largest = max(units, key=lambda each: self._size(each.path)).path
        return Branch(
            largest, {number}.union(*spans), {visit.path: nothing(visit.outputs) for visit in units}
        )

    def _active(self, events: Sequence[int]) -> set[int]:
        """Return those of some events that depend on the network's input."""
        return {each for each in events if any(value in self.flow.active for value in self.flow.events[each].writes)}

    def _size(self, path: str) -> int:
        return sum(size for name, size in self.sizes.items() if name.startswith(f"{path}."))

    def _alone(self, units: Sequence[Visit]) -> bool:
        """Whether modules run once, and neither their parameters nor what they compute is used outside of them."""
        paths = {visit.path: "" for visit in units}
        own = {each for visit in units for each in range(visit.start, visit.end)}
        if any(self.runs[visit.path] > 1 or inside(visit.path, self.shared) for visit in units):
            return False
        if any(inside(path, paths) for path in self.shared):
            return False
        if any(inside(first, paths) or inside(second, paths) for first, second in self.tied.items()):
            return False
        for name, users in self.users.items():
            if (inside(name, paths) and set(users) - own) or (not inside(name, paths) and set(users) & own):
                return False
        constants = (v for each in own for v in self.flow.events[each].writes if v not in self.flow.active)
        return all(set(self.readers.get(value, ())) <= own for value in constants)


def _reached_twice(model: nn.Module) -> list[str]:
    """Return all paths of the modules that have several."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return [path for found in paths.values() if len(found) > 1 for path in found]
