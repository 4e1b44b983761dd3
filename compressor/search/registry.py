"""The agents by name. Another one is one file with a subclass of `Agent`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.search.base import Agent

AGENTS: Mapping[str, str] = {
    "joint": "compressor.search.joint.agent:JointAgent",
    "constrained": "compressor.search.constrained.agent:ConstrainedAgent",
    "knapsack": "compressor.search.knapsack:KnapsackAgent",
    "stepwise": "compressor.search.stepwise:StepwiseAgent",
    "uniform": "compressor.search.uniform:UniformAgent",
    "random": "compressor.search.random_plans:RandomAgent",
}
"""Name on the command line to "module:class"; imported when used, so that listing the names costs nothing."""


def agent_class(name: str) -> type[Agent]:
    """The class of the agent called `name`.

    Raises:
        CompressorError: there is none; the nearest names are given.
    """
    if name not in AGENTS:
        near = get_close_matches(name, AGENTS, n=2, cutoff=0.5) or list(AGENTS)
        raise CompressorError(f"There is no agent called {name!r}.", f"Did you mean: {', '.join(near)}?")
    module, attribute = AGENTS[name].split(":")
    return cast("type[Agent]", getattr(import_module(module), attribute))


def create_agent(name: str, **options: Any) -> Agent:
    """The agent called `name`, with the arguments of `Agent`."""
    return agent_class(name)(**options)
