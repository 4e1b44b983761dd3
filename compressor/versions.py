"""What a run is made with: versions of packages, and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from compressor import __version__

PACKAGES = (
    "torch", "torchvision", "torch-pruning", "onnx", "onnxruntime", "stable-baselines3", "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of the toolkit, Python, and those of `PACKAGES` that are installed."""
    found = {"compressor": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Its processor, the number of cores, and the operating system."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()}


def _cpu() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
