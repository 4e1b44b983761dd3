"""The agents by name: those of the toolkit, and those that other packages register."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.plugins import load_plugins

AGENTS: Mapping[str, str] = {
    "joint": "compressor.search.joint",
    "constrained": "compressor.search.constrained",
    "knapsack": "compressor.search.knapsack",
    "stepwise": "compressor.search.stepwise",
    "uniform": "compressor.search.uniform",
    "random": "compressor.search.random_plans",
}
"""The toolkit's own agents: name -> module, imported when the agent is used; listing the names costs nothing."""

registered: dict[str, type[Any]] = {}
"""Classes by name; `compressor.register_agent` adds to them."""


def agent_names() -> list[str]:
    """Return all names: the toolkit's own, then those that plugins and imported modules have registered."""
    load_plugins()
    return list(dict.fromkeys([*AGENTS, *sorted(registered)]))


def agent_class(name: str) -> type[Any]:
    """Return the class of an agent.

    Raises:
        CompressorError: There is no agent of this name; the nearest names are given.
    """
    if name in AGENTS:
        import_module(AGENTS[name])
    else:
        load_plugins()
    if name not in registered:
        known = agent_names()
        near = get_close_matches(name, known, n=2, cutoff=0.5) or known
        raise CompressorError(
            f"There is no agent called {name!r}.",
            f"Did you mean: {', '.join(near)}? An agent of your own is registered by importing its module "
            "(docs/architecture.md).",
        )
    return registered[name]
