"""What this machine can do: its parts, its runtimes, its noise and its space, each with how to get what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder
from compressor.core.versions import cpu_name, versions
from compressor.report.formats import percent, size
from export.convert.ort import available_cores
from export.errors import ExportError

_EXTRAS = (
    ("timm", "timm", "networks named timm:NAME"),
    ("ray", "ray", "workers of a cluster"),
    ("mlflow", "mlflow", "--track mlflow"),
    ("wandb", "wandb", "--track wandb"),
    ("hub", "huggingface_hub", "compress push"),
)
"""Optional packages: the extra, its module, and what it is for."""
QUIET_SPREAD = 0.05
"""Spread of times up to which a machine counts as quiet."""
LITTLE_DISK_BYTES = 5e9
LITTLE_SHM_BYTES = 1e9


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        part: What was examined.
        state: "ok", "missing" (something optional is not here) or "warning" (it will disturb a run).
        found: What is here.
        advice: How to get what is missing; empty if nothing is.
    """

    part: str
    state: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Yield what was found, in the order of the report; measuring the noise takes some seconds."""
    from compressor.core.plugins import load_plugins

    load_plugins()
    yield from _software()
    yield from _gpu()
    yield from _runtimes()
    yield from _measurable()
    yield _noise()
    yield from _space()


def _software() -> Iterator[Finding]:
    import torch

    found, names = versions(), ("compressor", "python", "torch", "torchvision")
    yield Finding("software", "ok", ", ".join(f"{name} {found[name]}" for name in names if name in found))
    cores, available, threads = os.cpu_count() or 1, available_cores(), torch.get_num_threads()
    counted = f"{cores} core{'s' if cores > 1 else ''}{f' ({available} for this process)' if available < cores else ''}"
    counted += f", {threads} thread{'s' if threads > 1 else ''} of torch"
    yield Finding("CPU", "ok", f"{cpu_name()}, {counted}")
    for extra, module, what in _EXTRAS:
        if importlib.util.find_spec(module) is None:
            advice = f"For {what}: pip install 'compressor[{extra}]'"
            yield Finding(extra, "missing", "not installed", advice)
        else:
            yield Finding(extra, "ok", "installed")


def _gpu() -> Iterator[Finding]:
    import torch

    from export.engine.cuda import find_device

    gpu = find_device()
    if gpu is None:
        yield Finding("GPU", "missing", "none with an NVIDIA driver", "Networks are trained and timed on the CPU.")
        return
    facts = f"{gpu.name}, compute capability {gpu.compute_capability}, {size(gpu.memory)}, CUDA {gpu.driver} (driver)"
    yield Finding("GPU", "ok", facts)
    if torch.cuda.is_available():
        yield Finding("CUDA in torch", "ok", str(torch.version.cuda))
    else:
        advice = "Install a build of torch with CUDA: https://pytorch.org/get-started"
        yield Finding("CUDA in torch", "warning", "torch cannot use the GPU: training takes place on the CPU", advice)


def _runtimes() -> Iterator[Finding]:
    from export.convert.ort import runtime
    from export.device.here import find_trtexec, trtexec_version
    from export.engine.trt import RTX, TENSORRT, load

    onnxruntime = runtime()
    providers = ", ".join(onnxruntime.get_available_providers())
    yield Finding("ONNX Runtime", "ok", f"{onnxruntime.__version__} with {providers}")
    for module, title, extra, use in (
        (TENSORRT, "TensorRT", "tensorrt", "engines for this machine's GPU"),
        (RTX, "TensorRT-RTX", "rtx", "engines for RTX GPUs, built without one"),
    ):
        try:
            _, flavour = load(module)
        except ExportError as error:
            yield Finding(title, "missing", error.message.rstrip("."), f"For {use}: pip install 'compressor[{extra}]'")
        else:
            yield Finding(title, "ok", flavour.version)
    program = find_trtexec()
    if program is None:
        advice = "It comes with TensorRT; if it is in another place: TRTEXEC=/path/to/trtexec"
        yield Finding("trtexec", "missing", "not found", advice)
        return
    try:
        yield Finding("trtexec", "ok", f"{trtexec_version(program)} at {program}")
    except ExportError as error:
        yield Finding("trtexec", "warning", error.message, error.hint)


def _measurable() -> Iterator[Finding]:
    """Yield what `--device local` times, whether energy is counted, and whether engines are built."""
    from compressor.budgets.energy import counter_here
    from compressor.latency.provider import TableProvider, known_devices

    try:
        local = TableProvider.for_device("local")
        yield Finding("latency here", "ok", f"{local.title}, {local.runtime}, {', '.join(local.precisions)}")
    except (ExportError, CompressorError) as error:
        yield Finding("latency here", "warning", error.message, error.hint)
    try:
        yield Finding("energy here", "ok", counter_here().source)
    except (ExportError, CompressorError) as error:
        yield Finding("energy here", "missing", error.message, error.hint)
    names = {entry.name for entry in known_devices()} - {"local"}
    yield Finding("other devices", "ok", f"tables of {len(names)}: compress devices")


def _noise() -> Finding:
    from compressor.latency.machine import noise
    from compressor.latency.sampling import MAX_SPREAD

    found = noise()
    words = (
        f"times of a network: quartiles {percent(found.spread)} apart, {percent(found.interrupted, 0)} of its runs "
        f"interrupted (in {found.seconds:.0f} s)"
    )
    if found.spread <= QUIET_SPREAD:
        return Finding("noise", "ok", words)
    advice = "Close other programs while a latency is measured; small differences need longer."
    if found.spread > MAX_SPREAD:
        advice = "Latency cannot be measured now: wait until the machine is quiet."
    return Finding("noise", "warning", words, advice)


def _space() -> Iterator[Finding]:
    from compressor.data.decoded import LIMIT_BYTES, decoded_folder, kept

    for name, place in (("disk", Path.cwd()), ("cache", cache_folder())):
        there = place
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        advice = "Runs of large networks need gigabytes: compress clean, or --out on another disk."
        low = free < LITTLE_DISK_BYTES
        yield Finding(name, "warning" if low else "ok", f"{size(free)} free at {place}", advice if low else "")
    held = f"{size(sum(kept().values()))} of at most {size(LIMIT_BYTES)} in {decoded_folder()}"
    yield Finding("decoded images", "ok", held)
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < LITTLE_SHM_BYTES:
        advice = "Processes that read images share memory there; in a container: docker run --shm-size=8g"
        yield Finding("/dev/shm", "warning", f"{size(free)} free", advice)
