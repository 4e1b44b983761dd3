"""From the command line's flags to a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.recipe import Recipe


def overrides(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, nested as in the recipe."""
    given: dict[str, Any] = {}
    for name, value in flags.items():
        inside = overrides(value) if isinstance(value, dict) else value
        if inside is not None and inside != {}:
            given[name] = inside
    granularity = given.get("pruning", {}).get("granularity")
    if isinstance(granularity, str) and granularity.isdigit():
        given["pruning"]["granularity"] = int(granularity)
    return given


def with_settings(given: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Add `--set part.field=value`, whose value is read as YAML."""
    import yaml

    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip("."):
            raise CompressorError(
                f"--set {setting}: expected FIELD=VALUE.", "For example: --set training.batch_size=32"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise CompressorError(f"--set {setting}: the value is no YAML.", "Quote it.") from None
        *parts, last = path.split(".")
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
