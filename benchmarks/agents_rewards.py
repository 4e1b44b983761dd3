"""A reward after every group against one at the end: what the stepwise agent's episodes are worth, one after another.

    python -m benchmarks.agents_rewards --data folder:/data/cifar10-jpeg --weights resnet20.pt

Both variants play the same number of episodes on the same pretrained weights; the accuracies are those of the plans
that the episodes end with, on the search split. Printed are the mean over seeds in each tenth of the episodes, the best
so far, and after how many episodes the dense rewards' agent has what the other one has in the end. Every run is kept as
a file, and one that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from compressor.core.files import write_atomic
from compressor.core.records import Checkpoint, EpisodeLog
from compressor.recipe import Recipe
from compressor.run.job import prepare
from compressor.run.search_setup import environment
from compressor.search.candidate import Limits
from compressor.search.registry import create_agent

VARIANTS = ("dense", "terminal")
PARTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--params", default="50%")
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--search-images", type=int, default=500)
    parser.add_argument("--batch-norm-batches", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/agents_rewards"))
    options = parser.parse_args()
    console = Console(width=130)
    runs = []
    for seed in options.seeds:
        for variant in VARIANTS:
            runs.append(one_run(options, variant, seed))
        show(runs, console)
    path = options.out / "curves.json"
    write_atomic(path, json.dumps({"runs": runs, "summary": summary(runs)}, indent=1) + "\n")
    console.print(f"Saved {path}")


def one_run(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Play (or go on playing) the episodes of one variant; their final accuracies in order."""
    folder = options.out / f"{options.model}-{options.params.rstrip('%')}-{options.episodes}-{variant}-{seed}"
    path = folder / "result.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    recipe = Recipe.model_validate(
        {
            "model": options.model,
            "data": options.data,
            "weights": options.weights,
            "agent": "stepwise",
            "seed": seed,
            "budgets": {"params": options.params},
            "pruning": {"granularity": 1},
            "search": {
                "search_images": options.search_images,
                "batch_norm_batches": options.batch_norm_batches,
            },
        }
    ).resolved()
    job = prepare(recipe)
    env, evaluator = environment(job, job.budgets())
    # The paper's way: nothing but the rewards teaches the network.
    paper = {"actions": "alpha", "warm_start": False, "near_share": 0.0}
    settings = {"rewards": variant, "episodes": options.episodes, **paper}
    agent = create_agent("stepwise", seed=seed, settings=settings)
    folder.mkdir(parents=True, exist_ok=True)
    log, checkpoint = EpisodeLog(folder / "episodes.jsonl"), Checkpoint(folder / "state.pt")
    result = agent.search(env, evaluator, Limits(), log=log, checkpoint=checkpoint)
    curve = [candidate.accuracy for candidate in result.candidates if candidate.phase == "stepwise"]
    found = {"rewards": variant, "seed": seed, "curve": curve, "evaluations": result.evaluations}
    write_atomic(path, json.dumps(found) + "\n")
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and how soon the dense rewards' agent is where the other ends (None: not in its episodes).

    The level is the mean of the last tenth of the episodes (what the policy does) and the best of all (what a search
    returns); it is reached in the first episode after which the mean over a tenth of the episodes, or the best so far,
    is as high.
    """
    curves = {name: np.array([run["curve"] for run in runs if run["rewards"] == name]) for name in VARIANTS}
    width = max(1, curves["terminal"].shape[1] // PARTS)
    kernel = np.ones(width) / width
    smooth = {
        n: np.array([np.convolve(c, kernel, "valid") for c in found]).mean(axis=0)
        for n, found in curves.items()
    }
    best = {name: np.maximum.accumulate(found, axis=1).mean(axis=0) for name, found in curves.items()}
    at_policy = np.flatnonzero(smooth["dense"] >= smooth["terminal"][-1])
    at_best = np.flatnonzero(best["dense"] >= best["terminal"][-1])
    return {
        "episodes": int(curves["terminal"].shape[1]),
        "smoothed": {name: curve.round(4).tolist() for name, curve in smooth.items()},
        "best_so_far": {name: curve.round(4).tolist() for name, curve in best.items()},
        "policy_reached_after": int(at_policy[0]) + width if len(at_policy) else None,
        "best_reached_after": int(at_best[0]) + 1 if len(at_best) else None,
    }


def show(runs: list[dict[str, Any]], console: Console) -> None:
    """Print both curves, by tenths of the episodes."""
    told = summary(runs)
    table = Table(title=f"Accuracy of the episodes' plans, mean over {len(runs) // len(VARIANTS)} seeds")
    for name in (
        "episode",
        *(f"{kind}, {name}" for kind in ("mean of a tenth", "best so far") for name in VARIANTS),
    ):
        table.add_column(name, justify="right")
    step = max(1, told["episodes"] // PARTS)
    for end in range(step, told["episodes"] + 1, step):
        row = [told["smoothed"][name][end - step] for name in VARIANTS]
        row += [told["best_so_far"][name][end - 1] for name in VARIANTS]
        table.add_row(str(end), *(f"{value:.2%}" for value in row))
    console.print(table)
    for what in ("policy", "best"):
        after = told[f"{what}_reached_after"]
        reached = "not" if after is None else f"after {after} of {told['episodes']} episodes"
        console.print(f"What the terminal reward's {what} has in the end, the dense rewards' has {reached}.")


if __name__ == "__main__":
    main()
