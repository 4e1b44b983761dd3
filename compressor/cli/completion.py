"""Values that a shell completes: agents, devices, recipes and networks by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_MODELS = "models.json"
"""File in the cache folder: torchvision's networks, whose import takes seconds."""


def agents(incomplete: str) -> list[str]:
    """Return the agents whose names begin so."""
    from compressor.core.agents import registry

    return _beginning(incomplete, registry.names())


def devices(incomplete: str) -> list[str]:
    """Return the devices whose names begin so."""
    from compressor.latency.provider import known_devices

    return _beginning(incomplete, dict.fromkeys(entry.name for entry in known_devices()))


def boards(incomplete: str) -> list[str]:
    """Return the boards for which bundles are written whose names begin so."""
    from export.device.bundle import TARGETS

    return _beginning(incomplete, TARGETS)


def recipes(incomplete: str) -> list[str]:
    """Return the shipped recipes whose names begin so."""
    from compressor.recipe import shipped_recipes

    return _beginning(incomplete, shipped_recipes())


def models(incomplete: str) -> list[str]:
    """Return the networks whose names begin so, without timm's."""
    return _beginning(incomplete, _models())


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _models() -> list[str]:
    from compressor.core.errors import CompressorError
    from compressor.core.files import cache_folder, write_atomic

    try:
        installed = version("torchvision")
    except PackageNotFoundError:
        installed = ""
    path = cache_folder() / _MODELS
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["torchvision"] == installed:
            return [str(name) for name in known["names"]]
    from compressor.models.cifar import BUILDERS
    from compressor.models.names import torchvision_names

    names = [*BUILDERS, *torchvision_names(None)]
    with suppress(CompressorError):
        write_atomic(path, json.dumps({"torchvision": installed, "names": names}))
    return names
