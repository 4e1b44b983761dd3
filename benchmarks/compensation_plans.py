"""Whether compensation ever makes a network worse: `python -m benchmarks.compensation_plans`.

Random plans (every width at random, random channels) of torchvision networks with seeded random weights are compensated
by both methods. The outputs of the cut and of the compensated network are then compared with the dense network's on
fresh images, which neither the fit nor any of its choices saw. Images are sums of noise of all scales; the statistics
of batch norms are those of such images, since untrained networks have none that fit.

Results are kept in benchmarks/results/compensation_plans.json; plans that are in it are not run again. The page is
docs/results/compensation.md. The exit code is 1 if a compensated network is worse than the cut one.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from compressor.pruning.compensate import DenseMoments, compensate
from compressor.pruning.space import PruningSpace
from compressor.pruning.verdict import difference

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compensation_plans.json"
PAGE = HERE.parent / "docs" / "results" / "compensation.md"
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenet_v2": {},
    "efficientnet_b0": {},
    "densenet121": {},
    "regnet_y_400mf": {},
    "shufflenet_v2_x1_0": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "mnasnet1_0": {},
    "convnext_tiny": {"layer_scale": 0.3},  # its 1e-6 would make every block vanish
    "swin_t": {},
}
METHODS = ("layers", "moments")
SIZE = 32
"""Pixels of an image."""
CALIBRATION, FRESH = 128, 64
"""Images that compensation has, and those on which both networks are compared."""


def images(count: int, seed: int) -> Tensor:
    """Return sums of noise of all scales, (count, 3, SIZE, SIZE), each image of mean 0 and variance 1."""
    random = torch.Generator().manual_seed(seed)
    scales = [2**power for power in range(1, SIZE.bit_length())]
    noise = [torch.randn(count, 3, side, side, generator=random) for side in scales]
    whole = [nn.functional.interpolate(each, (SIZE, SIZE), mode="bilinear") for each in noise]
    summed = torch.stack(whole).sum(0)
    return (summed - summed.mean((1, 2, 3), keepdim=True)) / summed.std((1, 2, 3), keepdim=True)


def network(name: str) -> nn.Module:
    """Return a network with random weights, and batch-norm statistics of the images."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None, **NETWORKS[name]).eval()
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(images(128, seed=2))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def examine(name: str, plans: int) -> list[dict[str, Any]]:
    """Compensate random plans of one network; errors are shares of the squares of the dense network's outputs."""
    model = network(name)
    space = PruningSpace(model, torch.zeros(1, 3, SIZE, SIZE))
    calibration, fresh = [images(CALIBRATION, seed=0)], images(FRESH, seed=1)
    moments, found = DenseMoments(space, calibration), []

    def outputs(network: nn.Module) -> list[list[Tensor]]:
        with torch.no_grad():
            return [[network(fresh)]]

    exact = outputs(model)
    for seed in range(plans):
        random = np.random.default_rng(seed)
        plan = space.plan(space.random_widths(random), importance="random", seed=seed)
        widths = space.widths(plan.widths)
        row: dict[str, Any] = {
            "macs": round(space.macs(widths) / space.macs(space.dense_widths), 3),
            "cut": difference(exact, outputs(space.apply(plan))),
        }
        for method in METHODS:
            start = time.perf_counter()
            made = compensate(space, plan, moments if method == "moments" else calibration, method)
            row[method] = {
                "fresh": difference(exact, outputs(made.network)),
                "judged": made.error,
                "refitted": len(made.refitted),
                "left": len(made.left),
                "statistics": made.statistics,
                "seconds": round(time.perf_counter() - start, 2),
            }
        found.append(row)
        print(name, seed, json.dumps(row), flush=True)
    return found


def page(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page with a row per network."""
    every = [row for rows in results.values() for row in rows]
    lines = [
        "# Compensated random plans",
        "",
        "Written by `python -m benchmarks.compensation_plans`; do not edit. [Compensation](../method/compensation.md)",
        "explains the methods.",
        "",
        f"{len(every)} random plans (every width and channel at random) of {len(results)} torchvision networks with "
        f"random weights, {SIZE} px,",
        f"{CALIBRATION} images for compensation. Errors are those of the outputs on {FRESH} fresh images, squared, as "
        "shares of the",
        "squares of the dense network's outputs: medians over plans. *Worst* is the largest error of a plan as a share",
        "of the cut network's, and *worse* counts plans in which it is above 1. *As cut* are plans whose cut network",
        "was returned. *Reported* is the error that compensation reports, as a share of that on fresh",
        "images. Seconds are medians, one thread.",
        "",
    ]
    for method in METHODS:
        ratios = [row[method]["fresh"] / row["cut"] for row in every]
        worse = [ratio - 1 for ratio in ratios if ratio > 1]
        counts = [sum(ratio < 1 for ratio in ratios), sum(ratio == 1 for ratio in ratios), len(worse)]
        lines.append(f"By {method}: closer to the dense network on fresh images {counts[0]}, as cut {counts[1]},")
        lines.append(f"worse {counts[2]}{f' (by {max(worse):.1%} at most)' if worse else ''}.")
    lines += [
        "",
        "| network | MACs | error, cut | method | error | worst | worse | as cut | reported | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        for method in METHODS:
            ratios = [row[method]["fresh"] / row["cut"] for row in rows]
            start = f"| {name} | {median(row['macs'] for row in rows):.0%} | {median(row['cut'] for row in rows):.2f} "
            judged = median(row[method]["judged"] / row[method]["fresh"] for row in rows)
            lines.append(
                f"{start if method == METHODS[0] else '| | | '}| {method} "
                f"| {median(row[method]['fresh'] for row in rows):.2f} | {max(ratios):.3f} "
                f"| {sum(ratio > 1 for ratio in ratios)} "
                f"| {sum(not row[method]['refitted'] for row in rows)} | {judged:.2f} "
                f"| {median(row[method]['seconds'] for row in rows):.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Fill up the results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=10, help="of each network")
    parser.add_argument("--again", action="store_true", help="run networks that have results too")
    parser.add_argument("only", nargs="*", help="names of networks")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in NETWORKS:
        missing = asked.again or len(results.get(name, ())) < asked.plans
        if missing and (not asked.only or name in asked.only):
            results[name] = examine(name, asked.plans)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            results = {each: results[each] for each in NETWORKS if each in results}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    every = [row for rows in results.values() for row in rows]
    return int(any(row[method]["fresh"] > row["cut"] for row in every for method in METHODS))


if __name__ == "__main__":
    raise SystemExit(main())
