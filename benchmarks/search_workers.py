"""Evaluations per second of a search's evaluator with one worker, several, and Ray.

    python -m benchmarks.search_workers --data folder:PATH --weights cifar_resnet20=FILE cifar_resnet56=FILE

Each candidate is scored as a search does it (batch-norm statistics from 10 batches of 128, 2,000 images), one
thread a worker, after all workers have started. The accuracies must be the same to the last digit. Prints a table and
writes it as JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.data import load_data
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from compressor.search.evaluate import Evaluator
from compressor.search.sites import open_site
from compressor.training.classification import Classification


def measure(
    space: PruningSpace, data: Any, images: int, batches: int, workers: int | str, plans: list[Any]
) -> dict[str, Any]:
    """Seconds for the plans, after one was scored on each worker."""
    site = open_site(workers, 1, 600)
    evaluator = Evaluator(
        space, Classification.of(data), search_images=images, bn_batches=batches, site=site, threads=1
    )
    started = time.perf_counter()
    evaluator.many([space.uniform(0.9 - 0.1 * i) for i in range(evaluator.workers)])
    starting = time.perf_counter() - started
    started = time.perf_counter()
    accuracies = evaluator.many(plans)
    seconds = time.perf_counter() - started
    evaluator.close()
    return {
        "workers": evaluator.workers if isinstance(workers, str) else workers,
        "through": "ray" if isinstance(workers, str) else "processes" if workers > 1 else "this process",
        "first_seconds": round(starting, 2),
        "per_second": round(len(plans) / seconds, 3),
        "accuracies": accuracies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="as for compress")
    parser.add_argument(
        "--weights", nargs="+", default=["cifar_resnet20=none"], help="MODEL=FILE, or MODEL=none"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=10, help="for batch-norm statistics")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("search_workers.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(given.data, seed=0)
    rows = []
    for pair in given.weights:
        name, _, weights = pair.partition("=")
        model = create_model(name, data.num_classes, weights or "none", data.input_shape)
        space = PruningSpace(model, torch.zeros(1, *data.input_shape))
        ranking, generator = space.rank("l1"), np.random.default_rng(0)
        plans = [space.plan(space.random_widths(generator), ranking) for _ in range(given.candidates)]
        ways: list[int | str] = [1, given.workers]
        if find_spec("ray") and not given.no_ray:
            ways.append("ray://local")
        found = [measure(space, data, given.images, given.batches, way, plans) for way in ways]
        accuracies = [row.pop("accuracies") for row in found]
        for row, own in zip(found, accuracies, strict=True):
            same = own == accuracies[0]
            rows.append(
                {"model": name, **row, "same": same, "times": row["per_second"] / found[0]["per_second"]}
            )
            print(
                f"{name:18} {row['workers']} x {row['through']:13} {row['per_second']:7.3f} candidates/s "
                f"({rows[-1]['times']:.2f} times), first ones after {row['first_seconds']:.1f} s, "
                f"same accuracies: {'yes' if same else 'NO'}",
                flush=True,
            )
    given.out.write_text(
        json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
