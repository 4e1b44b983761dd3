"""Engines on this machine's GPU in FP32, FP16 and INT8: built, run, compared with torch, and timed.

    python -m benchmarks.engines                                     # TensorRT
    python -m benchmarks.engines --builder tensorrt_rtx_bindings     # TensorRT-RTX

The networks have random weights with sensible batch-norm statistics. *torch* is the largest difference of an output
from torch's, *file* that from the same ONNX file in ONNX Runtime, both as shares of the largest output: the first has
the error of the precision, the second what the engine adds to it. An engine is *alike* if it keeps the file's
tolerance, as a board's bundle checks it. Times are those of single runs by CUDA events, without copies.

Networks that are finished are kept in `--out`, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.export_networks import PRECISIONS, Row, calm, photos
from compressor.core.files import write_atomic
from compressor.models import create_model
from export.convert.half import convert_half
from export.convert.ort import onnx_outputs
from export.convert.parity import DEVICE_TOLERANCES, Parity, compare_outputs, require
from export.convert.quantize import quantize_onnx
from export.convert.to_onnx import export_onnx
from export.engine.cuda import find_device
from export.engine.engine import build_engine
from export.engine.runner import EngineRunner
from export.engine.trt import MODULES
from export.errors import ExportError

NETWORKS = (
    "resnet50@224", "mobilenet_v2@224", "efficientnet_b0@224", "densenet121@224", "convnext_tiny@224",
    "cifar_resnet56@32",
)  # fmt: skip
COMPARED = 16
"""Inputs on which outputs are compared; the others calibrate."""


def row_of(name: str, options: argparse.Namespace) -> Row:
    """Build, run and time the engines of one network."""
    model_name, _, size = name.partition("@")
    inputs = photos(options.images, int(size), 4 * COMPARED)
    torch.manual_seed(0)
    model = create_model(model_name, 10 if int(size) < 100 else 1000, "none", (3, int(size), int(size)))
    calm(model, inputs)
    judged = inputs[:COMPARED]
    with torch.no_grad():
        right = model(torch.from_numpy(judged)).numpy()
    row: Row = {"network": name, "builder": options.builder, "precisions": {}}
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        files = {kind: Path(folder) / f"{kind}.onnx" for kind in PRECISIONS}
        export_onnx(model, torch.zeros(1, 3, int(size), int(size)), files["fp32"])
        convert_half(files["fp32"], files["fp16"], inputs=inputs[:4])
        quantize_onnx(files["fp32"], files["int8"], inputs[COMPARED:], rest="fp16")
        for kind, path in files.items():
            row["precisions"][kind] = engine_of(path, kind, judged, right, options)
    return row


def engine_of(
    path: Path, kind: str, judged: NDArray[np.float32], right: NDArray[np.float32], options: argparse.Namespace
) -> Row:
    """Build, run and time one engine; `failed` says why there is none."""
    gpu = find_device()
    try:
        info = build_engine(
            path,
            path.with_suffix(".engine"),
            module=options.builder,
            compute_capability=None if gpu is None else gpu.compute_capability,
        )
        with EngineRunner(path.with_suffix(".engine")) as runner:
            found = runner.run_batches(judged)
            times = runner.measure(warmup_s=1.0, duration_s=options.seconds)
    except ExportError as error:
        return {"failed": error.message}
    beside_torch = compare_outputs(right, found)
    beside_file = compare_outputs(onnx_outputs(path, judged)[0], found, tolerance=DEVICE_TOLERANCES[kind])
    return {
        "build_s": round(info.seconds, 1), "bytes": info.size, "version": info.version,
        "torch": share(beside_torch), "same_class": beside_torch.top1_agreement,
        "file": share(beside_file), "alike": alike(beside_file),
        "median_ms": times.median_ms, "p99_ms": times.p99_ms,
    }  # fmt: skip


def share(parity: Parity) -> float:
    """Return the largest difference as a share of the largest output."""
    return parity.max_abs / max(parity.scale, 1e-30)


def alike(parity: Parity) -> bool:
    """Whether the outputs are within the tolerance."""
    try:
        require(parity, "The engine")
    except ExportError:
        return False
    return True


def show(rows: Sequence[Row], console: Console) -> None:
    """Print all rows so far."""
    table = Table(title="Engines beside torch")
    for column in ("network", "precision", "built in s", "MB", "torch", "same class", "file", "alike", "ms", "p99 ms"):
        table.add_column(column, justify="left" if column in ("network", "precision") else "right")
    for row in rows:
        for kind, entry in row["precisions"].items():
            if "failed" in entry:
                table.add_row(row["network"], kind, entry["failed"])
                continue
            table.add_row(
                row["network"], kind, f"{entry['build_s']:.1f}", f"{entry['bytes'] / 1e6:.1f}", f"{entry['torch']:.0e}",
                f"{entry['same_class']:.0%}", f"{entry['file']:.0e}", "yes" if entry["alike"] else "NO",
                f"{entry['median_ms']:.3f}", f"{entry['p99_ms']:.3f}",
            )  # fmt: skip
    console.print(table)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NETWORKS, metavar="MODEL@PIXELS")
    parser.add_argument("--builder", choices=MODULES, default=MODULES[0])
    parser.add_argument("--images", help="folder of photographs; without it inputs are noise")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each engine")
    parser.add_argument("--out", type=Path, default=Path("runs/engines.json"))
    return parser.parse_args(arguments)


def main() -> None:
    """Run the networks asked for that have no result yet."""
    options = parsed()
    rows: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    console = Console(width=130)
    for name in options.names:
        if any((row["network"], row["builder"]) == (name, options.builder) for row in rows):
            continue
        rows.append(row_of(name, options))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, json.dumps(rows, indent=1) + "\n")
    show(rows, console)
    console.print(f"Saved {options.out}")


if __name__ == "__main__":
    main()
