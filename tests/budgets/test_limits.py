"""Budgets in absolute numbers, several at once, and those that nothing can keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.budgets.base import parse_budget
from compressor.budgets.costs import MemoryBudget
from compressor.budgets.limits import reachable, resolve
from compressor.core.errors import CompressorError
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from compressor.recipe import Recipe
from compressor.run.job import Job


class Pair(nn.Module):
    """Two convolutions on 8x8 pixels and a classifier: one of its counts fits on the back of an envelope."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 32, 3, padding=1)
        self.c = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


PARAMS = (16 * 27 + 16) + (32 * 144 + 32) + (4 * 32 + 4)


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    return PruningSpace(Pair().eval(), torch.zeros(1, 3, 8, 8), granularity=4, min_width=4)


def test_shares_are_of_the_dense_network(space: PruningSpace) -> None:
    (params, macs) = resolve([parse_budget("params", "50%"), parse_budget("flops", "100k")], space)
    assert params.dense == PARAMS
    assert params.target == PARAMS / 2
    assert macs.target == 100_000
    assert macs.dense == space.macs(space.dense_widths)
    assert list(params.predict(np.asarray([[16, 32], [4, 4]]))) == [
        PARAMS, (4 * 27 + 4) + (4 * 36 + 4) + (4 * 4 + 4)
    ]  # fmt: skip
    assert list(params.kept(np.asarray([[16, 32], [4, 4]]))) == [False, True]
    assert str(params) == "params <= 2.61 k (50% of 5.22 k)"


def test_memory_by_hand(space: PruningSpace) -> None:
    (memory,) = resolve([parse_budget("memory", "20KB")], space)
    assert isinstance(memory, MemoryBudget)
    assert memory.dense == 4 * (PARAMS + 64 * (16 + 32))
    assert memory.predict(space.min_widths)[0] == 4 * (space.params(space.min_widths) + 64 * (4 + 4))


def test_memory_is_counted_in_the_precision_of_the_device() -> None:
    fields = {"model": "cifar_resnet20", "data": "digits", "budgets": {"memory": "50%"}}
    for device, width in (("local", 4), ("jetson-orin-nano-8gb", 2)):
        job = Job.prepare(Recipe.model_validate({**fields, "device": device}).resolved())
        (memory,) = job.budgets()
        parameters = sum(each.numel() for each in job.model.parameters())
        activations = int(job.space.activations(job.space.dense_widths[None])[0])
        assert memory.dense == width * (parameters + activations)


def test_tightening_a_budget_keeps_the_rest(space: PruningSpace) -> None:
    for budget in resolve([parse_budget(name, "50%") for name in ("params", "macs", "memory")], space):
        tighter = dataclasses.replace(budget, target=0.9 * budget.target)
        assert tighter.target == 0.9 * budget.target
        assert tighter.predict(space.dense_widths) == budget.predict(space.dense_widths)


def test_latency_comes_from_a_table(space: PruningSpace) -> None:
    table = LatencyTable.load("jetson-orin-nano-8gb", precision="fp16")
    (latency,) = resolve([parse_budget("latency", "80%")], space, table)
    assert latency.unit == "ms"
    assert latency.target == pytest.approx(0.8 * table.predict(space))
    assert latency.predict(space.dense_widths)[0] == pytest.approx(latency.dense)
    assert latency.estimated  # type: ignore[attr-defined]
    with pytest.raises(CompressorError, match="needs a latency table"):
        resolve([parse_budget("latency", "80%")], space)


def test_one_limit_for_one_cost(space: PruningSpace) -> None:
    with pytest.raises(CompressorError, match="given twice"):
        resolve([parse_budget("flops", "50%"), parse_budget("macs", "1M")], space)


def test_what_cannot_be_reached_is_said(space: PruningSpace) -> None:
    reachable(resolve([parse_budget("params", "50%"), parse_budget("flops", "50%")], space), space)
    with pytest.raises(CompressorError) as caught:
        reachable(resolve([parse_budget("params", "1%"), parse_budget("flops", "50%")], space), space)
    assert "params <= 52" in caught.value.message
    assert "280" in caught.value.message  # parameters of the smallest network
    assert "5.22 k" in caught.value.message
    assert "macs" not in caught.value.message
    assert "min_share" in caught.value.hint
