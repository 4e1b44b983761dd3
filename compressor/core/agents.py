"""The agents by name: those of the toolkit, and those that other packages register."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.plugins import Registry

AGENTS: Mapping[str, str] = {
    "joint": "compressor.search.joint",
    "constrained": "compressor.search.constrained",
    "knapsack": "compressor.search.knapsack",
    "stepwise": "compressor.search.stepwise",
    "uniform": "compressor.search.uniform",
    "random": "compressor.search.random_plans",
}
"""The toolkit's own agents: name -> module."""

registry: Registry[Any] = Registry("agent", AGENTS)
"""All agents; `compressor.register_agent` adds to them."""


def agent_class(name: str) -> type[Any]:
    """Return the class of an agent.

    Raises:
        CompressorError: There is no agent of this name; the nearest names are given.
    """
    found = registry.find(name)
    if found is None:
        known = registry.names()
        near = get_close_matches(name, known, n=2, cutoff=0.5) or known
        raise CompressorError(
            f"There is no agent called {name!r}.",
            f"Did you mean: {', '.join(near)}? An agent of your own is registered by importing its module "
            "(docs/architecture.md).",
        )
    return found
