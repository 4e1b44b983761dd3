"""The recipe: a frozen, validated description of a whole run.

A recipe is read from YAML or built from flags, and its fields are the documentation of both. `resolved()`
fills in what depends on other fields, so that the `recipe.yaml` of a run's folder repeats the run.
"""

from compressor.recipe.files import find_recipe, load_recipe, parse_recipe, shipped, shipped_recipes
from compressor.recipe.parts import (
    AgentSettings,
    Budgets,
    Contract,
    Data,
    Export,
    NoSettings,
    Pruning,
    RewardWeights,
    Search,
    Training,
)
from compressor.recipe.schema import AgentName, Recipe, recipe_schema

__all__ = [
    "AgentName",
    "AgentSettings",
    "Budgets",
    "Contract",
    "Data",
    "Export",
    "NoSettings",
    "Pruning",
    "Recipe",
    "RewardWeights",
    "Search",
    "Training",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_schema",
    "shipped",
    "shipped_recipes",
]
