"""Evaluations per second of a search's evaluator in this process, in several, and with Ray.

    python -m benchmarks.search_workers --data folder:PATH --weights cifar_resnet20=FILE cifar_resnet56=FILE

Each candidate is compensated and scored on 2,000 images as a search of trained weights does it (`--compensate off`:
batch-norm statistics from 10 batches of 128), after all workers have started: one candidate at a time on all cores, one
with one thread, and one on each worker with one thread. With one thread the accuracies must be the same to the last
digit. All ways are taken in turns, and the medians of the rounds count. Prints a table and writes it as JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor.data import load_data
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.sites import open_site
from compressor.training.classification import Classification
from export.convert.ort import available_cores


def measure(
    given: argparse.Namespace, space: PruningSpace, data: Any, workers: int | str, threads: int, plans: list[Any]
) -> dict[str, Any]:
    """Seconds for the plans, after one was scored on each worker."""
    evaluator = Evaluator(
        space,
        Classification.of(data),
        Scoring(bn_batches=given.batches, compensate=given.compensate),
        search_images=given.images,
        site=open_site(workers, threads, 600),
        threads=threads,
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
        "threads": threads,
        "through": "ray" if isinstance(workers, str) else "processes" if workers > 1 else "this process",
        "first_seconds": starting,
        "per_second": len(plans) / seconds,
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
    parser.add_argument("--compensate", default="quick", choices=["off", "quick", "moments"])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all ways")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("search_workers.json"))
    given = parser.parse_args()
    data = load_data(given.data, seed=0)
    rows = []
    for pair in given.weights:
        name, _, weights = pair.partition("=")
        model = create_model(name, data.num_classes, weights or "none", data.input_shape)
        space = PruningSpace(model, torch.zeros(1, *data.input_shape))
        ranking, generator = space.rank("l1"), np.random.default_rng(0)
        plans = [space.plan(space.random_widths(generator), ranking) for _ in range(given.candidates)]
        ways: list[tuple[int | str, int]] = [(1, available_cores()), (1, 1), (given.workers, 1)]
        if find_spec("ray") and not given.no_ray:
            ways.append(("ray://local", 1))
        rounds = [
            [measure(given, space, data, *way, plans) for way in ways] for _ in range(given.repeats)
        ]
        for number, (_, threads) in enumerate(ways):
            found = [each[number] for each in rounds]
            row = found[0] | {
                name: round(statistics.median(each[name] for each in found), 3)
                for name in ("first_seconds", "per_second")
            }
            same = threads > 1 or all(each["accuracies"] == rounds[0][1]["accuracies"] for each in found)
            del row["accuracies"]
            rows.append({"model": name, **row, "same": same})
            print(
                f"{name:18} {row['workers']} x {row['through']:13} {threads} threads {row['per_second']:7.3f} "
                f"candidates/s, first ones after {row['first_seconds']:.1f} s, "
                f"same accuracies: {'yes' if same else 'NO'}",
                flush=True,
            )
    given.out.write_text(
        json.dumps({"cores": available_cores(), "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
