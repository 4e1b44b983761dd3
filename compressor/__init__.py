"""Compress a CNN until it keeps a budget that a device sets.

The public names are loaded when they are first used, so that `compress --help` need not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.errors import CompressorError
    from compressor.latency.table import LatencyTable
    from compressor.pipeline import RunResult, compress
    from compressor.pruning.artefact import load, save
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    "ChannelPlan": "compressor.pruning.plan",
    "CompressorError": "compressor.errors",
    "LatencyTable": "compressor.latency.table",
    "PruningSpace": "compressor.pruning.space",
    "Recipe": "compressor.recipe",
    "RunResult": "compressor.pipeline",
    "compress": "compressor.pipeline",
    "load": "compressor.pruning.artefact",
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
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
