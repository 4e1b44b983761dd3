"""Export, parity, FP16, INT8 and TensorRT-RTX engines of twenty torchvision networks, as one table.

    python benchmarks/export_networks.py [--size 96] [--images FOLDER] [NETWORK ...]

Weights are random unless `--weights FOLDER` holds NETWORK.pt state dicts; inputs are images of FOLDER (any folders
below it), or noise. Differences are relative to the largest output of the FP32 file. Engines are for compute
capability 8.6.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from export.engine import available, build_engine
from export.errors import ExportError
from export.half import convert_half
from export.parity import check_parity, compare_outputs, onnx_outputs
from export.quantize import quantize_onnx
from export.to_onnx import export_onnx

NETWORKS = [
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "regnet_x_400mf",
    "convnext_tiny",
    "wide_resnet50_2",
]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def images(folder: str | None, size: int, count: int) -> NDArray[np.float32]:
    """`count` inputs (N, 3, size, size), normalised as ImageNet's."""
    if folder is None:
        return np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)
    from PIL import Image

    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
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


def row(name: str, size: int, inputs: NDArray[np.float32], weights: str | None, folder: Path) -> str:
    torch.manual_seed(0)
    extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(weights=None, **extra)
    if weights:
        model.load_state_dict(torch.load(Path(weights) / f"{name}.pt", weights_only=True))
    else:
        calm(model, inputs)
    paths = {kind: folder / f"{name}.{kind}.onnx" for kind in ("fp32", "fp16", "int8")}
    started = time.perf_counter()
    export_onnx(model, torch.zeros(1, 3, size, size), paths["fp32"])
    exported = time.perf_counter() - started
    # random weights amplify rounding more than trained ones do
    parity = check_parity(model, paths["fp32"], inputs[:8], tolerance=1e-3)
    convert_half(paths["fp32"], paths["fp16"], inputs=inputs[:4])
    quantize_onnx(paths["fp32"], paths["int8"], inputs)
    right = onnx_outputs(paths["fp32"], inputs[:8])[0]
    cells = [f"{exported:.1f}", f"{paths['fp32'].stat().st_size / 1e6:.1f}", f"{parity.max_abs:.1e}"]
    for kind in ("fp16", "int8"):
        found = compare_outputs(right, onnx_outputs(paths[kind], inputs[:8])[0], tolerance=1.0)
        cells += [f"{found.max_abs / max(found.scale, 1e-30):.1e}", f"{found.top1_agreement:.0%}"]
    for kind in paths:
        cells.append(engine_cell(paths[kind], folder))
    return f"| {name} | " + " | ".join(cells) + " |"


def engine_cell(path: Path, folder: Path) -> str:
    if available() is None:
        return "-"
    try:
        info = build_engine(
            path, folder / "net.engine", module="tensorrt_rtx_bindings", compute_capability="8.6"
        )
    except ExportError as error:
        return f"failed: {error.message[:60]}"
    return f"{info.size / 1e6:.1f} MB, {info.seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--images")
    parser.add_argument("--weights")
    options = parser.parse_args()
    inputs = images(options.images, options.size, 32)
    print("| network | export s | MB | FP32 diff | FP16 diff | top-1 | INT8 diff | top-1 | ", end="")
    print("engine FP32 | FP16 | INT8 |\n|" + " --- |" * 11)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            print(row(name, options.size, inputs, options.weights, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
