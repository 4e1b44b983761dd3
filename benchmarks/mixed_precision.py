"""FP32, INT8 and mixed precision on this machine's CPU: accuracy and time, and accuracy at equal time.

    python -m benchmarks.mixed_precision --photos PHOTOS --cifar DATA --checkpoints FOLDER
    python -m benchmarks.mixed_precision --cifar DATA --checkpoints FOLDER --contract 0.35 resnet20

FOLDER has `resnet20*.pt`, `resnet56*.pt` (CIFAR-10, trained on DATA: train/CLASS/*.jpg, test/CLASS/*.jpg) and
`tf_efficientnet_lite0*.pt` (ImageNet; PHOTOS has one photograph for each class, WNID/*.jpg). Half of the photographs
calibrate, compensate and judge, the other half is reported; of CIFAR, 500 training images and all test images.

Two comparisons for each network, and a third one with `--contract`. *As it is*: the network in FP32, with all layers in
INT8 (weights rounded to the nearest, or for the layers' outputs), and in mixed precision. *At equal time*: each
precision prunes all groups by one ratio until the network takes a given share of the dense FP32 network's time, and is
compensated without training; the same images, and no search, for all of them. *As a contract*: whole runs in each
precision, with a latency target that is the same share of the dense FP32 network's time (a run in INT8 counts shares of
the dense INT8 network, and gets that of its time), `--agent knapsack --epochs 0`; accuracies are those of the delivered
files on the test split. Times are ratios to the dense FP32 file from bursts in turns.

Rows are kept in benchmarks/results/mixed_precision.json, so that a second call goes on; the page is
docs/results/precision.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.core.errors import CompressorError
from compressor.core.manifest import MANIFEST, Manifest
from compressor.data.decoded import load_files
from compressor.data.images import ImageFile
from compressor.data.preprocessing import Preprocessing
from compressor.latency.backends.cpu import measured
from compressor.latency.converted import in_precision
from compressor.latency.local import LocalCpu
from compressor.latency.precisions import CpuTimer
from compressor.latency.request import Request, Turns
from compressor.models.create import create_model
from compressor.pruning.space import PruningSpace
from compressor.recipe import Recipe
from compressor.run.mixed import write_mixed
from compressor.run.onnx_files import DENSE
from compressor.run.pipeline import run_recipe
from export.convert.calibrated import ONNXRUNTIME
from export.convert.ort import accuracy_onnx, onnx_outputs
from export.convert.quantize import noise, quantize_onnx
from export.convert.to_onnx import export_onnx

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "mixed_precision.json"
PAGE = HERE.parent / "docs" / "results" / "precision.md"
NETWORKS = {
    "resnet20": "cifar_resnet20",
    "resnet56": "cifar_resnet56",
    "tf_efficientnet_lite0": "timm:tf_efficientnet_lite0",
}
KINDS = ("FP32", "INT8", "INT8, rounded", "mixed")
CALIBRATION = 256
"""Images that give ranges; compensation has all that fit."""
STEPS = 6
"""Ratios that are tried until a network takes the wanted time."""
LEAST = 0.1
"""Smallest ratio of widths that is tried."""
DELIVERED = {"fp32": "model.onnx", "int8": "model.int8.onnx", "mixed": "model.mixed.onnx"}
EVALUATIONS = 20
"""Scored plans of each whole run."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """Preprocessed images (N, C, H, W) and their classes (N,)."""

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """A network with the images that fit and those that are reported."""

    name: str
    model: nn.Module
    fit: Images
    report: Images


def subject(name: str, options: argparse.Namespace) -> Subject:
    """Load a network and its images."""
    checkpoint = next(iter(sorted(options.checkpoints.glob(f"{name}*.pt"))))
    if name == "tf_efficientnet_lite0":
        folders = sorted(path for path in options.photos.iterdir() if path.is_dir())
        files = [ImageFile(str(next(iter(sorted(path.iterdir())))), place) for place, path in enumerate(folders)]
        order = np.random.default_rng(1).permutation(len(files))
        half = len(files) // 2
        parts = [[files[place] for place in part] for part in (order[:half], order[half:])]
        preprocessing = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, 0.875, "bicubic")
    else:
        train, test = (_by_class(options.cifar / part) for part in ("train", "test"))
        parts = [[files[place] for files in train for place in range(50)], [file for files in test for file in files]]
        preprocessing = Preprocessing(32, crop_share=1.0)
    model = create_model(
        NETWORKS[name], 1000 if name.endswith("lite0") else 10, checkpoint, preprocessing.input_shape
    ).eval()
    fit, report = (_read(files, preprocessing) for files in parts)
    return Subject(name, model, fit, report)


def _by_class(folder: Path) -> list[list[ImageFile]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [[ImageFile(str(file), place) for file in sorted(path.iterdir())] for place, path in enumerate(classes)]


def _read(files: list[ImageFile], preprocessing: Preprocessing) -> Images:
    (decoded,) = load_files([files], preprocessing, "Reading images")
    order = np.random.default_rng(0).permutation(len(decoded.labels))
    inputs = preprocessing.normalised(decoded.images).numpy()
    return Images(inputs[order], decoded.labels.numpy()[order])


def accuracy(path: Path, images: Images) -> float:
    """Top-1 accuracy of a file."""
    return accuracy_onnx(path, [(images.inputs, images.labels)])


def converted(source: Path, target: Path, kind: str, fit: Images, layers: list[str] | None = None) -> None:
    """Write an FP32 file in another kind; mixed with the given layers in INT8."""
    if kind == "FP32":
        target.write_bytes(source.read_bytes())
        return
    if layers == []:
        target.write_bytes(source.read_bytes())
        return
    rounding = "outputs" if kind == "INT8, rounded" else "nearest"
    quantize_onnx(
        source, target, fit.inputs[:CALIBRATION], only=layers, runtime=ONNXRUNTIME, rounding=rounding
    )


def as_it_is(given: Subject, folder: Path, max_drop: float) -> tuple[list[Row], list[str]]:
    """Compare the precisions of the unpruned network; also return the layers that mixed precision has in INT8."""
    source = folder / "dense.onnx"
    export_onnx(given.model, torch.from_numpy(given.fit.inputs[:1]), source)
    exact = onnx_outputs(source, given.report.inputs[:500])
    rows: list[Row] = []
    for kind in KINDS:
        path = folder / f"{len(rows)}.onnx"
        row: Row = {"kind": kind}
        if kind == "mixed":
            made = write_mixed(
                source, path, given.fit.inputs[:CALIBRATION], lambda file: accuracy(file, given.fit),
                CpuTimer(Request()), max_drop=max_drop,
            )  # fmt: skip
            layers = [layer.name for layer in made.layers if layer.precision == "int8"]
            row |= {"layers": len(made.layers), "int8": len(layers), "plans": [vars(each) for each in made.plans]}
        else:
            converted(source, path, kind, given.fit)
        rows.append(row | _measured(source, path, given) | {"noise": noise(exact, _outputs(path, given))})
        print(given.name, json.dumps(rows[-1]), flush=True)
    return rows, layers


def _outputs(path: Path, given: Subject) -> list[NDArray[np.float32]]:
    return onnx_outputs(path, given.report.inputs[:500])


def _measured(dense: Path, path: Path, given: Subject) -> Row:
    """Time a file beside the dense FP32 one, and score it on the reported images."""
    ratio = measured(dense, path, Request(), Turns(repeats=6)).ratio
    found = {"ratio": ratio.value, "interval": [ratio.low, ratio.high]}
    return found | {"accuracy": accuracy(path, given.report), "images": len(given.report.labels)}


def at_equal_time(
    given: Subject, folder: Path, share: float, kind: str, layers: list[str] | None
) -> Row:
    """Prune by one ratio until the network takes a share of the dense FP32 network's time, and compensate it."""
    example = torch.from_numpy(given.fit.inputs[:1])
    first = PruningSpace(given.model, example)
    space = PruningSpace(given.model, example, granularity=LocalCpu().steps(first.groups, "fp32"))
    dense, slim, file = (folder / f"{name}.onnx" for name in ("dense", "slim", "file"))

    def timed(ratio: float, build: Callable[[Any], nn.Module]) -> Any:
        export_onnx(build(space.uniform(ratio)), example, slim, compare=False)
        converted(slim, file, "INT8" if kind == "INT8, rounded" else kind, given.fit, layers)  # as fast
        return measured(dense, file, Request(), Turns(repeats=3)).ratio.value

    low, high = LEAST, 1.0
    if timed(1.0, space.apply) <= share:
        low = 1.0
    for _ in range(STEPS if low < 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if timed(middle, space.apply) <= share else (low, middle)
    plan, batches = space.uniform(low), [torch.from_numpy(given.fit.inputs)]
    network = space.compensate(plan, batches) if low < 1 else given.model
    export_onnx(network, example, slim, compare=False)
    converted(slim, file, kind, given.fit, layers)
    macs = space.macs(space.widths(plan.widths)) / space.macs(space.dense_widths)
    return {"kind": kind, "share": share, "kept": low, "macs": macs} | _measured(dense, file, given)


def as_contract(name: str, folder: Path, options: argparse.Namespace, share: float, precision: str) -> Row:
    """Run a network whose latency target is a share of the dense FP32 network's time."""
    checkpoint = next(iter(sorted(options.checkpoints.glob(f"{name}*.pt"))))
    target, row = share, {"kind": precision, "share": share}
    if precision == "int8":
        dense, int8 = (folder / each for each in ("dense.onnx", "int8.onnx"))
        model = create_model(NETWORKS[name], 10, checkpoint, (3, 32, 32)).eval()
        export_onnx(model, torch.zeros(1, 3, 32, 32), dense)
        int8.write_bytes(in_precision(dense.read_bytes(), "int8", ONNXRUNTIME))
        target = share / measured(dense, int8, Request(), Turns(repeats=6)).ratio.value
    recipe = {
        "model": NETWORKS[name], "weights": str(checkpoint), "data": f"folder:{options.cifar}", "precision": precision,
        "budgets": {"latency": f"{target:.1%}"}, "agent": "knapsack", "epochs": 0, "export": {"engine": False},
        "search": {"max_evaluations": EVALUATIONS},
    }  # fmt: skip
    try:
        found = run_recipe(Recipe.model_validate(recipe), out=folder / precision)
    except CompressorError as error:
        return row | {"refused": error.message}
    manifest, file = Manifest.read(found.directory / MANIFEST), found.directory / DELIVERED[precision]
    entry, accuracy, cost = manifest.exports.get(precision), manifest.accuracy, manifest.cost
    ratio = measured(found.directory / DENSE, file, Request(), Turns(repeats=8)).ratio
    return row | {
        "exit_code": found.exit_code,
        "kept": float(np.mean([group["kept"] / group["width"] for group in found.manifest["groups"]])),
        "macs": float(cost.slim.macs or 0) / float(cost.dense.macs or 1),
        "layers": 0 if entry is None else len(entry.layers),
        "floats": 0 if entry is None else len(entry.kept_float),
        "rounds": [each.ratio for each in manifest.rounds],
        "predicted": [each.predicted_ratio for each in manifest.rounds],
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
        "accuracy": accuracy.exported if entry is None else entry.accuracy,
        "images": accuracy.exported_images if entry is None else entry.images,
    }


def page(results: Mapping[str, Mapping[str, list[Row]]]) -> str:
    """Return the page with both tables."""
    lines = [
        "# Precisions on a CPU",
        "",
        "Written by `python -m benchmarks.mixed_precision`; do not edit. [Precision](../method/precision.md) explains",
        "the methods. Times are shares of the dense FP32 network's, from bursts in turns on a shared machine, with",
        "95 % intervals. *Noise* is the squared difference of the outputs as a share of their variance.",
        "",
        "## As it is",
        "",
        "| network | precision | layers in INT8 | time | noise | accuracy | images |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, parts in results.items():
        for row in parts.get("as_it_is", []):
            layers = "none" if row["kind"] == "FP32" else "all"
            layers = f"{row['int8']} of {row['layers']}" if "layers" in row else layers
            lines.append(
                f"| {name} | {row['kind']} | {layers} | {_time(row)} | {row['noise']:.2%} | {row['accuracy']:.2%} "
                f"| {row['images']} |"
            )
    lines += [
        "",
        "## At equal time",
        "",
        f"One ratio for all groups, from {LEAST:.0%} of the widths on: what is *not reached* takes longer even so.",
        "",
        "| network | share aimed at | precision | widths kept | MACs | time | accuracy | images |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, parts in results.items():
        for row in parts.get("at_equal_time", []):
            missed = ", not reached" if row["kept"] == LEAST and row["interval"][0] > row["share"] else ""
            lines.append(
                f"| {name} | {row['share']:.2f} | {row['kind']} | {row['kept']:.0%} | {row['macs']:.0%} "
                f"| {_time(row)}{missed} | {row['accuracy']:.2%} | {row['images']} |"
            )
    if not any(parts.get("contract") for parts in results.values()):
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "## As a contract",
        "",
        "`python -m benchmarks.mixed_precision --contract SHARE`: whole runs, `--latency SHARE --precision PRECISION",
        f"--agent knapsack --epochs 0 --set search.max_evaluations={EVALUATIONS}`; targets are shares of the dense",
        "FP32 network's time. *Rounds* are the plans that were measured during the run, with what the table said in",
        "brackets, as shares of the dense network's time in FP32 (of INT8: in INT8).",
        "",
        "| network | target | precision | channels kept | MACs | layers in INT8 | rounds | time | accuracy | images |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, parts in results.items():
        for row in parts.get("contract", []):
            lines.append(f"| {name} | {row['share']:.2f} | {row['kind']} | {_contract_cells(row)} |")
    return "\n".join(lines) + "\n"


def _contract_cells(row: Row) -> str:
    """Return the cells of a run, or why there is none."""
    if "refused" in row:
        return f"refused: {row['refused']} | | | | | |"
    rounds = ", ".join(
        f"{ratio:.3f} ({predicted:.3f})" for ratio, predicted in zip(row["rounds"], row["predicted"], strict=True)
    )
    layers = "none" if row["kind"] == "fp32" else f"all but {row['floats']}" if row["floats"] else "all"
    if row["layers"]:
        layers = f"{row['layers'] - row['floats']} of {row['layers']}"
    cells = (f"{row['kept']:.0%}", f"{row['macs']:.0%}", layers, rounds, _time(row), f"{row['accuracy']:.2%}")
    return " | ".join([*cells, str(row["images"])])


def _time(row: Row) -> str:
    low, high = row["interval"]
    return f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _both_comparisons(name: str, options: argparse.Namespace) -> dict[str, list[Row]]:
    given = subject(name, options)
    with tempfile.TemporaryDirectory(prefix="precision-") as temporary:
        rows, layers = as_it_is(given, Path(temporary), options.max_drop)
        found: dict[str, list[Row]] = {"as_it_is": rows, "at_equal_time": []}
        for kind in KINDS:
            chosen = layers if kind == "mixed" else None
            found["at_equal_time"].append(at_equal_time(given, Path(temporary), options.share, kind, chosen))
            print(name, json.dumps(found["at_equal_time"][-1]), flush=True)
    return found


def main() -> None:
    """Fill up the results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="without it tf_efficientnet_lite0 is left out")
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the dense FP32 network's time")
    parser.add_argument("--max-drop", type=float, default=0.01, help="that mixed precision may lose")
    parser.add_argument("--again", action="store_true", help="run networks that have results too")
    parser.add_argument("--contract", type=float, action="append", default=[], help="target of whole runs, a share")
    parser.add_argument("only", nargs="*", help="names of networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(name: str, found: dict[str, Any]) -> None:
        known = results | {name: results.get(name, {}) | found}
        results.clear()
        results.update({each: known[each] for each in NETWORKS if each in known})
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))

    for name in NETWORKS:
        if (options.only and name not in options.only) or (name.endswith("lite0") and options.photos is None):
            continue
        if options.again or "as_it_is" not in results.get(name, {}):
            keep(name, _both_comparisons(name, options))
        for share in () if name.endswith("lite0") else options.contract:
            for precision in reversed(DELIVERED):
                rows: list[Row] = results[name].get("contract", [])
                if any((row["share"], row["kind"]) == (share, precision) for row in rows):
                    continue
                with tempfile.TemporaryDirectory(prefix="precision-") as temporary:
                    rows = [as_contract(name, Path(temporary), options, share, precision), *rows]
                print(name, json.dumps(rows[0]), flush=True)
                keep(name, {"contract": rows})
    print(page(results))


if __name__ == "__main__":
    main()
