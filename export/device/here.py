"""What can time a network on the GPU of this machine, and which of it is taken.

A back end counts only if a GPU answers. Taken is the first of: TensorRT through Python, trtexec, TensorRT-RTX,
TensorRT inside ONNX Runtime; `$COMPRESSOR_BACKEND` names another one, `onnxruntime-cpu` among them. ONNX Runtime's own
CUDA kernels are taken only where they are named so.
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
"""Names that tables use; trtexec and the Python module are the same TensorRT."""

USUAL = Path("/usr/src/tensorrt/bin/trtexec")
_RTX_GPUS = ("7.5", "8.0", "8.6", "8.9")


@dataclass(frozen=True)
class Backend:
    """A way to time networks on this machine's GPU.

    Attributes:
        kind: One of those above.
        version: Of the runtime.
        gpu: What answers.
    """

    kind: str
    version: str
    gpu: Device

    @property
    def runtime(self) -> str:
        """The name that tables use."""
        return RUNTIMES.get(self.kind, self.kind)


def available_backends(gpu: Device) -> dict[str, Callable[[], str]]:
    """What is installed that can use `gpu`, in the order of preference: kind -> its version."""
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
    """trtexec by `$TRTEXEC`, at its usual place, or on the path."""
    given = os.environ.get("TRTEXEC", "")
    for candidate in (given, str(USUAL), shutil.which(TRTEXEC) or ""):
        if candidate and os.access(candidate, os.X_OK) and Path(candidate).is_file():
            return Path(candidate)
    return None


def trtexec_version(program: Path) -> str:
    """TensorRT's version as the script for devices finds it.

    Raises:
        ExportError: it is not found out.
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
            f"The version of {program} is not found out.",
            f"Set TRT_VERSION, such as 8.5.2, or take the CPU: export COMPRESSOR_BACKEND={CPU}",
        )
    return version


@functools.lru_cache(maxsize=1)
def gpu_backend() -> Backend | None:
    """What times networks on this machine's GPU; None where that is left to its CPU.

    Raises:
        ExportError: `$COMPRESSOR_BACKEND` names one that is not here, or trtexec's version is not found out.
    """
    wanted = os.environ.get("COMPRESSOR_BACKEND", "")
    if wanted == CPU:
        return None
    gpu = find_device()
    found = available_backends(gpu) if gpu is not None else {}
    if wanted and wanted not in found:
        there = ", ".join([*found, CPU])
        why = "no GPU answers" if gpu is None else f"here are {there}"
        raise ExportError(
            f"COMPRESSOR_BACKEND={wanted} cannot be used: {why}.", f"Set it to one of {there}, or unset it."
        )
    kind = wanted or next((each for each in found if each != ORT_CUDA), "")
    return Backend(kind, found[kind](), gpu) if gpu is not None and kind else None
