"""Whole runs with random latency targets: is every promise kept as measured, and how much of it is left unused?

    python -m benchmarks.latency_targets                # 20 runs on digits, between 30 % and 90 % of the dense latency

Each run goes the whole road (search, measurement, fine-tuning, export, measurement). Finished runs are kept, so that a
second call goes on. Latency tables are measured once for each network; the machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from compressor.display import RichDisplay
from compressor.pipeline import compress, resume
from compressor.progress import shown_on
from compressor.recipe import Recipe
from compressor.run_dir import write_atomic

MODELS = ("cifar_resnet20", "resnet18", "mobilenet_v2", "cifar_resnet32")
LOWEST, HIGHEST = 0.30, 0.90


def targets(runs: int, seed: int) -> list[tuple[str, float]]:
    """(network, share of the dense latency) of every run; the first ones do not depend on how many there are."""
    rng = np.random.default_rng(seed)
    return [
        (MODELS[place % len(MODELS)], round(float(rng.uniform(LOWEST, HIGHEST)), 3)) for place in range(runs)
    ]


def one_run(options: argparse.Namespace, place: int, model: str, share: float) -> dict[str, Any]:
    """Run (or go on with) one target; what the table needs of it."""
    folder = options.out / f"{place:02d}-{model}-{share:.3f}-{options.agent}"
    recipe = Recipe.model_validate(
        {
            "model": model, "epochs": options.epochs, "agent": options.agent, "seed": place,
            "budgets": {"latency": f"{share:.1%}"}, "search": {"max_evaluations": options.evaluations},
            "export": {"engine": False},
        }
    )  # fmt: skip
    started = time.monotonic()
    result = resume(folder) if (folder / "recipe.yaml").exists() else compress(recipe, out=folder)
    budget = result.manifest["budgets"][0]
    return {
        "run": folder.name, "model": model, "share": share, "dense_ms": budget["dense"],
        "target_ms": budget["target"], "predicted_ms": budget["predicted"], "measured_ms": budget["measured"],
        "ratio": budget["measured"] / budget["target"], "kept": budget["kept"], "exit_code": result.exit_code,
        "rounds": len(result.manifest["rounds"]), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print all rows so far, and what they come to."""
    table = Table(title="Latency asked for, predicted and measured")
    for name in ("run", "target ms", "predicted ms", "measured ms", "measured/target", "kept", "rounds", "s"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        table.add_row(
            row["run"], *(f"{row[name]:.4f}" for name in ("target_ms", "predicted_ms", "measured_ms")),
            f"{row['ratio']:.3f}", "yes" if row["kept"] else "no", str(row["rounds"]), f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    ratios = [row["ratio"] for row in rows]
    console.print(
        f"{sum(row['kept'] for row in rows)} of {len(rows)} kept; on average {1 - statistics.mean(ratios):.1%} "
        f"below the target, at least {1 - max(ratios):.1%}, at most {1 - min(ratios):.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--agent", default="knapsack")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/latency_targets"))
    options = parser.parse_args()
    console = Console(width=130)
    path = options.out / "table.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for place, (model, share) in enumerate(targets(options.runs, options.seed)):
        if any(row["run"].startswith(f"{place:02d}-{model}-{share:.3f}-{options.agent}") for row in rows):
            continue
        with shown_on(RichDisplay(console)):
            rows.append(one_run(options, place, model, share))
        write_atomic(path, json.dumps(rows, indent=1) + "\n")
        show(rows, console)
    show(rows, console)
    console.print(f"Saved {path}")


if __name__ == "__main__":
    main()
