"""This machine: the backends that can time a network on its GPU, and the facts and state of its board.

Backends need a GPU. The first of these is selected: TensorRT's Python module, trtexec, TensorRT-RTX, ONNX Runtime's
TensorRT provider. `$COMPRESSOR_BACKEND` selects another one, such as `onnxruntime-cpu`; it is the only way to select
ONNX Runtime's CUDA provider.

A latency means little without the board's state: the power mode changes the latency of a Jetson by a factor of two to
four. It is read from files and from tools of JetPack; missing ones are left out, because a desktop has none of them.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

from export.convert.ort import runtime
from export.device.bundle import device_script
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
    """TensorRT's version, as the script for devices finds it.

    Raises:
        ExportError: the version cannot be determined.
    """
    done = subprocess.run(
        ["sh", "-s", "--", "--identify"],
        input=device_script(),
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


Run = Callable[[Sequence[str]], Optional[str]]


def run_tool(command: Sequence[str]) -> str | None:
    """The output of a tool, or None if it is missing, fails or takes longer than ten seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_board(root: Path = Path("/"), run: Run = run_tool) -> dict[str, Any]:
    """The facts of a board that do not change during a measurement.

    Args:
        root: Root of the file system; tests pass another folder.
        run: Runs a tool and returns its output.

    Returns:
        The known ones of machine, model, l4t, power_mode and gpu.
    """
    facts = {
        "machine": platform.machine(),
        "model": _text(root / "proc/device-tree/model"),
        "l4t": _text(root / "etc/nv_tegra_release"),
        "power_mode": power_mode(run),
        "gpu": run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
    }
    return {key: value for key, value in facts.items() if value}


def power_mode(run: Run = run_tool) -> str | None:
    """The name of the power mode, such as "MAXN" or "25W", or None without nvpmodel."""
    for line in (run(["nvpmodel", "-q"]) or "").splitlines():
        name, mark, value = line.partition(":")
        if mark and name.strip().endswith("Power Mode"):
            return value.strip()
    return None


def board_state(root: Path = Path("/"), run: Run = run_tool) -> dict[str, Any]:
    """The state that may change during a measurement: clocks in MHz and temperatures in Celsius, by name."""
    clocks = {}
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        hertz = _text(folder / "cur_freq")
        if hertz.isdigit():
            clocks[folder.name] = int(hertz) // 1_000_000
    emc = _text(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate")
    if emc.isdigit():
        clocks["emc"] = int(emc) // 1_000_000
    temperatures = {}
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, value = _text(folder / "type"), _text(folder / "temp")
        if name and value.lstrip("-").isdigit():
            temperatures[name] = int(value) / 1000
    state: dict[str, Any] = {}
    if clocks:
        state["clocks_mhz"] = clocks
    if temperatures:
        state["temperatures_c"] = temperatures
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu"
    smi = run(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    if smi:
        parts = [part.strip() for part in smi.splitlines()[0].split(",")]
        names = ("sm_mhz", "memory_mhz", "temperature_c")
        state["gpu"] = {name: int(part) for name, part in zip(names, parts) if part.isdigit()}
    return state


def board_lines(board: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Format the board's facts and its clocks and temperatures before and after as aligned lines."""
    rows = [(key.replace("_", " "), str(value)) for key, value in board.items()]
    units = {"clocks_mhz": "MHz", "temperatures_c": "C"}
    for group in ("clocks_mhz", "temperatures_c", "gpu"):
        for name, value in before.get(group, {}).items():
            later = after.get(group, {}).get(name, value)
            unit = units.get(group) or ("MHz" if name.endswith("_mhz") else "C")
            label = name.replace("_mhz", " clock").replace("_c", "") if group == "gpu" else name
            rows.append((label, f"{value:g} {unit}" if value == later else f"{value:g} -> {later:g} {unit}"))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _text(path: Path) -> str:
    """The text of a small file, or "" if it cannot be read: the files differ by board and user."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
    except OSError:
        return ""
