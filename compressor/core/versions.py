"""Versions of packages and properties of the machine, recorded for each run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


PACKAGES = (
    "torch", "torchvision", "torch-pruning", "onnx", "onnxruntime", "stable-baselines3", "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of the toolkit, Python, and the installed ones of `PACKAGES`."""
    found = {"compressor": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores, and the operating system."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}


def cpu_name() -> str:
    """Return the processor's name, such as `Intel(R) Xeon(R) Processor`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    values = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    return values.get("model name") or values.get("Model") or platform.processor() or platform.machine()
