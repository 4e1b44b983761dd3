"""The agents by name: those of the toolkit, and those that other packages register."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from compressor.core.errors import CompressorError
from compressor.core.plugins import load_plugins

if TYPE_CHECKING:
    from compressor.search.base import Agent

    _Class = TypeVar("_Class", bound=type[Agent])

AGENTS: Mapping[str, str] = {
    "joint": "compressor.search.joint.agent",
    "constrained": "compressor.search.constrained.agent",
    "knapsack": "compressor.search.knapsack",
    "stepwise": "compressor.search.stepwise",
    "uniform": "compressor.search.uniform",
    "random": "compressor.search.random_plans",
}
"""The toolkit's own agents: name -> module, imported when the agent is used; listing the names costs nothing."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_registered: dict[str, type[Agent]] = {}


def register_agent(kind: _Class) -> _Class:
    """Register a subclass of `Agent` under its `name`; a class decorator.

    A class that is defined anew in its own module (in a notebook, by a reload) takes its own place.

    Raises:
        CompressorError: it is no subclass of `Agent`, its `name` or `Settings` is missing or unusable, or another class
            has the name.
    """
    from compressor.search.base import Agent

    called = getattr(kind, "__qualname__", repr(kind))
    if not (isinstance(kind, type) and issubclass(kind, Agent)):
        raise CompressorError(f"{called} is no subclass of Agent.", "Derive it from compressor.search.base.Agent.")
    name, settings = getattr(kind, "name", None), getattr(kind, "Settings", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CompressorError(
            f"The agent {called} has the name {name!r}.",
            "Give the class an attribute `name` of letters, digits, _, . and -, beginning with a letter.",
        )
    if not dataclasses.is_dataclass(settings):
        raise CompressorError(
            f"The agent {called} has no settings.",
            "Give the class an attribute `Settings`: a dataclass whose fields have defaults, or `NoSettings`.",
        )
    if name in AGENTS and kind.__module__ != AGENTS[name]:
        agent_class(name)  # imported now, so that it is there to be named
    if (other := _registered.get(name)) is not None and _place(other) != _place(kind):
        raise CompressorError(
            f"The agent name {name!r} of {_place(kind)} is taken by {_place(other)}.",
            f"Give the attribute `name` of {called} another value.",
        )
    _registered[name] = kind
    return kind


def agent_names() -> list[str]:
    """All names: the toolkit's own, then those that plugins and imported modules have registered."""
    load_plugins()
    return list(dict.fromkeys([*AGENTS, *sorted(_registered)]))


def agent_class(name: str) -> type[Agent]:
    """The class of the agent called `name`.

    Raises:
        CompressorError: there is none; the nearest names are given.
    """
    if name in AGENTS:
        import_module(AGENTS[name])
    else:
        load_plugins()
    if name not in _registered:
        known = agent_names()
        near = get_close_matches(name, known, n=2, cutoff=0.5) or known
        raise CompressorError(
            f"There is no agent called {name!r}.",
            f"Did you mean: {', '.join(near)}? An agent of your own is registered by importing its module "
            "(docs/architecture.md).",
        )
    return _registered[name]


def create_agent(name: str, **options: Any) -> Agent:
    """The agent called `name`, with the arguments of `Agent`."""
    return agent_class(name)(**options)


def _place(kind: type[Agent]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
