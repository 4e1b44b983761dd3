"""Which networks the pruning space covers: `python -m benchmarks.pruning_coverage` writes docs/results/coverage.md.

Every network is traced, then pruned by a random plan, to half of every group, and to the smallest; each slim
network runs, its outputs keep the dense shapes, and its MACs and parameters fall and equal the formulas
(MACs by fvcore). A network that fails any of this is listed as failed, and the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.checks import count_macs
from compressor.pruning.space import PruningSpace

TIMM = [
    "resnet26d",
    "resnetv2_50",
    "ecaresnet26t",
    "seresnext26d_32x4d",
    "skresnet18",
    "resnest14d",
    "res2net50_26w_4s",
    "mobilenetv1_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium",
    "tf_efficientnetv2_b0",
    "mixnet_s",
    "fbnetc_100",
    "ghostnet_100",
    "lcnet_050",
    "regnety_002",
    "densenet121",
    "vovnet39a",
    "dla34",
    "cspresnet50",
    "cspdarknet53",
    "hrnet_w18_small",
    "nfnet_l0",
    "xception41",
    "inception_v4",
    "rexnet_100",
    "selecsls42b",
    "repvgg_a0",
    "tresnet_m",
    "convnext_atto",
    "convnextv2_atto",
    "convmixer_768_32",
    "mixer_s32_224",
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "poolformer_s12",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "fastvit_t8",
    "efficientformer_l1",
    "levit_128s",
    "coat_lite_tiny",
    "xcit_nano_12_p16_224",
    "visformer_tiny",
    "coatnet_nano_rw_224",
    "beit_base_patch16_224",
    "inception_next_atto",
    "starnet_s1",
    "repvit_m0_9",
    "efficientvit_b0",
    "focalnet_tiny_srf",
    "davit_tiny",
    "dpn48b",
]


@dataclass(frozen=True)
class Row:
    """What was found for one network."""

    name: str
    error: str
    groups: int = 0
    least_macs: float = 1.0
    least_params: float = 1.0
    skipped: tuple[tuple[str, int], ...] = ()


def networks(heavy: bool) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, builder and input shape of every network of the table."""
    import timm
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        if heavy or name not in ("vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_128gf"):
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            yield (
                name,
                lambda n=name, o=options: torchvision.models.get_model(n, weights=None, **o),
                _input(name),
            )  # type: ignore[misc]
    for name in TIMM:
        config = timm.get_pretrained_cfg(name)
        size = tuple(config.input_size) if config is not None else (3, 224, 224)
        yield f"timm:{name}", lambda n=name: timm.create_model(n), (1, *size)  # type: ignore[misc]
    from compressor.models import create_model

    for name in ("cifar_resnet20", "cifar_resnet56", "cifar_mobilenet_v2"):
        yield name, lambda n=name: create_model(n, 10), (1, 3, 32, 32)  # type: ignore[misc]
    from tests.pruning.networks import UNet, Zoo

    yield "U-Net", UNet, (1, 3, 64, 64)
    yield "hand-written (see tests/pruning/networks.py)", Zoo, (1, 3, 32, 32)
    detection = torchvision.models.detection
    yield (
        "SSD300 VGG-16 backbone",
        lambda: detection.ssd300_vgg16(weights=None, weights_backbone=None).backbone,
        (1, 3, 300, 300),
    )
    yield (
        "SSDlite320 MobileNet-V3 backbone",
        lambda: detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone,
        (1, 3, 320, 320),
    )
    yield (
        "RetinaNet ResNet-50 FPN backbone",
        lambda: detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone,
        (1, 3, 224, 224),
    )


def _input(name: str) -> tuple[int, ...]:
    if name == "vit_h_14":
        return (1, 3, 224, 224)
    if name.startswith(("vit", "maxvit")):
        return (1, 3, 224, 224)
    return (1, 3, 96, 96) if name != "alexnet" else (1, 3, 80, 80)


def examine(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], count: bool = True) -> Row:
    """One row; `count` compares with fvcore too."""
    torch.manual_seed(0)
    model, example = build().eval(), torch.randn(shape)
    try:
        space = PruningSpace(model, example)
    except CompressorError as error:
        return Row(name, str(error))
    with torch.no_grad():
        expected = shapes(model(example))
    dense = (space.macs(space.dense_widths), space.params(space.dense_widths))
    problem = "" if space.groups else "nothing can be pruned"
    rng = np.random.default_rng(0)
    least = (1.0, 1.0)
    plans = {
        "random": space.plan(space.random_widths(rng), "random"),
        "half": space.uniform(0.5, "random"),
        "smallest": space.smallest("random"),
    }
    for kind, plan in plans.items():
        small = space.apply(plan)
        widths = space.widths(plan.widths)
        with torch.no_grad():
            found = shapes(small(example))
        params = sum(parameter.numel() for parameter in small.parameters())
        costs = (space.macs(widths), space.params(widths))
        if found != expected:
            problem = f"{kind}: outputs {found} instead of {expected}"
        elif costs[1] != params:
            problem = f"{kind}: {params} parameters instead of {costs[1]}"
        elif (
            listed := int(space.layer_macs(widths).sum() + sum(space.other_macs(widths).values()))
        ) != costs[0]:
            problem = (
                f"{kind}: the layers and what is beside them add up to {listed}, the formula to {costs[0]}"
            )
        elif not (costs[0] < dense[0] and costs[1] < dense[1]):
            problem = f"{kind}: costs do not fall"
        elif count and (counted := count_macs(small, (example,))[0]) != costs[0]:
            problem = f"{kind}: fvcore counts {counted}, the formula {costs[0]}"
        least = (costs[0] / dense[0], costs[1] / dense[1])
    reasons = Counter(skipped.reason.partition(" (in ")[0] for skipped in space.skipped)
    return Row(name, problem, len(space.groups), least[0], least[1], tuple(reasons.most_common()))


def shapes(out: Any) -> list[tuple[int, ...]]:
    """Shapes of all tensors in a network's output."""
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else [out]
    return [tuple(value.shape) for value in values if isinstance(value, Tensor)]


def table(rows: list[Row]) -> str:
    """The page."""
    import timm
    import torchvision

    good = sum(not row.error for row in rows)
    lines = [
        "# Networks that can be pruned",
        "",
        "Written by `python -m benchmarks.pruning_coverage`; do not edit. For each network a random plan, half of",
        "every group and the smallest plan were applied; the slim networks ran, kept the shapes of their outputs, and",
        "cost what the formulas say (MACs by fvcore, to the last digit). *Smallest* is what the default least widths",
        "(a tenth) leave of MACs and parameters.",
        "",
        f"{good} of {len(rows)} networks pass, with torch {torch.__version__.partition('+')[0]}, torchvision "
        f"{torchvision.__version__.partition('+')[0]} and timm {timm.__version__}.",
        "",
        "| network | groups | smallest MACs | smallest params | left dense (parts: reason) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.name} | **fails**: {row.error} | | | |")
            continue
        skipped = "; ".join(f"{count}: {reason}" for reason, count in row.skipped)
        lines.append(
            f"| {row.name} | {row.groups} | {row.least_macs:.1%} | {row.least_params:.1%} | {skipped} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results" / "coverage.md")
    parser.add_argument(
        "--light", action="store_true", help="leave out the four networks above 300 million parameters"
    )
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name, build, shape in networks(heavy=not asked.light):
        start = time.perf_counter()
        rows.append(examine(name, build, shape))
        print(
            f"{name:40s} {rows[-1].error or 'ok'} {time.perf_counter() - start:.1f}s",
            file=sys.stderr,
            flush=True,
        )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(table(rows))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
