"""Peaks of the Jetson modules, and the published networks that the estimated tables are fitted to."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from compressor.latency.estimate import EstimatedOperators, count_non_gemm

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Module:
    """Dense peaks of a module at its highest usual clock, from its maker's data sheets."""

    sku: str
    generation: str
    capability: str
    clock: str
    peaks: dict[str, float]
    bandwidth_gbs: float

    @property
    def mhz(self) -> float:
        """The GPU's clock."""
        return float(self.clock.split()[1])


MODULES = {
    "jetson-nano": Module(
        "Jetson Nano 4GB", "maxwell", "5.3", "GPU 921 MHz", {"fp32": 0.236, "fp16": 0.472}, 25.6
    ),
    "jetson-tx2": Module(
        "Jetson TX2 8GB", "maxwell", "6.2", "GPU 1300 MHz", {"fp32": 0.67, "fp16": 1.33}, 59.7
    ),
    "jetson-xavier-nx": Module(
        "Jetson Xavier NX 8GB",
        "volta",
        "7.2",
        "GPU 1100 MHz",
        {"fp32": 0.85, "fp16": 6.8, "int8": 13.5},
        59.7,
    ),
    "jetson-agx-xavier": Module(
        "Jetson AGX Xavier", "volta", "7.2", "GPU 1377 MHz", {"fp32": 1.41, "fp16": 11.3, "int8": 22.6}, 136.5
    ),
    "jetson-orin-nano-4gb": Module(
        "Jetson Orin Nano 4GB",
        "ampere",
        "8.7",
        "GPU 625 MHz",
        {"fp32": 0.64, "fp16": 5.1, "int8": 10.2},
        34.0,
    ),
    "jetson-orin-nano-8gb": Module(
        "Jetson Orin Nano 8GB",
        "ampere",
        "8.7",
        "GPU 625 MHz",
        {"fp32": 1.28, "fp16": 10.2, "int8": 20.5},
        68.0,
    ),
    "jetson-orin-nx-8gb": Module(
        "Jetson Orin NX 8GB",
        "ampere",
        "8.7",
        "GPU 765 MHz",
        {"fp32": 1.57, "fp16": 12.5, "int8": 25.0},
        102.0,
    ),
    "jetson-orin-nx-16gb": Module(
        "Jetson Orin NX 16GB",
        "ampere",
        "8.7",
        "GPU 918 MHz",
        {"fp32": 1.88, "fp16": 15.0, "int8": 30.1},
        102.0,
    ),
    "jetson-agx-orin-32gb": Module(
        "Jetson AGX Orin 32GB",
        "ampere",
        "8.7",
        "GPU 930 MHz",
        {"fp32": 3.3, "fp16": 26.7, "int8": 53.0},
        205.0,
    ),
    "jetson-agx-orin-64gb": Module(
        "Jetson AGX Orin 64GB",
        "ampere",
        "8.7",
        "GPU 1300 MHz",
        {"fp32": 5.3, "fp16": 42.6, "int8": 85.0},
        205.0,
    ),
    "jetson-thor-t5000": Module(
        "Jetson Thor T5000",
        "blackwell",
        "11.0",
        "GPU 1575 MHz",
        {"fp32": 8.1, "fp16": 258.0, "int8": 517.0},
        273.0,
    ),
}


@dataclass(frozen=True)
class Row:
    """One published measurement with what its network computes."""

    device: str
    precision: str
    source: str
    latency_ms: float
    operators: EstimatedOperators
    c_in: Floats
    c_out: Floats


def blocks(module: Module, precision: str) -> int:
    """Channels that the kernels compute at once."""
    if module.generation == "maxwell":
        return 2 if precision == "fp16" else 1
    return {"fp32": 1, "fp16": 8, "int8": 32}[precision]


def read_rows(path: Path) -> list[Row]:
    """The published measurements of one image at a time, on modules of `MODULES`."""
    with path.open(newline="", encoding="utf-8") as file:
        entries = [
            entry for entry in csv.DictReader(file) if entry["batch"] == "1" and entry["device"] in MODULES
        ]
    rows = []
    for entry in entries:
        size = int(entry["input"].split("x")[0])
        operators, c_in, c_out = network(entry["model"], size, int(entry["num_classes"]))
        rows.append(
            Row(
                entry["device"],
                entry["precision"],
                entry["source"],
                float(entry["latency_ms"]),
                operators,
                c_in,
                c_out,
            )
        )
    return rows


@lru_cache
def network(name: str, size: int, classes: int) -> tuple[EstimatedOperators, Floats, Floats]:
    """The weight-bearing operators of a published network, seen by running it without computing anything."""
    import torchvision

    with torch.device("meta"):
        if name.startswith("mobilenet_v1"):
            model = mobilenet_v1(float(name.split("_")[2].replace("p", ".")), classes)
        else:
            extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(name, num_classes=classes, **extra)
        layers: list[SimpleNamespace] = []

        def see(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                grouped = "grouped" if module.groups > 1 else "conv"
                depthwise = module.groups == module.in_channels > 1
                layers.append(
                    SimpleNamespace(
                        kind="depthwise" if depthwise else grouped,
                        kernel=module.kernel_size,
                        groups=module.groups,
                        group_size=int(depthwise),
                        in_hw=tuple(inputs[0].shape[2:]),
                        out_hw=tuple(output.shape[2:]),
                        images=1,
                        channels=(module.in_channels, module.out_channels),
                    )
                )
            elif isinstance(module, nn.Linear):
                layers.append(
                    SimpleNamespace(
                        kind="linear", kernel=(1, 1), groups=1, group_size=0, in_hw=(1, 1), out_hw=(1, 1),
                        images=1, channels=(module.in_features, module.out_features),
                    )
                )  # fmt: skip

        hooks = [module.register_forward_hook(see) for module in model.modules()]
        model.eval()
        image = torch.empty(1, 3, size, size)
        model(image)
        for hook in hooks:
            hook.remove()
        kernels, moved = count_non_gemm(lambda: model(image), len(layers))
    channels = np.asarray([layer.channels for layer in layers], dtype=np.float64)
    return EstimatedOperators(layers, kernels, moved / channels[:, 1]), channels[None, :, 0], channels[None, :, 1]


def mobilenet_v1(multiplier: float, classes: int) -> nn.Module:
    """MobileNet-V1 (arXiv 1704.04861): only its shapes matter here."""
    widths = [32, 64, 128, 128, 256, 256, *([512] * 6), 1024, 1024]
    strides = [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    width = [int(count * multiplier) for count in widths]
    layers: list[nn.Module] = [nn.Conv2d(3, width[0], 3, strides[0], 1)]
    for before, after, stride in zip(width, width[1:], strides[1:], strict=False):
        layers += [nn.Conv2d(before, before, 3, stride, 1, groups=before), nn.Conv2d(before, after, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width[-1], classes))
