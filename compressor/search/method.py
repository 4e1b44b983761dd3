"""Compare a search with its agent's published method, and list the recipe's settings that have no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compressor.search.base import IDLE, Agent, Published
from compressor.search.joint_settings import ENVIRONMENT_MODEL
from compressor.search.records import SearchResult
from compressor.search.schedule import JOINT_EPOCHS_TO_LEARN, epochs_until

if TYPE_CHECKING:
    from compressor.recipe import Recipe

_JOINT_FIELDS = ("align", "align_weight", "context_size")


def without_effect(agent: Agent, recipe: Recipe) -> Iterator[str]:
    """Yield sentences on enabled parts of the method that are idle, and on settings without effect."""
    if idle := agent.idle():
        parts = "; ".join(f"the {part} ({reason})" for part, reason in idle.items())
        yield f"Idle in this search, though on: {parts}.{_more_epochs(agent, recipe)}"
    unread = list(_unread(agent, recipe))
    if unread:
        yield f"Without effect here: {'; '.join(f'{name} ({reason})' for name, reason in unread)}."


def never_acted(agent: Agent, result: SearchResult) -> Iterator[str]:
    """Yield a sentence if a part could have acted, but a limit ended the search first."""
    foreseen = agent.idle()
    for part, effect in agent.effects(result).items():
        if effect.startswith(IDLE) and part not in foreseen:
            yield f"The {part} was {effect}. A limit of the search (max_evaluations, max_seconds) came first."


def _more_epochs(agent: Agent, recipe: Recipe) -> str:
    """Say how many epochs the environment model needs, if it is idle for lack of epochs."""
    if ENVIRONMENT_MODEL not in agent.idle() or agent.schedule.joint >= JOINT_EPOCHS_TO_LEARN:
        return ""
    share = float(recipe.search.epochs_share or 0)
    epochs = epochs_until(JOINT_EPOCHS_TO_LEARN, share, pretrained=recipe.pretrained)
    if epochs is None:
        return (
            f" The environment model needs {JOINT_EPOCHS_TO_LEARN} joint epochs: give the search a share of the epochs "
            "(--set search.epochs_share=0.5)."
        )
    return (
        f" The environment model needs {JOINT_EPOCHS_TO_LEARN} joint epochs: with {share:.3g} of the epochs for the "
        f"search, --epochs {epochs} or more."
    )


def _unread(agent: Agent, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield fields that differ from their defaults and that this search does not read, with the reason."""
    if not agent.trains_jointly:
        fields = type(recipe.search).model_fields
        for name in _JOINT_FIELDS:
            if getattr(recipe.search, name) != fields[name].default:
                yield f"search.{name}", f"only the joint agent reads it, and this one is {agent.name}"
    elif recipe.search.align != "tensor" and not recipe.search.align_weight:
        yield "search.align", "search.align_weight is 0"
    rates, (search_rate, finetune_rate) = recipe.training, recipe.usual_rates
    if rates.one_schedule:
        if rates.finetune_learning_rate not in (None, finetune_rate):
            yield "training.finetune_learning_rate", "training.one_schedule has learning_rate for both"
    elif not agent.schedule.total and rates.learning_rate not in (None, search_rate):
        reason = "the search trains no epochs; fine-tuning has training.finetune_learning_rate"
        yield "training.learning_rate", reason
    reasons = agent.unread_settings()
    for name, field in agent.Settings.model_fields.items():
        if name in reasons and getattr(agent.settings, name) != field.default:
            yield f"search.settings.{name}", reasons[name]


def method(agent: Agent, recipe: Recipe, effects: Mapping[str, str]) -> dict[str, Any] | None:
    """Compare an agent's search with its publication, for the manifest; None for agents without one.

    Args:
        agent: Agent with its settings.
        recipe: Resolved recipe of the agent.
        effects: What each part has done in the search, as a clause.

    Returns:
        `source`, and `parts`: for each `part` its `setting`, the values `here` and `published` in words, whether they
        are the `same`, what set it (`by`: "default" or "recipe"), `why` the default differs, and its `effect`. Parts
        that agree are left out unless they are important.
    """
    if not agent.published:
        return None
    parts = []
    for each in agent.published:
        value, default = _value(each, agent, recipe)
        same = each.agrees(value)
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
    """Format a setting's value for the report."""
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
    """Return a part's value in this search, and its default."""
    if not each.setting:
        return each.here, each.here
    if not _full_name(each.setting).startswith("search.settings."):
        part: Any = recipe
        *path, name = each.setting.split(".")
        for step in path:
            part = getattr(part, step)
        default = each.default if each.default is not None else type(part).model_fields[name].default
        value = getattr(part, name)
        return (default if value == "auto" else value), default
    return getattr(agent.settings, each.setting), agent.Settings.model_fields[each.setting].default
