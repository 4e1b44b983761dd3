"""Compress a CNN until it keeps a budget that a device sets.

The public names are loaded when they are first used, so that `compress --help` need not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compressor.core.versions import __version__ as __version__

if TYPE_CHECKING:
    from compressor.budgets.base import register_budget
    from compressor.core.errors import CompressorError
    from compressor.latency.provider import register_device
    from compressor.latency.table import LatencyTable
    from compressor.pruning.artefact import load, save
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.rules import register_rule
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe
    from compressor.run.own import compress
    from compressor.run.pipeline import run_recipe
    from compressor.run.result import RunResult
    from compressor.search.base import register_agent

_HOMES = {
    "ChannelPlan": "compressor.pruning.plan",
    "CompressorError": "compressor.core.errors",
    "LatencyTable": "compressor.latency.table",
    "PruningSpace": "compressor.pruning.space",
    "Recipe": "compressor.recipe",
    "RunResult": "compressor.run.result",
    "compress": "compressor.run.own",
    "load": "compressor.pruning.artefact",
    "register_agent": "compressor.search.base",
    "register_budget": "compressor.budgets.base",
    "register_device": "compressor.latency.provider",
    "register_rule": "compressor.pruning.rules",
    "run_recipe": "compressor.run.pipeline",
    "save": "compressor.pruning.artefact",
}

__all__ = [
    "ChannelPlan",
    "CompressorError",
    "LatencyTable",
    "PruningSpace",
    "Recipe",
    "RunResult",
    "compress",
    "load",
    "register_agent",
    "register_budget",
    "register_device",
    "register_rule",
    "run_recipe",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
