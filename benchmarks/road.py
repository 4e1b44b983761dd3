"""Agents against uniform pruning on real images: the same latency on this machine, the same epochs, the same seed.

    python -m benchmarks.road --data folder:/data/cifar10-jpeg --weights resnet20.pt

Runs the whole road once for every agent and seed, prints the table and saves it with the runs' manifests. The latency
table and the dense network's time are measured once and shared. Finished runs are kept, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressor.cli.display import RichDisplay
from compressor.core.progress import shown_on
from compressor.recipe import Recipe
from compressor.run.pipeline import resume, run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--latency", default="60%")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--agents", nargs="+", default=["joint", "knapsack", "uniform"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/road"))
    options = parser.parse_args()
    console = Console(width=130)  # the table has twelve columns
    rows = []
    for seed in options.seeds:
        for agent in options.agents:
            with shown_on(RichDisplay(console)):
                rows.append(one_run(options, agent, seed))
            show(rows, console)
    path = options.out / "table.json"
    path.write_text(json.dumps(rows, indent=2) + "\n")
    console.print(f"Saved {path}")


def one_run(options: argparse.Namespace, agent: str, seed: int) -> dict[str, Any]:
    """Run (or go on with) one agent's whole road; what the table needs of it."""
    folder = options.out / f"{options.model}-{options.latency.rstrip('%')}-{options.epochs}-{agent}-{seed}"
    recipe = Recipe.model_validate(
        {
            "model": options.model,
            "data": options.data,
            "weights": options.weights,
            "epochs": options.epochs,
            "agent": agent,
            "seed": seed,
            "budgets": {"latency": options.latency},
            "search": {"max_evaluations": options.evaluations},
        }
    )
    result = resume(folder) if (folder / "recipe.yaml").exists() else run_recipe(recipe, out=folder)
    manifest = result.manifest
    stages = {name: stage["seconds"] for name, stage in manifest["stages"].items()}
    timing = manifest["search"]["timing"]
    return {
        "agent": agent,
        "seed": seed,
        "kept": manifest["budgets"][0]["kept"],
        "evaluations": manifest["search"]["evaluations"],
        **{name: manifest["accuracy"].get(name) for name in ("dense", "pruned", "finetuned", "exported")},
        **{name: manifest["latency"][name] for name in ("dense_ms", "predicted_ms", "measured_ms")},
        "target_ms": manifest["budgets"][0]["target"],
        "macs_share": manifest["cost"]["slim"]["macs"] / manifest["cost"]["dense"]["macs"],
        "stages_s": stages,
        "neither_share": timing["agent"] / timing["total"],
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print all rows so far, and the means over seeds where there are several."""
    table = Table(title="Test accuracy at equal latency and equal epochs")
    names = (
        "agent", "seed", "dense", "pruned", "fine-tuned", "target ms", "predicted ms", "measured ms", "kept", "MACs",
        "evaluations", "neither",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["agent"], str(row["seed"]), *(f"{row[name]:.2%}" for name in ("dense", "pruned", "finetuned")),
            *(f"{row[name]:.3f}" for name in ("target_ms", "predicted_ms", "measured_ms")),
            "yes" if row["kept"] else "no", f"{row['macs_share']:.0%}", str(row["evaluations"]),
            f"{row['neither_share']:.1%}",
        )  # fmt: skip
    console.print(table)
    for agent in dict.fromkeys(row["agent"] for row in rows):
        mine = [row["finetuned"] for row in rows if row["agent"] == agent]
        if len(mine) > 1:
            spread = statistics.stdev(mine)
            console.print(f"{agent}: {statistics.mean(mine):.2%} +- {spread:.2%} over {len(mine)} seeds")


if __name__ == "__main__":
    main()
