"""Episodes end within every budget, whatever the table, the steps and the minimum widths."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.core.errors import CompressorError
from compressor.search.bounds import ActionBounds, LegalWidths
from tests.search.fake_space import FakeBudget, FakeSpace, macs_budget


def walk(bounds: ActionBounds, ratios: list[float]) -> np.ndarray:
    widths = bounds.dense.copy()
    for step, ratio in enumerate(ratios):
        legal = bounds.legal(step, widths)
        widths[step] = legal.width(legal.clip(ratio))
    return widths


def reached(space: FakeSpace, budgets: list[FakeBudget]) -> ActionBounds | None:
    """None where a wild table hides the one network that keeps the budgets: that is refused, not searched."""
    with suppress(CompressorError):
        return ActionBounds(space, budgets)
    return None


def random_table(space: FakeSpace, generator: np.random.Generator) -> FakeBudget:
    """A cost per pair of neighbouring widths, not monotone in either."""
    sizes = [int(layer.out_channels(space.dense_widths[None])[0]) for layer in space.layers[:-1]]
    tables = [generator.uniform(1, 10, (a + 1, b + 1)) for a, b in zip([3, *sizes], sizes, strict=False)]

    def cost(widths: np.ndarray) -> np.ndarray:
        before = np.concatenate([np.full((len(widths), 1), 3), widths[:, :-1]], axis=1)
        return sum(table[before[:, i], widths[:, i]] for i, table in enumerate(tables))

    return FakeBudget("latency", 0.0, cost, "ms")


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_episode_keeps_every_budget(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    dense = data.draw(st.lists(st.integers(2, 24), min_size=size, max_size=size))
    steps = data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=size, max_size=size))
    least = [min(width, data.draw(st.integers(1, 6))) for width in dense]
    space = FakeSpace(dense, steps, least)
    generator = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    some = np.array([[generator.choice(space.choices(i)) for i in range(size)] for _ in range(20)])
    table, macs = random_table(space, generator), macs_budget(space, 1.0)
    # A known network sets the targets, so that they can be met; it may be expensive, cheap, or the only one.
    known = some[data.draw(st.integers(0, 19))][None]
    table.target = float(table.predict(known)[0]) * data.draw(st.floats(1.0, 1.3))
    macs.target = float(macs.predict(known)[0]) * data.draw(st.floats(1.0, 1.3))
    budgets = data.draw(st.sampled_from([[table], [macs], [table, macs]]))
    bounds = reached(space, budgets)
    if bounds is None:
        return
    for _ in range(4):
        widths = walk(bounds, generator.random(size).tolist())
        assert all(width in space.choices(i) for i, width in enumerate(widths))
        for budget in budgets:
            assert budget.predict(widths[None])[0] <= budget.target * (1 + 1e-9)


def test_bounds_by_hand() -> None:
    # One layer from 3 to w channels, one from w to 10: MACs are 576 * 13 w, dense 576 * 13 * 8.
    space = FakeSpace([8])
    bounds = ActionBounds(space, [macs_budget(space, 0.5)])
    low, high = bounds.bounds(0, bounds.dense)
    assert (low, high) == (0.5, 0.5)  # four channels must go, and no more than four


def test_the_two_ends_of_a_chain() -> None:
    space = FakeSpace([8, 8])
    # MACs / 576 are 3 a + a b + 10 b: dense 168. Of 100, with b at 1 there is room for every a, 4 * 8 + 10 =
    # 42; with b dense, 11 a + 80 <= 100 leaves a = 1, the least anyway.
    bounds = ActionBounds(space, [FakeBudget("macs", 100 * 576.0, space.macs)])
    assert bounds.legal(0, bounds.dense).widths.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    # a = 4: 12 + 14 b <= 100 leaves b <= 6, and the largest is the only one that removes no more than needed.
    assert bounds.legal(1, np.array([4, 8])).widths.tolist() == [6]


def test_a_budget_that_is_met_prunes_nothing() -> None:
    space = FakeSpace([8, 16, 4], granularity=2)
    bounds = ActionBounds(space, [macs_budget(space, 1.0)])
    assert walk(bounds, [0.9, 0.9, 0.9]).tolist() == [8, 16, 4]
    assert walk(ActionBounds(space, []), [0.9, 0.9, 0.9]).tolist() == [8, 16, 4]


def test_minimum_widths_are_reserved() -> None:
    # The second group cannot go below 12 of 16; taking its least to be 0, as the paper does, the first would
    # be too wide.
    space = FakeSpace([16, 16], smallest=[1, 12])
    macs = macs_budget(space, 0.5)
    bounds = ActionBounds(space, [macs])
    widths = walk(bounds, [0.0, 0.0])
    assert macs.predict(widths[None])[0] <= macs.target
    assert widths[1] >= 12


def test_dear_minimum_widths() -> None:
    # A kernel that is slow below 4 channels: the smallest network misses the budget, another one keeps it.
    space = FakeSpace([8, 8])
    slow = FakeBudget("latency", 5.0, lambda w: np.where(w < 4, 9.0, w / 2).sum(axis=1), "ms")
    bounds = ActionBounds(space, [slow])
    assert bounds.cheapest.tolist() == [4, 4]
    assert bounds.legal(0, bounds.dense).widths.tolist() == [4, 5, 6]


def test_unreachable_budgets_say_what_can_be_reached() -> None:
    space = FakeSpace([8, 8], smallest=4)
    with pytest.raises(
        CompressorError, match=r"the best network found needs 39168 MACs of macs \(limit 5760\)"
    ):
        ActionBounds(space, [FakeBudget("macs", 5760.0, space.macs, "MACs")])


def test_ratio_to_width() -> None:
    legal = LegalWidths(16, np.array([4, 8, 12]))
    assert (legal.low, legal.high) == (0.25, 0.75)
    assert legal.clip(0.1) == 0.25
    assert legal.clip(0.9) == 0.75
    assert legal.width(0.5) == 8
    assert legal.width(1 - 10 / 16) == 12  # halfway: the larger
    assert legal.width(0.7) == 4


def test_costs_that_need_a_network_are_asked_little() -> None:
    from compressor.budgets.function import FunctionBudget, FunctionCaller

    class Total(FunctionCaller):
        def measure(self, widths: tuple[int, ...]) -> float:
            return float(sum(widths))

    space = FakeSpace([64, 64, 64])
    budget = FunctionBudget(Total("tests:total", space), 100.0, 192.0, "tests:total")  # type: ignore[arg-type]
    bounds = ActionBounds(space, [budget])
    assert [len(choices) for choices in bounds.choices] == [9, 9, 9]
    widths = walk(bounds, [0.3, 0.3, 0.3])
    assert 80 < widths.sum() <= 100
    assert len(budget.known) < 60
