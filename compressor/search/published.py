"""What an agent's published method has for each setting, and where a search departs from it, by whose choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from compressor.search.base import Agent


@dataclass(frozen=True)
class Published:
    """One part of a method, as its publication has it.

    Attributes:
        part: what it is, in words.
        setting: a field of the agent's settings, or a dotted one of the recipe ("search.align"); "" where nothing can
            be set.
        value: what the publication has; where that is a range, its lower end.
        most: the range's upper end; None where it is none.
        mentioned: whether the publication speaks of it; else `value` is how the method works without it.
        why: why this toolkit's default is another.
        here: what is done instead, where nothing can be set.
        default: this toolkit's default, for fields that are filled in by others; None for the field's own.
        named: whether the page names it also where it is as published.
    """

    part: str
    setting: str
    value: Any
    most: Any = None
    mentioned: bool = True
    why: str = ""
    here: str = ""
    default: Any = None
    named: bool = False

    def agrees(self, value: Any) -> bool:
        """Whether a value is the published one."""
        if self.most is not None:
            return bool(self.value <= value <= self.most)
        return bool(value == self.value)


def method(agent: Agent, recipe: Recipe, effects: Mapping[str, str]) -> dict[str, Any] | None:
    """How an agent's search compares with its publication, for the manifest; None for agents without one.

    Args:
        agent: with its settings.
        recipe: the resolved one that it was made from.
        effects: by part, what it has done in the search, in a clause.

    Returns:
        `source`, and `parts`: for each `part` its `setting`, the values `here` and `published` in words, whether they
        are the `same`, by whose choice it is as it is (`by`: "default" or "recipe"), `why` the default is another
        one, and its `effect`. Parts that agree are left out where nobody would look for them.
    """
    if not agent.published:
        return None
    parts = []
    for each in agent.published:
        value, default = _value(each, agent, recipe)
        same = bool(each.setting) and each.agrees(value)
        if same and not each.named:
            continue
        by = "default" if value == default else "recipe"
        parts.append(
            {
                "part": each.part,
                "setting": _full_name(each.setting),
                "here": "off" if each.named and not value else in_words(value),
                "published": _published(each),
                "same": same,
                "by": by,
                "why": each.why if by == "default" and not same else "",
                "effect": effects.get(each.part, ""),
            }
        )
    return {"source": agent.source, "parts": parts}


def in_words(value: Any) -> str:
    """A setting's value as the page prints it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "all"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(in_words, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _published(each: Published) -> str:
    if not each.mentioned:
        return "not mentioned"
    words = in_words(each.value)
    return words if each.most is None else f"{words} to {in_words(each.most)}"


def _full_name(setting: str) -> str:
    return (
        f"search.settings.{setting}" if setting and "." not in setting and setting != "weights" else setting
    )


def _value(each: Published, agent: Agent, recipe: Recipe) -> tuple[Any, Any]:
    """A part's value in this search, and by default."""
    if not each.setting:
        return each.here, each.here
    if not _full_name(each.setting).startswith("search.settings."):
        part: Any = recipe
        *path, name = each.setting.split(".")
        for step in path:
            part = getattr(part, step)
        default = each.default if each.default is not None else type(part).model_fields[name].default
        return getattr(part, name), default
    kinds = {field.name: field for field in dataclasses.fields(agent.settings)}
    return getattr(agent.settings, each.setting), kinds[each.setting].default
