"""Budgets as people write them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compressor.budgets.base import BudgetSpec, budget_class, parse_budget, parse_named_budget
from compressor.budgets.function import FunctionBudget
from compressor.core.errors import CompressorError


@pytest.mark.parametrize(
    ("name", "text", "value", "relative"),
    [
        ("latency", "5ms", 5.0, False),
        ("latency", "800us", 0.8, False),
        ("latency", "0.5 s", 500.0, False),
        ("latency", "50%", 0.5, True),
        ("latency", "0.5x", 0.5, True),
        ("latency", "100%", 1.0, True),
        ("flops", "2G", 2e9, False),
        ("macs", "300 M", 3e8, False),
        ("flops", "1.5GFLOPs", 1.5e9, False),
        ("flops", "1e9 MACs", 1e9, False),
        ("params", "8M", 8e6, False),
        ("params", "500k", 5e5, False),
        ("energy", "5mJ", 5.0, False),
        ("energy", "0.02J", 20.0, False),
        ("energy", "300uJ", 0.3, False),
        ("energy", "50%", 0.5, True),
        ("memory", "20MB", 2e7, False),
        ("memory", "16MiB", 16 * 2**20, False),
    ],
)
def test_accepted_forms(name: str, text: str, value: float, relative: bool) -> None:
    spec = parse_budget(name, text)
    assert spec.value == pytest.approx(value)
    assert spec.relative is relative
    assert spec.name == ("macs" if name == "flops" else name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5", "has no unit"),
        ("-1ms", "not above zero"),
        ("0%", "not above zero"),
        ("0ms", "not above zero"),
        ("5 parsecs", "'parsecs'"),
        ("nan%", "not a finite number"),
        ("inf", "not a finite number"),
        ("-infms", "not a finite number"),
        ("1e999ms", "not a finite number"),
        ("150%", "more than the dense network"),
        ("1.5x", "more than the dense network"),
        ("5MB", "'MB'"),
        ("5,5ms", "',5ms'"),
        ("fast", "not understood"),
        ("", "not understood"),
        ("5ms 6ms", "not understood"),
        ("\uff15ms", "not understood"),  # digits of other scripts look like others than they are
        ("\u0665ms", "not understood"),
        ("0x10", "'x10'"),
        ("1_000ms", "'_000ms'"),
    ],
)
def test_refused_forms_name_the_accepted_ones(text: str, says: str) -> None:
    with pytest.raises(CompressorError) as caught:
        parse_budget("latency", text)
    assert says in caught.value.message
    if "%" not in text and "x" not in text:
        assert "5ms" in caught.value.hint
        assert "50%" in caught.value.hint


def test_unknown_budget_names_the_known_ones() -> None:
    with pytest.raises(CompressorError, match=r"latency.*params.*memory"):
        parse_budget("speed", "5mJ")


def test_function_budget() -> None:
    spec = parse_named_budget("my.costs:energy<=3.5")
    assert spec == BudgetSpec("my.costs:energy", 3.5, False, "my.costs:energy<=3.5")
    assert spec.is_function
    assert parse_named_budget("my.costs:energy <= 50%").relative


@pytest.mark.parametrize(
    "text", ["energy<=3", "my.costs:energy", "my.costs:energy<3", "my.costs:energy<=-1", "a:b<=5ms"]
)
def test_refused_function_budgets(text: str) -> None:
    with pytest.raises(CompressorError, match=r"package\.module:function<=VALUE"):
        parse_named_budget(text)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("latency", 4.321, "4.32 ms"),
        ("latency", 1500.0, "1.5 s"),
        ("macs", 1.3e9, "1.3 GMACs"),
        ("params", 23.5e6, "23.5 M"),
        ("memory", 2e7, "20 MB"),
        ("params", 12.0, "12"),
        ("costs:energy", 3.25, "3.25"),
    ],
)
def test_values_are_written_for_people(name: str, value: float, text: str) -> None:
    kind = FunctionBudget if ":" in name else budget_class(name)
    assert kind.format(value) == text


def test_parsing_needs_neither_numpy_nor_torch() -> None:
    code = "import sys, compressor.budgets.base; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
