"""Several limits of one budget in a recipe."""

from __future__ import annotations

import pytest

from compressor.core.errors import CompressorError
from compressor.recipe import Budgets, Recipe, parse_recipe
from compressor.recipe.targets import targets


def listed(**budgets: object) -> list[tuple[str, dict[str, str], tuple[str, ...]]]:
    fields = Budgets.model_validate(budgets)
    return [(each.name, each.budgets.given(), each.budgets.functions) for each in targets(fields)]


def test_each_limit_is_a_network_and_a_single_one_applies_to_all() -> None:
    assert listed(latency="70%, 0.5x,5ms", params="60%") == [
        ("latency-70", {"latency": "70%", "params": "60%"}, ()),
        ("latency-0.5x", {"latency": "0.5x", "params": "60%"}, ()),
        ("latency-5ms", {"latency": "5ms", "params": "60%"}, ()),
    ]


def test_limits_of_two_budgets_go_together_and_functions_have_limits_too() -> None:
    assert listed(latency="70%,50%", functions=["my.costs:channels<=300,200", "other<=5"]) == [
        ("latency-70-channels-300", {"latency": "70%"}, ("my.costs:channels<=300", "other<=5")),
        ("latency-50-channels-200", {"latency": "50%"}, ("my.costs:channels<=200", "other<=5")),
    ]


def test_a_list_is_the_same_as_commas_and_survives_a_recipe_file() -> None:
    recipe = parse_recipe({"model": "resnet50", "budgets": {"flops": ["70%", "2G"]}}, "the test")
    assert recipe.budgets.flops == "70%,2G"
    assert recipe.several
    assert not Recipe(model="resnet50", budgets=Budgets(flops="70%")).several
    assert Recipe(model="resnet50", budgets=Budgets(max_drop=1)).several
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    schema = Recipe.model_json_schema()["$defs"]["Budgets"]["properties"]["latency"]
    assert "array" in str(schema)


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ({"latency": "70%,50%", "flops": "70%,60%,50%"}, "latency 2, flops 3"),
        ({"latency": "70%,,50%"}, "latency has an empty limit"),
        ({"latency": "70%,"}, "latency has an empty limit"),
        ({"latency": "50%,70%,50 %"}, "latency-50 is given twice"),
        ({"latency": "5ms,5MS"}, "latency-5ms is given twice"),
    ],
)
def test_limits_that_do_not_go_together_are_refused(budgets: dict[str, str], said: str) -> None:
    with pytest.raises(CompressorError, match=said):
        targets(Budgets(**budgets))  # type: ignore[arg-type]


def test_names_of_folders_stay_below_the_first() -> None:
    names = [name for name, *_ in listed(functions=["a:b<=../../x,/etc"])]
    assert names == ["b-..-..-x", "b--etc"]
