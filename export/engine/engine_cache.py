"""A cache of built engines.

A build takes seconds to minutes, and resumed or repeated exports build the same file again. The key covers the
ONNX file's bytes, the TensorRT product and version, the GPU and all settings. A cached engine whose checksum does
not match is built again.
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
    """Copy an engine from the cache, or build it and add it; return its facts and whether it was cached.

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
    """The cache key of an engine: a checksum of everything that determines it.

    Raises:
        ExportError: no module is installed, or it cannot build for the requested GPU.
    """
    _, flavour = load(module)
    device = find_device()
    facts = {
        "format": FORMAT,
        "onnx": sha256_bytes(content),
        "module": flavour.module,
        "version": flavour.version,
        "capabilities": target_capabilities(flavour, compute_capability, device),
        # TensorRT tunes an engine for one GPU model, TensorRT-RTX for a generation
        "device": device.name if device is not None and not flavour.rtx else "",
        "settings": settings.to_dict(),
    }
    return sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:32]


def _read(kept: Path) -> EngineInfo | None:
    """The facts of a cached engine; None where it is missing or damaged."""
    if not kept.is_file():
        return None
    try:
        return read_sidecar(kept)
    except ExportError:
        return None
