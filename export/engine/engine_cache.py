"""Engines that were built before, found again by everything that decides what an engine is.

A build takes seconds to minutes, and the same file is built again whenever a run is resumed or exported
once more. The key covers the ONNX file's bytes, the product and its version, the GPU and every setting;
what is found is checked against its checksum and built anew where it was damaged.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from export.engine.build_settings import BuildSettings, Capabilities, target_capabilities
from export.engine.cuda import find_device
from export.engine.engine import build_engine
from export.engine.engine_info import EngineInfo, read_sidecar, write_sidecar
from export.engine.trt import load
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

FORMAT = 1


def cached_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    cache: str | Path,
    *,
    module: str | None = None,
    compute_capability: Capabilities = None,
    settings: BuildSettings | None = None,
    timing_cache: str | Path | None = None,
) -> tuple[EngineInfo, bool]:
    """An engine from the cache, or a new one that is then kept there; and whether it was found.

    Args:
        cache: Folder of the cache.
        onnx_path, engine_path, module, compute_capability, settings, timing_cache: As in `build_engine`.

    Raises:
        ExportError: as `build_engine`.
    """
    source, target = Path(onnx_path), Path(engine_path)
    wanted = settings or BuildSettings()
    key = engine_key(read_bytes(source, "ONNX file"), module, compute_capability, wanted)
    kept = Path(cache) / f"{key}.engine"
    found = _read(kept)
    if found is None:
        found = build_engine(
            source,
            kept,
            module=module,
            compute_capability=compute_capability,
            settings=wanted,
            timing_cache=timing_cache,
        )
        hit = False
    else:
        hit = True
    info = replace(found, engine=target.name, onnx=source.name)
    write_bytes(target, read_bytes(kept, "engine"))
    write_sidecar(info, target)
    return info, hit


def engine_key(
    content: bytes, module: str | None, compute_capability: Capabilities, settings: BuildSettings
) -> str:
    """The name under which an engine is kept: a checksum of all that decides what it is.

    Raises:
        ExportError: no module is installed, or it cannot build for what was asked.
    """
    _, flavour = load(module)
    device = find_device()
    facts = {
        "format": FORMAT,
        "onnx": sha256_bytes(content),
        "module": flavour.module,
        "version": flavour.version,
        "capabilities": target_capabilities(flavour, compute_capability, device),
        # a TensorRT engine is tuned for one model of GPU, an RTX engine for a generation
        "device": device.name if device is not None and not flavour.rtx else "",
        "settings": settings.to_dict(),
    }
    return sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:32]


def _read(kept: Path) -> EngineInfo | None:
    """What the cache has, unless it is missing or damaged."""
    if not kept.is_file():
        return None
    try:
        return read_sidecar(kept)
    except ExportError:
        return None
