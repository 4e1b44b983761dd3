"""Episodes on real networks end within every budget, as counted on the network that is built."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor.budgets.base import parse_budget
from compressor.budgets.limits import resolve
from compressor.core.errors import CompressorError
from compressor.pruning.space import PruningSpace
from compressor.search.environment import PruningEnv
from tests.search.fake_space import FakeBudget


class Chain(nn.Module):
    """Convolutions of the given widths; equal neighbours are added to one another."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        pairs = list(zip([3, *widths], widths, strict=False))
        self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in widths)
        self.linear = nn.Linear(widths[-1], 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            out = torch.relu(norm(layer(x)))
            x = x + out if x.shape == out.shape else out
        return self.linear(x.mean((2, 3)))


def jagged(space: PruningSpace, generator: np.random.Generator, share: float) -> FakeBudget:
    """A price for each group and width that falls and rises with the width, as runtimes have it."""
    tables = [generator.uniform(0.2, 1.0, group.width + 1) * (group.width / 8) for group in space.groups]

    def cost(widths: Any) -> Any:
        return sum(table[widths[:, index]] for index, table in enumerate(tables))

    return FakeBudget("latency", share * float(cost(space.dense_widths[None])[0]), cost, "ms")


def reached(space: PruningSpace, budgets: list[Any]) -> PruningEnv | None:
    """None where no widths were found that keep the budgets."""
    with suppress(CompressorError):
        return PruningEnv(space, budgets, lambda plan: 0.5)
    return None


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_networks_tables_and_limits(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.sampled_from([6, 8, 12, 16, 20]), min_size=2, max_size=4))
    step, least = data.draw(st.sampled_from([1, 2, 4, 8])), data.draw(st.sampled_from([0.0, 0.1, 0.3, 0.5]))
    scope: Any = data.draw(st.sampled_from(["all", "inner"]))
    generator = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    space = PruningSpace(
        Chain(widths), torch.zeros(1, 3, 8, 8), granularity=step, min_width=least, scope=scope
    )
    if not space.groups:
        return
    wanted = data.draw(st.lists(st.sampled_from(["macs", "params", "latency"]), min_size=1, unique=True))
    shares = {name: data.draw(st.floats(0.3, 1.0)) for name in wanted}
    counted = [parse_budget(name, f"{shares[name]:.4f}x") for name in wanted if name != "latency"]
    budgets: list[Any] = list(resolve(counted, space))
    if "latency" in wanted:
        budgets.append(jagged(space, generator, shares["latency"]))
    env = reached(space, budgets)
    if env is None:  # then at least the smallest network is no answer
        smallest = space.min_widths[None]
        assert any(float(budget.predict(smallest)[0]) > budget.target for budget in budgets)
        return
    for _ in range(3):
        env.reset()
        last, info = False, {}
        while not last:
            _, _, last, _, info = env.step(np.array([generator.random()], dtype=np.float32))
        chosen = np.array(info["score"].widths)
        for index, group in enumerate(space.groups):
            assert chosen[index] in space.choices(index)
            assert chosen[index] >= min(group.width, np.ceil(least * group.width))
        slim = space.apply(env.plan(chosen))
        for budget in budgets:
            assert float(budget.predict(chosen[None])[0]) <= budget.target * (1 + 1e-9)
            if budget.name == "params":
                assert sum(parameter.numel() for parameter in slim.parameters()) <= budget.target
