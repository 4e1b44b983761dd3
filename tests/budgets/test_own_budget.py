"""Budgets that other packages register."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from compressor.budgets import base
from compressor.budgets.base import BUDGETS, Budget, budget_class, parse_named_budget, register_budget
from compressor.budgets.limits import reachable, resolve
from compressor.core import plugins
from compressor.core.errors import CompressorError
from compressor.pruning.space import PruningSpace
from tests.architecture import code_of, installed

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def registered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    for name in BUDGETS:
        budget_class(name)
    monkeypatch.setattr(base._registry, "classes", dict(base._registry.classes))
    plugins.load_plugins.cache_clear()
    yield
    plugins.load_plugins.cache_clear()
    sys.modules.pop("mychannels", None)


@dataclass(frozen=True)
class Plain(Budget):
    target: float
    dense: float
    name: str = "plain"
    unit: str = "things"

    def predict(self, widths: Any) -> Any:
        raise NotImplementedError


def test_the_toolkits_budgets_register_themselves() -> None:
    for name, module in BUDGETS.items():
        kind = budget_class(name)
        assert (kind.name, kind.__module__) == (name, module)
        assert kind.units
        assert "50%" in kind.example or "30%" in kind.example


def test_the_page_makes_a_budget_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompressorError, match="'channels' is not a budget"):
        parse_named_budget("channels<=50%")
    plugins.load_plugins.cache_clear()
    installed(tmp_path, "mypackage", "mychannels", code_of("Add a budget"))
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    space = PruningSpace(model.eval(), torch.zeros(1, 3, 8, 8))
    specs = [parse_named_budget(text) for text in ("channels<=50%",)]
    (budget,) = resolve(specs, space)
    assert (budget.name, budget.dense, budget.target) == ("channels", 20.0, 10.0)
    assert budget.kept(np.asarray([[4, 6], [4, 7]])).tolist() == [True, False]
    assert str(budget) == "channels <= 10 channels (50% of 20 channels)"
    assert dataclasses.replace(budget, target=9.0).target == 9.0  # type: ignore[type-var]
    reachable([budget], space)
    assert parse_named_budget("channels<=0.3k").value == 300
    with pytest.raises(CompressorError, match=r"channels<=VALUE with a value such as 300") as caught:
        parse_named_budget("channels<=5 MB")
    assert "'MB'" in caught.value.message


def test_a_run_keeps_a_registered_budget(tmp_path: Path) -> None:
    installed(tmp_path, "mypackage", "mychannels", code_of("Add a budget"))
    command = "from compressor.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--model", "tests.nets:tiny", "--budget", "channels<=50%", "--dry-run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Budget channels: at most" in done.stdout


def test_the_case_of_a_unit_is_ignored() -> None:
    @register_budget
    @dataclass(frozen=True)
    class Power(Plain):
        name: str = "power"
        units: ClassVar[Mapping[str, float]] = {"W": 1.0, "mW": 1e-3}

    for text, value in (("9mW", 0.009), ("9mw", 0.009), ("2W", 2.0), ("2w", 2.0)):
        assert parse_named_budget(f"power<={text}").value == pytest.approx(value)


def test_what_is_no_budget_is_refused() -> None:
    class NoDataclass(Budget):
        name = "x"

    @dataclass(frozen=True)
    class Taken(Plain):
        name: str = "latency"

    @dataclass(frozen=True)
    class Nameless(Plain):
        name: str = "a b"

    @dataclass
    class Thawed(Budget):
        target: float
        dense: float
        name: str = "thawed"

    @dataclass(frozen=True)
    class Untargeted(Budget):
        dense: float
        name: str = "untargeted"

    @dataclass(frozen=True)
    class Speechless(Budget):
        target: float
        dense: float
        name: str = "speechless"

    @dataclass(frozen=True)
    class Ambiguous(Plain):
        name: str = "ambiguous"
        units: ClassVar[Mapping[str, float]] = {"mW": 1e-3, "MW": 1e6}

    assert register_budget(Plain) is Plain
    register_budget(Plain)  # the same class once more, as after a reload
    for kind, says in (
        (int, "not a dataclass derived from Budget"),
        (NoDataclass, "not a dataclass"),
        (Taken, "is taken by compressor.budgets.costs:LatencyBudget"),
        (Nameless, "has the name 'a b'"),
        (Thawed, "Thawed is not frozen"),
        (Untargeted, "Untargeted has no field 'target'"),
        (Speechless, "Speechless has no method 'predict'"),
        (Ambiguous, "differ in case only: 'mW', 'MW'"),
    ):
        with pytest.raises(CompressorError, match=says):
            register_budget(kind)  # type: ignore[type-var]
