"""What `benchmarks.on_gpu` runs: the reason, the expected time, the needs, the command and the result of each item.

Every item is one command of the toolkit or of another benchmark, which a user could type, with its files in the folder
of the study. The times are estimates by the numbers of networks, engines and training steps; none has been measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compressor.core.errors import CompressorError
from export.device.here import ORT_CUDA, available_backends
from export.engine.cuda import find_device
from export.engine.trt import RTX, TENSORRT
from export.errors import ExportError

CLEAN = (0,)
RAN = (0, 3, 4)
"""Exit codes of a run that ended, whatever became of its budgets."""
EPOCH_MINUTES = 0.2
"""Assumed time of an epoch of a ResNet-20 on CIFAR-10 on a GPU: 390 steps that launches limit."""

QUICK = ("--agent", "knapsack", "--epochs", "2", "--set", "search.max_evaluations=8")
"""Of runs whose latency or energy is in question, not their accuracy."""


@dataclass(frozen=True)
class Item:
    """Something that can only be measured with a GPU or on a board.

    Attributes:
        name: Its name; parts from general to special.
        reason: What it will say that is not known yet.
        minutes: Expected time; an estimate.
        needs: Keys of `NEEDS`.
        command: Program and arguments: `python` or `compress` first.
        found: Reads what it wrote; one line for the table.
        ends: Exit codes with which it has finished.
        run: Folder of a run of `compress` that the command begins, and a later call resumes.
        backend: Value of `COMPRESSOR_BACKEND`; empty for the preferred one.
    """

    name: str
    reason: str
    minutes: float
    needs: tuple[str, ...]
    command: tuple[str, ...]
    found: Callable[[], str]
    ends: tuple[int, ...] = CLEAN
    run: Path | None = None
    backend: str = ""

    @property
    def due(self) -> tuple[str, ...]:
        """The command of the next call: that of a run which was begun resumes it."""
        begun = self.run is not None and (self.run / "recipe.yaml").exists()
        return ("compress", "--resume", str(self.run)) if begun else self.command

    def typed(self, command: Sequence[str] | None = None) -> str:
        """Return a command as it is typed; by default the one that begins."""
        given = f"COMPRESSOR_BACKEND={self.backend} " if self.backend else ""
        return given + shlex.join(command or self.command)

    def missing(self, lacks: Mapping[str, str]) -> str:
        """Return what it needs and is not here, by what is missing of each need; empty if all is here."""
        return next((lacks[need] for need in self.needs if lacks[need]), "")


# ---------------------------------------------------------------- what is here
def _gpu(options: argparse.Namespace) -> str:
    return "" if find_device() is not None else "an NVIDIA GPU with its driver"


def _torch(options: argparse.Namespace) -> str:
    import torch

    return "" if torch.cuda.is_available() else "a torch that uses the GPU: https://pytorch.org/get-started"


def _backend(kind: str, how: str) -> Callable[[argparse.Namespace], str]:
    def lack(options: argparse.Namespace) -> str:
        gpu = find_device()
        return "" if gpu is not None and kind in available_backends(gpu) else how

    return lack


def _energy(options: argparse.Namespace) -> str:
    from compressor.budgets.energy import counter_here

    try:
        counter_here()
    except (CompressorError, ExportError) as error:
        return f"{error.message} {error.hint or ''}".strip()
    return ""


def _modelopt(options: argparse.Namespace) -> str:
    return "" if importlib.util.find_spec("modelopt") else "ModelOpt: pip install 'compressor[peers]'"


NEEDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "gpu": _gpu,
    "torch": _torch,
    "tensorrt": _backend(TENSORRT, "TensorRT's Python module: pip install 'compressor[tensorrt]'"),
    "rtx": _backend(RTX, "TensorRT-RTX and a GPU that it supports: pip install 'compressor[rtx]'"),
    "onnxruntime": _backend(ORT_CUDA, "ONNX Runtime with CUDA: pip install onnxruntime-gpu"),
    "energy": _energy,
    "modelopt": _modelopt,
    "data": lambda options: "" if options.data else "CIFAR-10: --data folder:PATH",
    "weights": lambda options: "" if options.weights else "weights of a cifar_resnet20: --weights FILE",
    "board": lambda options: "" if options.board else "a board with TensorRT: --board ssh://user@host",
}
"""What an item may need -> what is missing of it here; empty if it is here."""


# ---------------------------------------------------------------- the items
def items(options: argparse.Namespace) -> list[Item]:
    """Return all items in the order in which they are run: what is quick or decides most comes first."""
    return [
        *_engines(options), *_mixed(options), *_tables(options), *_runs(options), *_training(options), *_board(options),
    ]  # fmt: skip


def _benchmark(name: str, *arguments: str) -> tuple[str, ...]:
    return ("python", "-m", f"benchmarks.{name}", *arguments)


def _engines(options: argparse.Namespace) -> Iterator[Item]:
    for need, module in (("tensorrt", TENSORRT), ("rtx", RTX)):
        out = options.results / f"engines-{need}.json"
        yield Item(
            f"engines/{need}",
            "Engines have been built without a GPU, or run with stand-ins only: whether FP32, FP16 and INT8 run here, "
            "and give torch's outputs.",
            30,
            ("gpu", need),
            _benchmark("engines", "--builder", module, "--out", str(out)),
            partial(_engines_found, out),
        )


def _mixed(options: argparse.Namespace) -> Iterator[Item]:
    for need, module in (("tensorrt", TENSORRT), ("rtx", RTX)):
        run = options.results / f"mixed-{need}"
        yield Item(
            f"mixed/{need}",
            "Plans of FP16 and INT8 were made for made-up GPUs only: whether an engine's layers tell its parts apart, "
            "and which plan is the fastest.",
            90,
            ("gpu", "torch", need),
            (
                "compress", "--model", "resnet50", "--flops", "60%", "--precision", "fp16", *QUICK, "--set",
                "export.precisions=[mixed]", "--set", "export.max_drop=5", "--out", str(run),
            ),
            partial(_mixed_found, run, "mixed"),
            RAN,
            run,
            module,
        )  # fmt: skip
    run = options.results / "mixed-latency"
    yield Item(
        "mixed/latency",
        "Widths and precisions were searched together for a made-up GPU only: whether the file keeps a target.",
        240,
        ("gpu", "torch", "tensorrt"),
        ("compress", "--model", "resnet18", "--latency", "50%", "--precision", "mixed", *QUICK, "--out", str(run)),
        partial(_run_found, run, "latency"),
        RAN,
        run,
        TENSORRT,
    )


def _tables(options: argparse.Namespace) -> Iterator[Item]:
    kinds = [("tensorrt", TENSORRT, precision) for precision in ("fp16", "fp32", "int8")]
    for need, backend, precision in (*kinds, ("rtx", RTX, "fp16"), ("onnxruntime", ORT_CUDA, "fp32")):
        out = options.results / f"tables-{need}-{precision}.json"
        networks = ("resnet50@224", "mobilenet_v2@224", "cifar_resnet56@32")
        yield Item(
            f"tables/{need}/{precision}",
            "Latency tables of a GPU were measured on a made-up one only: their error on networks that they never saw.",
            30 * len(networks),
            ("gpu", need),
            _benchmark(
                "latency_accuracy", *networks, "--precision", precision, "--networks", "20", "--out", str(out)
            ),
            partial(_tables_found, out),
            backend=backend,
        )


def _runs(options: argparse.Namespace) -> Iterator[Item]:
    out = options.results / "targets"
    command = ("--precision", "fp16", "--runs", "12", "--out", str(out))
    yield Item(
        "targets",
        "Whether latency targets are kept as measured where kernels have steps and launches cost time.",
        150,
        ("gpu", "torch", "tensorrt"),
        _benchmark("latency_targets", *command),
        partial(_targets_found, out),
        backend=TENSORRT,
    )
    load = options.results / "load"
    yield Item(
        "load",
        "The 95th percentile of batches of 8 in two streams has been a contract with stand-ins only.",
        40,
        ("gpu", "torch", "tensorrt"),
        (
            "compress", "--model", "resnet50", "--latency", "60%", "--batch", "8", "--streams", "2", "--percentile",
            "95", "--precision", "fp16", *QUICK, "--out", str(load),
        ),
        partial(_run_found, load, "latency"),
        RAN,
        load,
        TENSORRT,
    )  # fmt: skip
    energy = options.results / "energy"
    yield Item(
        "energy",
        "NVML was read from a stand-in only: whether an energy budget is kept as counted by the GPU's board.",
        60,
        ("gpu", "torch", "tensorrt", "energy"),
        (
            "compress", "--model", "resnet18", "--energy", "70%", "--precision", "fp32", *QUICK, "--out", str(energy),
        ),
        partial(_run_found, energy, "energy"),
        RAN,
        energy,
        TENSORRT,
    )  # fmt: skip


def _training(options: argparse.Namespace) -> Iterator[Item]:
    """The studies of agents and of other tools, whose fine-tuning was one or two epochs on a CPU."""
    data, weights = options.data or "folder:PATH", str(options.weights or "FILE")
    seeds, epochs = [str(seed) for seed in options.seeds], str(options.epochs)
    agents, peers = options.results / "agents", options.results / "peers.jsonl"
    yield Item(
        "training/agents",
        f"The agents were compared after one epoch: whether they differ after {epochs}, over several seeds.",
        len(options.seeds) * 6 * (options.epochs * EPOCH_MINUTES + 3),
        ("gpu", "torch", "data", "weights"),
        _benchmark(
            "agents", "--data", data, "--weights", weights, "--budgets", "flops:50%", "flops:30%", "--evaluations",
            "100", "--agents", "uniform", "knapsack", "joint", "--epochs", epochs, "--seeds", *seeds, "--results",
            str(agents), "--work", str(options.results / "agents-work"), "--page", str(agents.with_suffix(".md")),
        ),
        partial(_agents_found, agents / "cells"),
    )  # fmt: skip
    yield Item(
        "training/peers",
        f"Other tools were compared after two epochs: whether compensation still counts after {epochs}.",
        2 * (7 + 6 * len(options.seeds)) * options.epochs * EPOCH_MINUTES,
        ("gpu", "torch", "data", "weights", "modelopt"),
        _benchmark(
            "peers", "--data", data, "--weights", f"cifar_resnet20={weights}", "--epochs", epochs, "--seeds",
            *seeds, "--results", str(peers), "--work", str(options.results / "peers-work"),
            "--page", str(peers.with_suffix(".md")),
        ),
        partial(_peers_found, peers),
    )  # fmt: skip


def _board(options: argparse.Namespace) -> Iterator[Item]:
    address, run = options.board or "ssh://user@host", options.results / "board"
    yield Item(
        "board/latency",
        "No Jetson has been measured: a table over ssh, and a target that the delivered network keeps there.",
        120,
        ("board",),
        (
            "compress", "--model", "mobilenet_v2", "--device", address, "--latency", "60%", "--precision", "fp16",
            *QUICK, "--out", str(run),
        ),
        partial(_run_found, run, "latency"),
        RAN,
        run,
    )  # fmt: skip
    yield Item(
        "board/bundle",
        "The bundle's script has run with a stand-in for trtexec only: engines in every precision, verified there.",
        40,
        ("board",),
        ("compress", "export", str(run), "--target", address, "--board", options.target),
        partial(_bundle_found, run),
    )
    yield Item(
        "board/mixed",
        "No board has chosen FP16 or INT8 for each layer yet: which plan of the slim network is the fastest there.",
        60,
        ("board",),
        ("compress", "export", str(run), "--precision", "mixed", "--target", address, "--board", options.target),
        partial(_mixed_found, run, "mixed.tensorrt", "mixed"),
    )
    mixed = options.results / "board-mixed"
    yield Item(
        "board/mixed-latency",
        "Widths and precisions were searched together for a made-up board only: whether the file keeps a target there.",
        300,
        ("board",),
        (
            "compress", "--model", "mobilenet_v2", "--device", address, "--latency", "50%", "--precision", "mixed",
            *QUICK, "--out", str(mixed),
        ),
        partial(_run_found, mixed, "latency"),
        RAN,
        mixed,
    )  # fmt: skip
    energy = options.results / "board-energy"
    yield Item(
        "board/energy",
        "tegrastats was read from a recording only: an energy budget of the module.",
        90,
        ("board",),
        (
            "compress", "--model", "cifar_resnet20", "--device", address, "--energy", "70%", "--precision", "fp32",
            *QUICK, "--out", str(energy),
        ),
        partial(_run_found, energy, "energy"),
        RAN,
        energy,
    )  # fmt: skip


# ---------------------------------------------------------------- what they found
def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _engines_found(path: Path) -> str:
    entries = [entry for row in _json(path) for entry in row["precisions"].values()]
    ran = [entry for entry in entries if "failed" not in entry]
    worst = max((entry["file"] for entry in ran), default=0.0)
    alike = sum(entry["alike"] for entry in ran)
    return f"{len(ran)} of {len(entries)} engines run, {alike} as their files within {worst:.0e} of the largest output"


def _tables_found(path: Path) -> str:
    parts = [
        f"{row['network']} {row['table']['mape']:.1%}"
        + (f" (states {row['stated']['mape']:.1%})" if row["stated"] else "")
        for row in _json(path)["results"]
    ]
    return f"mean error on unseen networks: {', '.join(parts)}"


def _targets_found(folder: Path) -> str:
    rows = _json(folder / "table.json")
    left = 1 - statistics.fmean(row["ratio"] for row in rows)
    return f"{sum(bool(row['kept']) for row in rows)} of {len(rows)} kept, on average {left:.1%} below the target"


def _run_found(folder: Path, name: str) -> str:
    manifest = _json(folder / "manifest.json")
    (budget,) = (each for each in manifest["budgets"] if each["name"] == name)
    share = budget["measured"] / budget["dense"]
    return (
        f"{budget['measured']:.3g} {budget['unit']}, {share:.1%} of the dense network's "
        f"(target {budget['target']:.3g}): {budget['verdict'] or 'open'}; exit code {manifest['exit_code']}"
    )


def _mixed_found(folder: Path, *names: str) -> str:
    exports = _json(folder / "manifest.json")["exports"]
    entry = next(exports[name] for name in names if name in exports)
    (chosen,) = (plan for plan in entry["plans"] if plan["chosen"])
    whole = max(entry["plans"], key=lambda plan: plan["int8"])
    floats = entry["rest"].upper()
    known = entry["layers"][0]["float_ms"] is not None
    return (
        f"{chosen['int8']} of {len(entry['layers'])} layers in INT8 take {chosen['ratio']:.3f} of {floats}'s time, "
        f"{whole['int8']} take {whole['ratio']:.3f}; layers {'were' if known else 'could not be'} timed one by one"
    )


def _agents_found(folder: Path) -> str:
    found: dict[tuple[str, str], list[float]] = {}
    for path in sorted(folder.glob("*.json")):
        cell = _json(path)
        found.setdefault((cell["budget"], cell["agent"]), []).append(cell["after"])
    return "; ".join(
        f"{budget} {agent} {statistics.fmean(values):.2%} ({len(values)} seeds)"
        for (budget, agent), values in found.items()
    )


def _peers_found(path: Path) -> str:
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        model, _, rest = entry["cell"].partition("/")
        parts = rest.split("/")
        if len(parts) == 4 and parts[-1] != "search":
            found.setdefault(f"{model} {parts[0]} {parts[1]} {parts[-1]}", []).append(entry["after"])
    return "; ".join(f"{name} {statistics.fmean(values):.2%}" for name, values in found.items())


def _bundle_found(folder: Path) -> str:
    device = _json(folder / "manifest.json")["devices"][-1]
    right = sum(network["status"] == "ok" for network in device["networks"])
    return f"{right} of {len(device['networks'])} engines built, measured and verified on {device['target']}"
