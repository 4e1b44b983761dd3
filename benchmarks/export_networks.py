"""Export, parity, FP16, INT8 and TensorRT-RTX engines of many networks, as one table.

    python -m benchmarks.export_networks --out runs/export --images PHOTOS --cifar DATA --checkpoints FOLDER

Twenty torchvision networks with random weights are exported and compared with themselves: differences are relative to
the largest output of the FP32 file, on inputs from PHOTOS (any images below that folder), or on noise. The slim
networks are whole runs: each of FOLDER's `resnet20*.pt` and `resnet56*.pt` is pruned to half of its multiply-adds, by
one ratio for all groups and by a knapsack, fine-tuned on DATA (train/CLASS/*.jpg, test/CLASS/*.jpg), and exported. The
accuracies are those of the exported files on the test images. Engines of torchvision networks are for compute
capability 8.6, those of slim networks for 8.6, 8.9 and 12.0 together.

What is finished is kept in `--out`, so that a second call goes on; `--seconds` starts no network after that time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from export.convert.half import convert_half
from export.convert.ort import onnx_outputs
from export.convert.parity import compare_outputs
from export.convert.quantize import quantize_onnx
from export.convert.to_onnx import check_parity, export_onnx
from export.engine.engine import build_engine
from export.engine.trt import RTX, available
from export.errors import ExportError

NETWORKS = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "googlenet", "inception_v3",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x0_5", "squeezenet1_1",
    "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "regnet_x_400mf", "convnext_tiny", "wide_resnet50_2",
)  # fmt: skip
SLIM = tuple((f"resnet{depth}", agent) for depth in (20, 56) for agent in ("uniform", "knapsack"))
PRECISIONS = ("fp32", "fp16", "int8")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
Row = dict[str, Any]


def photos(folder: str | None, size: int, count: int) -> NDArray[np.float32]:
    """`count` inputs (N, 3, size, size), normalised as ImageNet's."""
    if folder is None:
        return np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)
    from PIL import Image

    paths = sorted(
        path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    chosen = [paths[int(place)] for place in np.linspace(0, len(paths) - 1, count)]
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((size, size))) / 255.0 for path in chosen]
    return np.stack([((values - MEAN) / STD).transpose(2, 0, 1) for values in pixels]).astype(np.float32)


def calm(model: torch.nn.Module, inputs: NDArray[np.float32]) -> None:
    """Give random weights sensible batch-norm statistics, without which deep networks fade out or blow up."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
        elif isinstance(module, torch.nn.Dropout):
            module.eval()
    with torch.no_grad():
        model(torch.from_numpy(inputs))
    model.eval()


def torchvision_row(name: str, size: int, inputs: NDArray[np.float32], folder: Path) -> Row:
    """Everything of one torchvision network; its files go when the row is known."""
    torch.manual_seed(0)
    extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(weights=None, **extra)
    calm(model, inputs)
    paths = {kind: folder / f"{name}.{kind}.onnx" for kind in PRECISIONS}
    seconds: dict[str, float] = {}

    def timed(kind: str, work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[kind] = time.perf_counter() - started
        return result

    timed("fp32", lambda: export_onnx(model, torch.zeros(1, 3, size, size), paths["fp32"]))
    # random weights amplify rounding more than trained ones do
    parity = check_parity(model, paths["fp32"], inputs[:8], tolerance=1e-3)
    half = timed("fp16", lambda: convert_half(paths["fp32"], paths["fp16"], inputs=inputs[:4]))
    timed("int8", lambda: quantize_onnx(paths["fp32"], paths["int8"], inputs))
    right = onnx_outputs(paths["fp32"], inputs[:8])[0]
    row: Row = {
        "network": name,
        "torch_difference": parity.max_abs,
        "kept_fp32": len(half.kept),
        "precisions": {},
    }
    for kind, path in paths.items():
        found = compare_outputs(right, onnx_outputs(path, inputs[:8])[0], tolerance=1.0)
        row["precisions"][kind] = {
            "seconds": seconds[kind],
            "bytes": path.stat().st_size,
            "difference": found.max_abs / max(found.scale, 1e-30),
            "agreement": found.top1_agreement,
            "engine": engine_of(path, folder / "net.engine"),
        }
    for path in (*paths.values(), folder / "net.engine", folder / "net.json"):
        path.unlink(missing_ok=True)
    return row


def engine_of(path: Path, engine: Path) -> Row | None:
    """Size and build time of an engine for 8.6, or why there is none; None where no builder is installed."""
    if available() is None:
        return None
    try:
        info = build_engine(path, engine, module=RTX, compute_capability="8.6")
    except ExportError as error:
        return {"failed": error.message}
    return {"bytes": info.size, "seconds": info.seconds}


def subset(data: Path, goal: Path, count: int) -> Path:
    """A folder of links to the first `count` training images of each class and to all test images."""
    for split in ("train", "test"):
        for kind in sorted((data / split).iterdir()):
            files = sorted(kind.iterdir())[: count if split == "train" else None]
            folder = goal / split / kind.name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                if not (folder / file.name).exists():
                    (folder / file.name).symlink_to(file.resolve())
    return goal


def slim_row(
    name: str, agent: str, data: Path, weights: Path, options: argparse.Namespace, folder: Path
) -> Row:
    """One whole run to half of the multiply-adds, and its exports in every precision."""
    from compressor.recipe import Recipe
    from compressor.run.exports import Request, export_format
    from compressor.run.pipeline import resume, run_recipe

    recipe = Recipe.model_validate(
        {
            "model": f"cifar_{name}", "data": f"folder:{data}", "weights": str(weights), "agent": agent,
            "epochs": options.epochs, "budgets": {"flops": "50%"}, "search": {"max_evaluations": 20},
        }
    )  # fmt: skip
    run = folder / f"{name}-{agent}"
    manifest = (resume(run) if (run / "recipe.yaml").exists() else run_recipe(recipe, out=run)).manifest
    seconds = {"fp32": manifest["stages"]["export"]["seconds"]}
    for kind in PRECISIONS[1:]:
        started = time.perf_counter()
        for line in export_format(run, Request(precision=kind, max_drop=options.max_drop)):
            print(f"  {line}", flush=True)
        seconds[kind] = time.perf_counter() - started
    manifest = json.loads((run / "manifest.json").read_text())
    engines = {entry["precision"]: entry["bytes"] for entry in manifest["engines"]}
    exports = {
        "fp32": {
            "accuracy": manifest["accuracy"]["exported"],
            "bytes": manifest["cost"]["slim"]["onnx_bytes"],
        }
    }
    exports |= manifest["exports"]
    return {
        "network": f"{name}, half by {agent}",
        "dense_accuracy": manifest["accuracy"]["dense"],
        "torch_difference": manifest["parity"]["max_abs"],
        "test_images": manifest["accuracy"]["exported_images"],
        "precisions": {
            kind: {
                "seconds": seconds[kind],
                "bytes": exports[kind]["bytes"],
                "accuracy": exports[kind]["accuracy"],
                "kept": exports[kind].get("kept_float", exports[kind].get("kept_fp32", [])),
                "engine": {"bytes": engines[kind]} if kind in engines else None,
            }
            for kind in PRECISIONS
        },
    }


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Every network's row, read where it is finished and made where not, as far as time allows."""
    out, started = Path(options.out), time.perf_counter()
    (out / "rows").mkdir(parents=True, exist_ok=True)
    inputs: list[NDArray[np.float32]] = []

    def torchvision_work(name: str) -> Row:
        if not inputs:
            inputs.append(photos(options.images, options.size, 32))
        return torchvision_row(name, options.size, inputs[0], out)

    def slim_work(name: str, agent: str) -> Row:
        data = subset(Path(options.cifar), out / "data", options.train_images)
        weights = next(iter(sorted(Path(options.checkpoints).glob(f"{name}*.pt"))))
        return slim_row(name, agent, data, weights, options, out)

    work = {name: (torchvision_work, (name,)) for name in options.networks or NETWORKS}
    if options.cifar and options.checkpoints and not options.networks:
        work |= {f"{name}-{agent}": (slim_work, (name, agent)) for name, agent in SLIM}
    for key, (make, arguments) in work.items():
        file = out / "rows" / f"{key}.json"
        if not file.exists():
            if options.seconds and time.perf_counter() - started > options.seconds:
                continue
            print(f"{key} ...", flush=True)
            file.write_text(json.dumps(make(*arguments), indent=1) + "\n")
        yield json.loads(file.read_text())


def tables(found: list[Row]) -> str:
    """The rows as two Markdown tables: of random weights by their differences, of trained ones by accuracies."""

    def engine(entry: Row) -> str:
        built = entry["engine"]
        if built is None or "failed" in built:
            return "-" if built is None else "failed"
        return f"{built['bytes'] / 1e6:.1f}" + (f" / {built['seconds']:.1f}" if "seconds" in built else "")

    first = [
        "| network | export, FP16, INT8 in s | file in MB | torch to ONNX | FP16 off by | top-1 | INT8 off by | top-1 "
        "| engines FP32, FP16, INT8: MB / s |",
        "|" + " --- |" * 9,
    ]
    second = [
        "| network | dense | FP32 | FP16 | INT8 | kept in floats | files in MB | engines in MB | torch to ONNX |",
        "|" + " --- |" * 9,
    ]
    for row in found:
        kinds = [row["precisions"][kind] for kind in PRECISIONS]
        engines = ", ".join(engine(entry) for entry in kinds)
        if "dense_accuracy" in row:
            accuracies = " | ".join(f"{entry['accuracy']:.2%}" for entry in kinds)
            files = ", ".join(f"{entry['bytes'] / 1e6:.2f}" for entry in kinds)
            engines = ", ".join(
                "-" if not e["engine"] else f"{e['engine']['bytes'] / 1e6:.2f}" for e in kinds
            )
            second.append(
                f"| {row['network']} | {row['dense_accuracy']:.2%} | {accuracies} | {len(kinds[2]['kept'])} | {files} "
                f"| {engines} | {row['torch_difference']:.0e} |"
            )
        else:
            seconds = ", ".join(f"{entry['seconds']:.1f}" for entry in kinds)
            cells = " | ".join(f"{entry['difference']:.0e} | {entry['agreement']:.0%}" for entry in kinds[1:])
            first.append(
                f"| {row['network']} | {seconds} | {kinds[0]['bytes'] / 1e6:.1f} | {row['torch_difference']:.0e} "
                f"| {cells} | {engines} |"
            )
    return "\n".join([*first, "", *second])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help="only these of torchvision")
    parser.add_argument("--out", default="runs/export")
    parser.add_argument(
        "--size", type=int, default=96, help="pixels a side of the torchvision networks' inputs"
    )
    parser.add_argument("--images", help="folder of photographs")
    parser.add_argument("--cifar", help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--checkpoints", help="folder with resnet20*.pt and resnet56*.pt")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=1000, help="of each class, for fine-tuning")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points that INT8 may lose")
    parser.add_argument("--seconds", type=float, default=0.0, help="start no network later than this; 0: all")
    options = parser.parse_args()
    found = list(rows(options))
    text = tables(found)
    out = Path(options.out)
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(text + "\n")
    print(f"{text}\n\nSaved {out / 'table.json'} and {out / 'table.md'}")


if __name__ == "__main__":
    main()
