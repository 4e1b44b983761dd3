"""Any Python function as a budget, called in a process of its own; whatever it does wrong is one message."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.budgets.base import CachedValues, parse_budget, parse_named_budget
from compressor.budgets.function import FunctionCaller, checked, load_function, wants_plan
from compressor.budgets.limits import keeping_widths, reachable, resolve
from compressor.core.errors import CompressorError
from compressor.pruning.space import PruningSpace
from compressor.search.bounds import ActionBounds

COSTS = """
import os, time
def width(module):
    return module.a.out_channels
def kept(plan):
    return sum(len(units) for units in plan.keep.values())
def narrow(plan):
    return 480 / sum(len(units) for units in plan.keep.values())
def ticks(plan, seen=[]):
    seen.append(1)
    return kept(plan) + len(seen)
def broken(module):
    raise ValueError('no such\\nthing')
def nan(module):
    return float('nan')
def text(module):
    return '12'
def flag(module):
    return True
def nothing(module):
    print('this goes to nobody')
def negative(module):
    return -3
def hangs(module):
    time.sleep(100)
def crashes(module):
    os.kill(os.getpid(), 9)
def leaves(module):
    raise SystemExit(3)
def wrong(module, turns=[broken, leaves, text, crashes]):
    return turns.pop(0)(module)
def two(module, other):
    return 1
number = 3
"""


class Pair(nn.Module):
    """Two convolutions: groups of 16 and 32 channels."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 32, 3, padding=1)
        self.c = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    return PruningSpace(Pair().eval(), torch.zeros(1, 3, 8, 8), granularity=4, min_width=4)


@pytest.fixture(scope="module", autouse=True)
def _costs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("costs")
    (folder / "own_costs.py").write_text(COSTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def caller(space: PruningSpace) -> Iterator[FunctionCaller]:
    """A caller whose process ends with the module."""
    made = FunctionCaller("own_costs:width", space, seconds=20)
    yield made
    made.close()


def test_a_function_is_called_once_for_each_network(space: PruningSpace, caller: FunctionCaller) -> None:
    (budget,) = resolve([parse_named_budget("own_costs:width<=50%")], space, callers={caller.name: caller})
    assert (budget.dense, budget.target) == (16.0, 8.0)
    assert list(budget.predict(np.asarray([[16, 32], [8, 32], [8, 32]]))) == [16.0, 8.0, 8.0]
    tighter = dataclasses.replace(budget, target=4.0)  # type: ignore[type-var]
    assert list(tighter.kept(np.asarray([[8, 32], [4, 32]]))) == [False, True]
    assert caller.calls == 3
    with pytest.raises(CompressorError, match="given twice"):
        resolve([parse_named_budget("own_costs:width<=50%")] * 2, space)


def test_a_plan_where_the_argument_says_so_and_the_median_of_a_noisy_one(space: PruningSpace) -> None:
    ticks = FunctionCaller("own_costs:ticks", space, repeats=3)
    assert ticks.value((8, 12)) == 22.0  # 20 units are kept; of 21, 22, 23
    assert ticks.value((8, 12)) == 22.0
    assert ticks.measure((8, 12)) == 25.0
    ticks.close()


def test_what_it_raises_and_how_it_ends_is_named(space: PruningSpace) -> None:
    """One thing after another in one process, which only the last one ends."""
    caller = FunctionCaller("own_costs:wrong", space, seconds=20)
    pid = caller._started().pid
    for says in (
        "raised on the network of widths [16, 32]: ValueError: no such thing",
        "SystemExit: 3",
        "gave '12' (str), no number, for the network",
        "killed by SIGKILL",
    ):
        assert caller._started().pid == pid
        with pytest.raises(CompressorError) as caught:
            caller.value((16, 32))
        assert "own_costs:wrong" in caught.value.message
        assert says in caught.value.message
    caller.close()


def test_only_finite_numbers_from_zero_on_count() -> None:
    for good in (3, 2.5, np.float32(2.5), torch.tensor(2.5), np.array([2.5])):
        assert checked(good)["value"] in (3.0, 2.5)
    for bad, says in (
        (True, "True (bool)"),
        (None, "None (NoneType)"),
        ("1", "'1' (str)"),
        (float("nan"), "not finite"),
        (-1e-9, "negative"),
        (torch.ones(2), "Tensor"),
        (2j, "complex"),
    ):
        assert checked(bad)["value"] is None
        assert says in checked(bad)["shown"]


def test_what_cannot_be_found_or_called_is_refused() -> None:
    for name, says in (
        ("own_costs:widht", "nearest: width"),
        ("own_costs:number", "got int, which cannot be called"),
        ("own_costs:two", "cannot be called with one argument"),
        ("own_cost:width", "cannot be imported"),
    ):
        with pytest.raises(CompressorError, match=says):
            load_function(name)
    assert not wants_plan(load_function("own_costs:width"))
    assert wants_plan(load_function("own_costs:kept"))


def test_budgets_that_contradict_each_other_are_named(space: PruningSpace) -> None:
    specs = [
        parse_budget("params", "50%"),
        parse_named_budget("own_costs:narrow<=12"),
        parse_budget("flops", "90%"),
    ]
    caller = FunctionCaller("own_costs:narrow", space)
    budgets = resolve(specs, space, callers={caller.name: caller})
    with pytest.raises(CompressorError) as caught:
        reachable(budgets, space)
    assert "params and own_costs:narrow contradict each other" in caught.value.message
    # Each alone, and both a little looser, can be kept, though the function's cost rises where a width falls.
    reachable(budgets[:1], space)
    reachable(budgets[1:2], space)
    loose = resolve(
        [specs[0], parse_named_budget("own_costs:narrow<=20")], space, callers={caller.name: caller}
    )
    bounds = ActionBounds(space, loose)
    assert all(budget.kept(bounds.cheapest)[0] for budget in loose)
    found = keeping_widths(bounds.choices, bounds.dense, loose)
    assert found.sum() >= 24
    caller.close()


def test_a_share_of_nothing_is_refused(space: PruningSpace) -> None:
    class Zero(CachedValues):
        def measure(self, widths: tuple[int, ...]) -> float:
            return 0.0

    callers: dict[str, CachedValues] = {"own_costs:zero": Zero("own_costs:zero")}
    with pytest.raises(CompressorError, match="dense network's value is 0"):
        resolve([parse_named_budget("own_costs:zero<=50%")], space, callers=callers)


def test_a_network_that_no_other_process_can_build_is_refused() -> None:
    class Local(Pair):
        pass

    space = PruningSpace(Local().eval(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        CompressorError, match=r"no factory was found that builds the dense .*Local"
    ) as caught:
        FunctionCaller("own_costs:width", space).value((16, 32))
    assert "package.module:factory" in caught.value.hint


@pytest.mark.usefixtures("started_children")
def test_a_hanging_process_is_gone(space: PruningSpace) -> None:
    caller = FunctionCaller("own_costs:hangs", space, seconds=0.5)
    child = caller._started()
    late = r"own_costs:hangs did not return within 0\.5 s on the network of widths \[16, 32\]; it was stopped"
    with pytest.raises(CompressorError, match=late):
        caller.value((16, 32))
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
