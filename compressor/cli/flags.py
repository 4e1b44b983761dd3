"""Options of several commands, and the conversion of flags to a recipe."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.recipe import Recipe

TaskOption = Annotated[
    str | None, typer.Option(help="classification, segmentation or detection; by default that of the data.")
]
ImageSizeOption = Annotated[
    str | None, typer.Option(help="Height and width of an input in pixels: 224, or 96x128.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads inside one operator on this machine's CPU; by default 1.")
]
BatchOption = Annotated[
    int | None, typer.Option(help="Inputs of one run: the latency is that of the whole batch; by default 1.")
]
StreamsOption = Annotated[
    int | None, typer.Option(help="Copies of the network that run at the same time on the device; by default 1.")
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_DEEPEST = 8
"""Maximum number of parts in a field's dotted name; no recipe has as many levels."""


def overrides(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the given flags, nested as in the recipe."""
    given: dict[str, Any] = {}
    for name, value in flags.items():
        inside = overrides(value) if isinstance(value, dict) else value
        if inside is not None and inside != {}:
            given[name] = inside
    granularity = given.get("pruning", {}).get("granularity")
    if isinstance(granularity, str):
        given["pruning"]["granularity"] = number_or_text(granularity)
    if isinstance(size := given.get("image_size"), str):
        given["image_size"] = number_or_text(size)
    return given


def number_or_text(text: str) -> int | str:
    """Return a flag's whole number, or its text if it is not a number of reasonable size."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text


def with_settings(given: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Add `--set part.field=value`; the value is parsed as YAML."""
    from compressor.recipe.yaml_text import read_yaml

    for setting in settings:
        path, equals, text = setting.partition("=")
        *parts, last = ("data.source" if path == "data" else path).split(".")
        if not equals or not all((*parts, last)) or len(parts) >= _DEEPEST:
            raise CompressorError(
                f"--set {setting}: expected FIELD=VALUE.", "For example: --set training.batch_size=32"
            )
        value = read_yaml(text, f"--set {path}: the value {text!r}")
        place = given
        for part in parts:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise CompressorError(f"--set {setting}: {part!r} is not a part of the recipe.")
        place[last] = value
    return given


def recipe_of(name: str | None, given: dict[str, Any]) -> Recipe:
    from compressor.recipe import find_recipe, load_recipe, parse_recipe

    if name is None:
        return parse_recipe(given, "The command line")
    return load_recipe(find_recipe(name)).changed(given, "The command line")
