"""Finds the backends that can time a network on this machine's GPU, and selects one.

Backends need a GPU. The first of these is selected: TensorRT's Python module, trtexec, TensorRT-RTX, ONNX Runtime's
TensorRT provider. `$COMPRESSOR_BACKEND` selects another one, such as `onnxruntime-cpu`; it is the only way to select
ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.convert.ort import runtime
from export.engine.cuda import Device, find_device
from export.engine.trt import RTX, TENSORRT, load
from export.errors import ExportError

CPU = "onnxruntime-cpu"
TRTEXEC = "trtexec"
ORT_TENSORRT, ORT_CUDA = "onnxruntime-tensorrt", "onnxruntime-cuda"
PROVIDERS = {ORT_TENSORRT: "TensorrtExecutionProvider", ORT_CUDA: "CUDAExecutionProvider"}
RUNTIMES = {TENSORRT: "tensorrt", TRTEXEC: "tensorrt", RTX: "tensorrt-rtx"}
"""Runtime names in latency tables; trtexec and the Python module are the same TensorRT."""

USUAL = Path("/usr/src/tensorrt/bin/trtexec")
_RTX_GPUS = ("7.5", "8.0", "8.6", "8.9")


@dataclass(frozen=True)
class Backend:
    """A way to time networks on this machine's GPU.

    Attributes:
        kind: One of the constants above.
        version: Version of the runtime.
        gpu: The GPU of this machine.
    """

    kind: str
    version: str
    gpu: Device

    @property
    def runtime(self) -> str:
        """The runtime's name in latency tables."""
        return RUNTIMES.get(self.kind, self.kind)


def available_backends(gpu: Device) -> dict[str, Callable[[], str]]:
    """The installed backends that support `gpu`, in order of preference: kind -> function that returns its version."""
    found: dict[str, Callable[[], str]] = {}
    for module in (TENSORRT, RTX):
        try:
            _, flavour = load(module)
        except ExportError:
            continue
        if module == TENSORRT or gpu.compute_capability in _RTX_GPUS or gpu.major >= 12:
            found[module] = functools.partial(str, flavour.version)
    if (program := find_trtexec()) is not None:
        found[TRTEXEC] = functools.partial(trtexec_version, program)
    onnxruntime = runtime()
    for kind, provider in PROVIDERS.items():
        if provider in onnxruntime.get_available_providers():
            found[kind] = functools.partial(str, onnxruntime.__version__)
    return {kind: found[kind] for kind in (TENSORRT, TRTEXEC, RTX, ORT_TENSORRT, ORT_CUDA) if kind in found}


def find_trtexec() -> Path | None:
    """Find trtexec by `$TRTEXEC`, in its usual folder, or on the path."""
    given = os.environ.get("TRTEXEC", "")
    for candidate in (given, str(USUAL), shutil.which(TRTEXEC) or ""):
        if candidate and os.access(candidate, os.X_OK) and Path(candidate).is_file():
            return Path(candidate)
    return None


def trtexec_version(program: Path) -> str:
    """TensorRT's version, as `identify_on_device.sh` finds it.

    Raises:
        ExportError: the version cannot be determined.
    """
    from export.device.bundle import device_script

    done = subprocess.run(
        ["sh", "-s"],
        input=device_script("identify_on_device.sh"),
        env={**os.environ, "TRTEXEC": str(program)},
        capture_output=True,
        check=False,
    )
    lines = [line.partition("=") for line in done.stdout.decode("utf-8", errors="replace").splitlines()]
    version = next((value for name, _, value in lines if name == "tensorrt"), "")
    if done.returncode or not version:
        raise ExportError(
            f"The version of {program} cannot be determined.",
            f"Set TRT_VERSION, such as 8.5.2, or use the CPU: export COMPRESSOR_BACKEND={CPU}",
        )
    return version


@functools.lru_cache(maxsize=1)
def gpu_backend() -> Backend | None:
    """The backend that times networks on this machine's GPU; None to time them on the CPU.

    Raises:
        ExportError: `$COMPRESSOR_BACKEND` names an unavailable backend, or trtexec's version cannot be determined.
    """
    wanted = os.environ.get("COMPRESSOR_BACKEND", "")
    if wanted == CPU:
        return None
    gpu = find_device()
    found = available_backends(gpu) if gpu is not None else {}
    if wanted and wanted not in found:
        there = ", ".join([*found, CPU])
        why = "no GPU was found" if gpu is None else f"this machine has {there}"
        raise ExportError(
            f"COMPRESSOR_BACKEND={wanted} cannot be used: {why}.", f"Set it to one of {there}, or unset it."
        )
    kind = wanted or next((each for each in found if each != ORT_CUDA), "")
    return Backend(kind, found[kind](), gpu) if gpu is not None and kind else None
