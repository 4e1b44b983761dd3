"""The differences from the published methods follow from the settings, and their documentation with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.recipe import Recipe, load_recipe, shipped_recipes
from compressor.search.base import create_agent
from compressor.search.method import method

DOCS = Path(__file__).parents[2] / "docs" / "method" / "agents.md"


def compared(agent: str, settings: dict[str, Any], **search: Any) -> dict[str, dict[str, Any]]:
    """By setting, or by name if there is none, the parts of a method that the manifest names."""
    fields = {"model": "resnet18", "agent": agent, "search": {"settings": settings, **search}}
    recipe = Recipe.model_validate(fields).resolved()
    found = method(create_agent(agent, settings=recipe.search.settings), recipe, {})
    assert found is not None
    return {part["setting"] or part["part"]: part for part in found["parts"]}


def test_the_papers_recipe_differs_in_nothing() -> None:
    recipe = load_recipe(shipped_recipes()["joint/paper"]).resolved()
    found = method(create_agent("joint", settings=recipe.search.settings), recipe, {})
    assert found is not None
    assert [part["part"] for part in found["parts"] if not part["same"]] == []
    assert {part["part"] for part in found["parts"]} == {
        "environment model", "alignment of the weights", "training between the rounds of episodes"
    }  # fmt: skip


@pytest.mark.parametrize("agent", ["constrained", "stepwise"])
def test_the_papers_recipe_differs_in_what_cannot_be_set_only(agent: str) -> None:
    recipe = load_recipe(shipped_recipes()[f"{agent}/paper"]).resolved()
    found = method(create_agent(agent, settings=recipe.search.settings), recipe, {})
    assert found is not None
    other = [part for part in found["parts"] if not part["same"] and part["published"] != "not mentioned"]
    assert [(part["part"], part["here"]) for part in other] == [("what is removed", "whole channels")]


@pytest.mark.parametrize("agent", ["joint", "constrained", "stepwise"])
def test_every_default_that_differs_says_why_and_stands_in_the_documentation(agent: str) -> None:
    documented = DOCS.read_text(encoding="utf-8")
    for part in compared(agent, {}).values():
        setting = part["setting"]
        assert part["by"] == "default"
        if not part["same"] and setting not in ("", "weights"):
            assert part["why"]
            assert f"`{setting.removeprefix('search.settings.')}`" in documented


def test_the_recipes_own_choices_are_told_from_defaults() -> None:
    parts = compared("joint", {"near_share": 0.5, "entropy": 0.2}, context_size=0)
    assert parts["search.context_size"] == {
        "part": "environment model", "setting": "search.context_size", "here": "off", "published": "128",
        "same": False, "by": "recipe", "why": "", "effect": "",
    }  # fmt: skip
    assert (parts["search.settings.near_share"]["here"], parts["search.settings.near_share"]["by"]) == (
        "0.5",
        "recipe",
    )
    assert parts["search.settings.entropy"]["published"] == "0.1"
    assert parts["search.settings.warm_start"]["by"] == "default"
    assert "search.settings.tau" not in parts


@pytest.mark.parametrize("agent", ["uniform", "random", "knapsack"])
def test_agents_without_a_publication_have_no_comparison(agent: str) -> None:
    assert method(create_agent(agent), Recipe(model="resnet18", agent=agent).resolved(), {}) is None
