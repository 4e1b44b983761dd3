"""Plans of precisions: the cheapest of all plans, and the parts that they choose among."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.convert.calibrated import ONNXRUNTIME, TENSORRT
from export.convert.mixed import (
    Crossing,
    Part,
    Parts,
    Prices,
    cheapest,
    parts_of,
    plans,
    plans_by_noise,
    predicted_ms,
)
from export.convert.to_onnx import export_onnx
from tests.export.nets import SmallNet


def chain(count: int) -> Parts:
    """Parts one after another, from a float input to a float output."""
    values = [Crossing(place - 1 if place else None, (place,), False, 10) for place in range(count)]
    ends = Crossing(count - 1, (), True, 10)
    return Parts(tuple(Part((f"n{place}",), ()) for place in range(count)), (*values, ends))


def test_times_of_a_plan() -> None:
    parts = chain(3)
    prices = Prices([4.0, 5.0, 6.0], [1.0, 1.5, 2.0], [0.1, 0.2, 0.3, 0.4], [10.0, 20.0, 30.0, 40.0], [0.0] * 3)
    assert predicted_ms(parts, prices, ()) == 15.0
    assert predicted_ms(parts, prices, (0, 1, 2)) == pytest.approx(4.5 + 0.1 + 40.0)
    assert predicted_ms(parts, prices, (1,)) == pytest.approx(4.0 + 1.5 + 6.0 + 0.2 + 30.0)


def test_a_conversion_is_paid_once_for_all_users() -> None:
    values = (Crossing(0, (1, 2), False, 10), Crossing(None, (0,), False, 10), Crossing(2, (), True, 10))
    parts = Parts(tuple(Part((f"n{place}",), ()) for place in range(3)), values)
    prices = Prices([1.0] * 3, [0.0] * 3, [5.0, 0.0, 0.0], [7.0, 0.0, 0.0], [0.0] * 3)
    assert predicted_ms(parts, prices, (1, 2)) == 1.0 + 5.0
    assert predicted_ms(parts, prices, (0,)) == 2.0 + 7.0
    assert predicted_ms(parts, prices, (0, 1)) == 1.0 + 7.0


@pytest.mark.parametrize("seed", range(30))
def test_no_plan_is_cheaper(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 8))
    values = []
    for _ in range(int(random.integers(0, 10))):
        maker = None if random.random() < 0.2 else int(random.integers(count))
        users = tuple(sorted({int(user) for user in random.integers(0, count, random.integers(0, 3))} - {maker}))
        values.append(Crossing(maker, users, bool(random.random() < 0.3) or not users, 10))
    parts = Parts(tuple(Part((f"n{place}",), ()) for place in range(count)), tuple(values))
    draw = [random.random(size).tolist() for size in (count, count, len(values), len(values), count)]
    prices, rate = Prices(*draw), float(2 * random.random())

    def price(plan: tuple[int, ...]) -> float:
        return sum(prices.noise[index] for index in plan) + rate * predicted_ms(parts, prices, plan)

    every = (plan for size in range(count + 1) for plan in itertools.combinations(range(count), size))
    assert price(cheapest(parts, prices, rate)) == pytest.approx(min(map(price, every)), abs=1e-5)


def test_plans_are_the_corners_of_noise_against_time() -> None:
    parts = chain(4)
    free = [0.0] * 5
    prices = Prices([1.0] * 4, [0.5, 0.6, 0.7, 1.2], free, free, [1e-4, 1e-3, 1e-2, 1e-5])
    assert plans(parts, prices, 8) == [(), (0,), (0, 1), (0, 1, 2)]  # the last part is slower in INT8
    assert plans(parts, prices, 3) == [(), (0,), (0, 1, 2)]  # the one between whose neighbours are closest is left out
    dear = Prices([1.0] * 4, [0.5, 0.6, 0.7, 1.2], [1.0] * 5, [1.0] * 5, prices.noise)
    assert plans(parts, dear, 8) == [()]  # conversions take more than INT8 gains


def test_without_times_the_noise_orders_the_plans() -> None:
    assert plans_by_noise([0.3, 0.1, 0.2], 8) == [(), (1,), (1, 2), (0, 1, 2)]
    assert plans_by_noise([0.3, 0.1, 0.2, 0.4], 3) == [(), (1, 2), (0, 1, 2, 3)]
    assert plans_by_noise([0.3, 0.1, 0.2, 0.4], 2) == [(), (0, 1, 2, 3)]
    assert plans_by_noise([], 8) == [(), ()]


def test_parts_of_a_network(tmp_path: Path) -> None:
    export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), tmp_path / "net.onnx")
    proto = onnx.load(tmp_path / "net.onnx")
    found = parts_of(proto, ONNXRUNTIME)
    assert [part.nodes for part in found.parts] == [
        ("/body/body.0/Conv",), ("/depthwise/Conv",), ("/branch/Conv",), ("/Add",), ("/head/Gemm",),
    ]  # fmt: skip
    kinds = {node.name: node.op_type for node in proto.graph.node}
    follow = [tuple(kinds[name] for name in part.follow) for part in found.parts]
    assert follow[0] in (("Clip",), ("Relu",))
    ends = [crossing for crossing in found.crossings if crossing.maker is None]
    assert ends[0] == Crossing(None, (0,), False, 3 * 16 * 16)
    fused = [tuple(kinds[name] for name in part.follow) for part in parts_of(proto, TENSORRT).parts]
    assert fused[0] == follow[0]  # the activation function, which TensorRT computes in the convolution's kernel
    assert fused[3:] == [("Relu",), ()]  # of the residual sum, too
