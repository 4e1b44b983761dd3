"""`compress recipes`: list the recipes that are shipped with the toolkit."""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.cli.flags import JsonOption
from compressor.cli.terminal import friendly, show, show_json


def recipes(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema with which editors check recipes.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the recipes that are shipped with the toolkit."""
    with friendly():
        from compressor.core.agents import AGENTS
        from compressor.core.tables import Table
        from compressor.recipe import load_recipe, recipe_schema, shipped_recipes

        if schema:
            show_json(recipe_schema())
            return
        columns = ("recipe", "model", "data", "device", "budget", "agent")
        tables = {False: Table(*columns), True: Table(*columns)}
        for name, path in shipped_recipes().items():
            entry, study = load_recipe(path), name.partition("/")[0] in AGENTS
            limits = ", ".join(f"{kind} {text}" for kind, text in entry.budgets.given().items())
            tables[study].add(name, entry.model, entry.data_kind, entry.device, limits, entry.agent)
        if json:
            show_json([{**each, "study": study} for study, table in tables.items() for each in table.records()])
            return
        show([tables[False], "", "Studies of the agents, which repeat published results (docs/results):", tables[True]])
