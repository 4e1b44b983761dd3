"""Whole runs with random latency targets: is every promise kept as measured, and how much of it is left unused?

    python -m benchmarks.latency_targets                # 20 runs on digits, between 30 % and 90 % of the dense latency
    python -m benchmarks.latency_targets --neighbour    # the same beside busy loops that come and go on each core
    python -m benchmarks.latency_targets --device ssh://me@orin.local --precision fp16

Each run goes the whole road (search, measurement, fine-tuning, export, measurement). Finished runs are kept, so that a
second call goes on. Latency tables are measured once for each network, before any neighbour comes; the machine should
do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from compressor.cli.display import RichDisplay
from compressor.core.files import write_atomic
from compressor.core.progress import shown_on
from compressor.recipe import Recipe
from compressor.run.device import resolved
from compressor.run.job import Job
from compressor.run.pipeline import resume, run_recipe

MODELS = ("cifar_resnet20", "resnet18", "mobilenet_v2", "cifar_resnet32")
LOWEST, HIGHEST = 0.30, 0.90


def targets(runs: int, seed: int) -> list[tuple[str, float]]:
    """(network, share of the dense latency) of every run; the first ones do not depend on how many there are."""
    rng = np.random.default_rng(seed)
    return [
        (MODELS[place % len(MODELS)], round(float(rng.uniform(LOWEST, HIGHEST)), 3)) for place in range(runs)
    ]


def recipe_of(options: argparse.Namespace, place: int, model: str, share: float) -> Recipe:
    """What one target asks for."""
    return Recipe.model_validate(
        {
            "model": model, "epochs": options.epochs, "agent": options.agent, "seed": place,
            "device": options.device, "precision": options.precision,
            "budgets": {"latency": f"{share:.1%}"}, "search": {"max_evaluations": options.evaluations},
            "export": {"engine": False},
        }
    )  # fmt: skip


def one_run(options: argparse.Namespace, place: int, model: str, share: float) -> dict[str, Any]:
    """Run (or go on with) one target; what the table needs of it."""
    folder = options.out / f"{place:02d}-{model}-{share:.3f}-{options.agent}"
    recipe = recipe_of(options, place, model, share)
    started = time.monotonic()
    result = resume(folder) if (folder / "recipe.yaml").exists() else run_recipe(recipe, out=folder)
    budget = result.manifest["budgets"][0]
    return {
        "run": folder.name, "model": model, "share": share, "dense_ms": budget["dense"],
        "target_ms": budget["target"], "predicted_ms": budget["predicted"], "measured_ms": budget["measured"],
        "ratio": budget["measured"] / budget["target"], "kept": budget["kept"],
        "verdict": budget["verdict"], "exit_code": result.exit_code, "rounds": len(result.manifest["rounds"]),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


LOOP = """
import os, random, sys, time
core, parent = random.Random(int(sys.argv[1])), int(sys.argv[2])
while os.getppid() == parent:
    end = time.monotonic() + core.uniform(0.5, 8.0)
    while time.monotonic() < end:
        sum(range(10_000))
    time.sleep(core.uniform(0.5, 8.0))
"""
"""A neighbour: busy and away for half a second to eight seconds each, until its parent ends."""


@contextmanager
def neighbours(wanted: bool) -> Iterator[None]:
    """A busy loop that comes and goes on each core, where that is wanted."""
    cores = sorted(os.sched_getaffinity(0)) if wanted else []
    with ExitStack() as stack:
        for core in cores:
            child = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", LOOP, str(core), str(os.getpid())])
            )
            stack.callback(child.kill)
            os.sched_setaffinity(child.pid, {core})
        yield


def measure_tables(options: argparse.Namespace) -> None:
    """Measure the latency table of each network that is run, or find it in the cache."""
    for model in dict.fromkeys(model for model, _ in targets(options.runs, options.seed)):
        Job.prepare(resolved(recipe_of(options, 0, model, 0.5)))


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print all rows so far, and what they come to."""
    table = Table(title="Latency requested, predicted and measured")
    for name in ("run", "target ms", "predicted ms", "measured ms", "measured/target", "kept", "rounds", "s"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        table.add_row(
            row["run"], *(f"{row[name]:.4f}" for name in ("target_ms", "predicted_ms", "measured_ms")),
            f"{row['ratio']:.3f}", row["verdict"], str(row["rounds"]), f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    ratios = [row["ratio"] for row in rows]
    rounds, seconds = (statistics.mean(row[name] for row in rows) for name in ("rounds", "seconds"))
    console.print(
        f"{sum(bool(row['kept']) for row in rows)} of {len(rows)} kept; on average {1 - statistics.mean(ratios):.1%} "
        f"below the target, at least {1 - max(ratios):.1%}, at most {1 - min(ratios):.1%}; "
        f"{rounds:.1f} rounds and {seconds:.0f} s a run"
    )


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--agent", default="knapsack")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--neighbour", action="store_true", help="beside busy loops that come and go on each core")
    parser.add_argument("--device", default="local", help="as for compress; by default this machine, its GPU if there")
    parser.add_argument("--precision", default="auto", help="as for compress")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.out = options.out or Path("runs/latency_targets" + "-neighbour" * options.neighbour)
    return options


def main() -> None:
    options = parsed()
    console = Console(width=130)
    path = options.out / "table.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    measure_tables(options)
    for place, (model, share) in enumerate(targets(options.runs, options.seed)):
        if any(row["run"].startswith(f"{place:02d}-{model}-{share:.3f}-{options.agent}") for row in rows):
            continue
        with shown_on(RichDisplay(console)), neighbours(options.neighbour):
            rows.append(one_run(options, place, model, share))
        write_atomic(path, json.dumps(rows, indent=1) + "\n")
        show(rows, console)
    show(rows, console)
    console.print(f"Saved {path}")


if __name__ == "__main__":
    main()
