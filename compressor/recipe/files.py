"""Recipes in files: read from YAML, shipped with the toolkit, and found by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.files import read_text
from compressor.recipe.schema import Recipe
from compressor.recipe.validation import validated
from compressor.recipe.yaml_text import LARGEST_TEXT, read_yaml


def parse_recipe(fields: Mapping[str, Any], source: str) -> Recipe:
    """Validate the fields of a recipe.

    Raises:
        CompressorError: Names every invalid field with `source`, the value and what was expected.
    """
    return validated(Recipe, fields, source)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe's YAML file.

    Raises:
        CompressorError: The file is missing or not YAML, or a field is invalid (file and field are named).
    """
    if not path.exists():
        raise CompressorError(
            f"The recipe {path} does not exist.", "List the shipped ones with: compress recipes"
        )
    fields = read_yaml(read_text(path, "recipe", LARGEST_TEXT), f"The recipe {path}")
    if not isinstance(fields, dict):
        found = {type(None): "is empty", list: "holds a list"}.get(type(fields), f"holds {fields!r:.40}")
        raise CompressorError(f"The recipe {path} {found}, expected fields such as 'model: resnet50'.")
    return parse_recipe(fields, str(path))


def shipped(folder: str) -> Path:
    """Return the path of `recipes` or `latency_tables`: in the installed package, or beside it in a source tree."""
    here = Path(__file__).resolve().parent.parent
    inside = here / f"_{folder}"
    return inside if inside.is_dir() else here.parent / folder


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes: name -> file; those of a sub-folder are FOLDER/NAME and come last."""
    folder = shipped("recipes")
    found = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml")]
    return {
        path.as_posix(): folder / path.with_suffix(".yaml")
        for path in sorted(found, key=lambda path: (len(path.parts), path.as_posix()))
    }


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by a shipped one's name.

    Raises:
        CompressorError: There is none; the nearest names are given.
    """
    path = Path(name)
    if path.exists():
        return path
    known = shipped_recipes()
    wanted = name.removesuffix(".yaml")
    for candidate in (wanted, path.stem):
        if candidate in known:
            return known[candidate]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or sorted(known)[:5]
    raise CompressorError(
        f"There is no recipe {name!r}.", f"Nearest: {', '.join(near)}. All: compress recipes"
    )
