"""Which parts of a network compute in INT8 and which in floats: all that are best for some exchange of noise for time.

A plan has a price: the time of each part in its precision, the time of the conversions where a value passes from one
precision to the other, and the noise that the parts in INT8 add to the outputs. With the noise weighed against the
time, the plan of the lowest price is a minimum cut of a graph: the best of all plans, whatever the order in which parts
are looked at. The plans for all weights are the corners of the curve of noise against time. They are predictions, since
a runtime fuses parts that are neighbours, so the few plans that come out have to be measured.

    parts = parts_of(proto, ONNXRUNTIME)
    for plan in plans(parts, prices): ...
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from export.convert.calibrated import FORMS, following, quantisable

MOST_PARTS = 64
"""Parts whose noise is measured one by one; longer networks are divided into as many runs of neighbours."""

_WEIGHTS = 60  # exchange rates that are tried, evenly spread over their logarithms
_UNIT = 1 << 24  # capacities are whole numbers
_LARGE = 1 << 30


@dataclass(frozen=True)
class Part:
    """Nodes that share a precision.

    Attributes:
        nodes: Those that are quantised.
        follow: Those that compute in INT8, or in the same kernel, because the nodes do.
    """

    nodes: tuple[str, ...]
    follow: tuple[str, ...]


@dataclass(frozen=True)
class Crossing:
    """A value that leaves the part that computes it.

    Attributes:
        maker: The part that computes it; None where it is always a float.
        users: The parts that read it.
        floats: Whether something else reads it too, always as a float.
        elements: Its number of elements.
    """

    maker: int | None
    users: tuple[int, ...]
    floats: bool
    elements: int


@dataclass(frozen=True)
class Parts:
    """A network, divided into parts.

    Attributes:
        parts: In the order of the file.
        crossings: The values that pass between them.
    """

    parts: tuple[Part, ...]
    crossings: tuple[Crossing, ...]

    def nodes(self, plan: Collection[int]) -> list[str]:
        """Return the nodes that are quantised if these parts compute in INT8."""
        return [name for index in plan for name in self.parts[index].nodes]


@dataclass(frozen=True)
class Prices:
    """What the parts cost.

    Attributes:
        float_ms, int8_ms: Milliseconds of each part in its precisions.
        to_int8_ms, to_float_ms: Milliseconds of converting each crossing's value.
        noise: What each part in INT8 adds to the outputs; see `quantize.noise`.
    """

    float_ms: Sequence[float]
    int8_ms: Sequence[float]
    to_int8_ms: Sequence[float]
    to_float_ms: Sequence[float]
    noise: Sequence[float]


def parts_of(proto: Any, runtime: str) -> Parts:
    """Divide a network into parts: each quantisable node with those that follow it, or runs of neighbours."""
    able, kinds = quantisable(proto), (*FORMS[runtime].followers, *FORMS[runtime].fused)
    count = min(MOST_PARTS, len(able))
    bounds = [round(place * len(able) / max(count, 1)) for place in range(count + 1)]
    groups = [tuple(able[start:end]) for start, end in zip(bounds, bounds[1:])]
    parts = tuple(Part(group, tuple(following(proto, group, kinds))) for group in groups)
    return Parts(parts, tuple(_crossings(proto, parts)))


def _crossings(proto: Any, parts: Sequence[Part]) -> Iterator[Crossing]:
    """Yield the activations that a part computes for others, or reads from others."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto).graph
    part_of = {name: index for index, part in enumerate(parts) for name in (*part.nodes, *part.follow)}
    stored = {tensor.name for tensor in graph.initializer}
    sizes = {
        value.name: math.prod(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    maker = {name: part_of.get(node.name) for node in graph.node for name in node.output}
    users: dict[str, set[int | None]] = {value.name: {None} for value in graph.output}
    for node in graph.node:
        for name in node.input:
            if name and name not in stored:
                users.setdefault(name, set()).add(part_of.get(node.name))
    for name, readers in users.items():
        others = readers - {maker.get(name)}
        if others:
            inside = tuple(sorted(each for each in others if each is not None))
            yield Crossing(maker.get(name), inside, None in others, sizes.get(name, 0))


def plans(parts: Parts, prices: Prices, most: int) -> list[tuple[int, ...]]:
    """Return the best plans, from all parts in floats to the fastest: for each the parts that compute in INT8.

    Args:
        parts, prices: The network.
        most: Number of plans; of more, those are left out that are closest to another in predicted time.
    """
    import numpy as np

    total = max(sum(prices.float_ms), 1e-9)
    least = max(min((value for value in prices.noise if value > 0), default=1e-9), 1e-12)
    rates = np.geomspace(1e-3 * least, 1e3 * max(sum(prices.noise), least), _WEIGHTS) / total
    found = {(): None} | {cheapest(parts, prices, float(rate)): None for rate in rates}
    times = {plan: predicted_ms(parts, prices, plan) for plan in found}
    kept = sorted(times, key=lambda plan: -times[plan])
    while len(kept) > max(most, 2):
        gaps = [times[before] - times[after] for before, after in zip(kept[:-2], kept[2:])]
        del kept[1 + int(np.argmin(gaps))]
    return kept


def plans_by_noise(noise: Sequence[float], most: int) -> list[tuple[int, ...]]:
    """Return plans where no time of a part is known: none in INT8, more and more of those of least noise, and all."""
    order = sorted(range(len(noise)), key=lambda index: noise[index])
    steps = max(min(most, len(order) + 1) - 1, 1)
    return [tuple(sorted(order[: round(step * len(order) / steps)])) for step in range(steps + 1)]


def predicted_ms(parts: Parts, prices: Prices, plan: Collection[int]) -> float:
    """Milliseconds of the parts and conversions of a plan."""
    chosen = set(plan)
    total = sum(
        (prices.int8_ms if index in chosen else prices.float_ms)[index] for index in range(len(parts.parts))
    )
    for index, crossing in enumerate(parts.crossings):
        quantised = crossing.maker in chosen
        inside = [user in chosen for user in crossing.users]
        if not quantised and any(inside):
            total += prices.to_int8_ms[index]
        if quantised and (crossing.floats or not all(inside)):
            total += prices.to_float_ms[index]
    return total


def cheapest(parts: Parts, prices: Prices, rate: float) -> tuple[int, ...]:
    """Return the plan with the smallest noise + `rate` * milliseconds.

    Nodes of the graph on the source's side of the minimum cut are in INT8. Each part has an edge to either end with the
    price of the other precision. A conversion is paid once for any number of users, by a node of its own between maker
    and users: it is cut off from the maker at the conversion's price, and from its users at none.
    """
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    count = len(parts.parts)
    source, sink = count, count + 1
    size = count + 2 + 2 * len(parts.crossings)
    edges: dict[tuple[int, int], float] = {}

    def add(start: int, end: int, price: float) -> None:
        edges[start, end] = edges.get((start, end), 0.0) + price

    for index in range(count):
        gain = rate * (prices.float_ms[index] - prices.int8_ms[index]) - prices.noise[index]
        add(*((source, index) if gain > 0 else (index, sink)), abs(gain))
    for index, crossing in enumerate(parts.crossings):
        maker = sink if crossing.maker is None else crossing.maker
        entered, left = count + 2 + 2 * index, count + 3 + 2 * index
        add(entered, maker, rate * prices.to_int8_ms[index])  # a user in INT8 of a float
        add(maker, left, rate * prices.to_float_ms[index])  # a user in floats of an INT8 value
        for user in crossing.users:
            add(user, entered, np.inf)
            add(left, user, np.inf)
        if crossing.floats:
            add(left, sink, np.inf)
    finite = sum(price for price in edges.values() if price < np.inf) or 1.0
    places = [place for place, price in edges.items() if price > 0]
    capacity = [
        _LARGE if edges[place] == np.inf else round(_UNIT * edges[place] / finite) for place in places
    ]
    rows, columns = zip(*places) if places else ((), ())
    graph = csr_array((np.asarray(capacity, dtype=np.int32), (rows, columns)), shape=(size, size))
    left_over = graph - maximum_flow(graph, source, sink).flow
    left_over.data = np.maximum(left_over.data, 0)
    left_over.eliminate_zeros()
    reached = set(breadth_first_order(left_over, source, return_predecessors=False).tolist())
    return tuple(index for index in range(count) if index in reached)
