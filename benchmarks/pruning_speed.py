"""Speed and memory of the pruning space beside torch-pruning: `python -m benchmarks.pruning_speed [--json
FILE]`.

One run measures, for each network and in turn so that noise hits both alike:
    build     `PruningSpace(...)` against torch-pruning's `DependencyGraph().build_dependency(...)`
    apply     `space.apply(plan)` against deepcopy + pruner + step at the same widths (as far as the pruner keeps them)
and once: the costs of 10,000 candidates of ResNet-50, and the memory after 1,000 applies. Ratios are what
counts; the times are medians of this machine.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor.pruning.space import PruningSpace

NETWORKS = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "convnext_tiny", "vgg16_bn")


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prune_with_torch_pruning(model: nn.Module, example: torch.Tensor, ratio: float) -> nn.Module:
    """deepcopy + pruner + step, as its documentation has it; classifiers stay."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    head = [module for module in small.modules() if isinstance(module, nn.Linear)][-1:]
    pruner = tp.pruner.MetaPruner(
        small,
        example,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=head,
        # Its defaults are shared between calls and would keep every network alive.
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
        num_heads={},
    )
    pruner.step()
    return small


def compare(name: str, repeats: int) -> dict[str, Any]:
    """Medians of one network and their ratios."""
    import torch_pruning as tp
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(1, 3, 224, 224)
    space = PruningSpace(model, example)
    plan = space.uniform(0.5)
    ranking = space.rank("l1")
    times: dict[str, list[float]] = {key: [] for key in ("build", "graph", "apply", "plan", "theirs")}
    for _ in range(repeats):
        times["build"].append(seconds(lambda: PruningSpace(model, example)))
        times["graph"].append(
            seconds(lambda: tp.DependencyGraph().build_dependency(model, example_inputs=example))
        )
        for _ in range(3):
            times["apply"].append(seconds(lambda: space.apply(plan)))
            times["plan"].append(seconds(lambda: space.plan(space.widths(plan.widths), ranking)))
        times["theirs"].append(seconds(lambda: prune_with_torch_pruning(model, example, 0.5)))
    row: dict[str, Any] = {key: statistics.median(values) for key, values in times.items()}
    theirs = prune_with_torch_pruning(model, example, 0.5)
    row |= {
        "network": name,
        "groups": len(space.groups),
        "build_ratio": row["build"] / row["graph"],
        "apply_ratio": row["theirs"] / row["apply"],
        "params": space.params(space.widths(plan.widths)),
        "their_params": sum(p.numel() for p in theirs.parameters()),
    }
    return row


def costs(candidates: int = 10_000) -> float:
    """Seconds for MACs of `candidates` widths of ResNet-50 (best of five)."""
    import torchvision

    space = PruningSpace(torchvision.models.resnet50().eval(), torch.randn(1, 3, 224, 224))
    rng = np.random.default_rng(0)
    low, high = space.min_widths, space.dense_widths
    widths = rng.integers(low, high + 1, size=(candidates, len(low)))
    return min(seconds(lambda: space.macs(widths)) for _ in range(5))


def growth(applies: int = 1000) -> tuple[float, float]:
    """Resident MB before and after many applies of MobileNet-V2."""
    import psutil
    import torchvision

    space = PruningSpace(torchvision.models.mobilenet_v2().eval(), torch.randn(1, 3, 64, 64))
    plans = [space.uniform(ratio, "random") for ratio in (0.25, 0.5, 0.75)]
    process = psutil.Process()
    for plan in plans * 10:
        space.apply(plan)
    gc.collect()
    before = process.memory_info().rss / 2**20
    for index in range(applies):
        space.apply(plans[index % 3])
    gc.collect()
    return before, process.memory_info().rss / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore", module="torch_pruning")
    print(
        "| network | groups | build | their graph | ratio | apply | their deepcopy + step | faster | params | theirs |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in asked.networks:
        row = compare(name, asked.repeats)
        rows.append(row)
        print(
            f"| {name} | {row['groups']} | {row['build'] * 1e3:.0f} ms | {row['graph'] * 1e3:.0f} ms | "
            f"{row['build_ratio']:.2f}x | {row['apply'] * 1e3:.1f} ms | {row['theirs'] * 1e3:.0f} ms | "
            f"{row['apply_ratio']:.1f}x | {row['params']:,} | {row['their_params']:,} |",
            flush=True,
        )
    took = costs()
    before, after = growth()
    print(
        f"\n10,000 costs of ResNet-50: {took * 1e3:.1f} ms. "
        f"1,000 applies: {before:.1f} MB before, {after:.1f} MB after."
    )
    if asked.json:
        asked.json.write_text(
            json.dumps({"rows": rows, "costs_s": took, "memory_mb": [before, after]}, indent=1)
        )


if __name__ == "__main__":
    main()
