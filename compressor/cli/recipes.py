"""`compress recipes`: list the recipes that are shipped with the toolkit."""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.cli.terminal import friendly, show, stdout


def recipes(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema with which editors check recipes.")
    ] = False,
) -> None:
    """List the recipes that are shipped with the toolkit."""
    with friendly():
        import json

        from rich.table import Table

        from compressor.recipe import load_recipe, recipe_schema, shipped_recipes

        if schema:
            stdout.write(json.dumps(recipe_schema(), indent=2) + "\n")
            raise typer.Exit
        table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
        for column in ("recipe", "model", "data", "device", "budget", "agent"):
            table.add_column(column, overflow="fold", no_wrap=column == "recipe")
        for name, path in shipped_recipes().items():
            entry = load_recipe(path)
            limits = ", ".join(f"{kind} {text}" for kind, text in entry.budgets.given().items())
            table.add_row(name, entry.model, entry.data_kind, entry.device, limits, entry.agent)
        show([table])
