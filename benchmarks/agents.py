"""Every agent at equal evaluations and equal fine-tuning: accuracy before and after, budget kept, evaluations, minutes.

    python -m benchmarks.agents --data folder:/data/cifar10-jpeg --weights resnet20.pt

Each agent searches on the same pretrained weights, which stay as they are, with the same number of evaluations (uniform
pruning needs one; what a search really used is in the column "used"); the slim network is then fine-tuned for the same
epochs. With the same seed all agents score on the same images. `--brief 8` trains each candidate for 8 steps before it
is scored. Test accuracy is on images that neither training nor the search has seen. Every cell is kept as a file, a
search that was stopped goes on where it stood, and the table says which cells are missing: the same command fills them.
The latency table is made once, on the first call that needs it; make that one with the machine at rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from compressor.agents.base import Limits
from compressor.agents.registry import AGENTS, create_agent
from compressor.agents.schedule import Schedule
from compressor.job import Job, prepare
from compressor.latency.table import LatencyTable
from compressor.onnx_files import measured
from compressor.recipe import Recipe
from compressor.run_dir import Checkpoint, EpisodeLog, write_atomic
from compressor.stages import environment
from compressor.trainers import trainer
from compressor.training.evaluate import accuracy, reestimate_batch_norm
from export.to_onnx import export_onnx

BUDGETS = ("latency:50%", "latency:30%", "params:50%", "params:30%")


@dataclass(frozen=True)
class Cell:
    """One search: which agent, within which budget, with how many evaluations, which seed, and how many steps of
    training on each candidate."""

    model: str
    budget: str
    evaluations: int
    agent: str
    seed: int
    brief: int = 0

    @property
    def name(self) -> str:
        """The stem of its file."""
        parts = [self.model, self.budget, self.evaluations, self.agent, self.seed]
        parts += [f"brief{self.brief}"] if self.brief else []
        return "-".join(map(str, parts)).replace(":", "-").replace("%", "")


def main() -> None:
    options = parsed()
    console = Console(width=130)
    wanted = cells(options)
    check_settings(options, wanted)
    deadline = time.monotonic() + 60 * options.minutes
    for cell in wanted:
        if not path_of(options, cell).exists() and time.monotonic() < deadline:
            console.print(f"{cell.name} ...", highlight=False)
            write_atomic(path_of(options, cell), json.dumps(run(options, cell), indent=1) + "\n")
            show(options, wanted, console)
    show(options, wanted, console)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[100, 400])
    parser.add_argument("--agents", nargs="+", default=sorted(AGENTS), choices=sorted(AGENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning; 0 leaves it out")
    parser.add_argument("--search-images", type=int, default=2000)
    parser.add_argument("--batch-norm-batches", type=int, default=10)
    parser.add_argument(
        "--brief",
        nargs="+",
        type=int,
        default=[0],
        help="steps of training on each candidate before it is scored",
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after this time")
    parser.add_argument("--out", type=Path, default=Path("runs/agents"))
    return parser.parse_args()


def cells(options: argparse.Namespace) -> list[Cell]:
    """All cells, those first that are compared with each other; uniform pruning has one number of evaluations."""
    found = []
    order = product(options.seeds, options.evaluations, options.budgets, options.agents, options.brief)
    for seed, evaluations, budget, agent, brief in order:
        one = agent == "uniform"
        cell = Cell(options.model, budget, 1 if one else evaluations, agent, seed, 0 if one else brief)
        if cell not in found:
            found.append(cell)
    return found


def path_of(options: argparse.Namespace, cell: Cell) -> Path:
    """Where a cell's result lies."""
    folder: Path = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{cell.name}.json"


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """What all cells of a folder must have in common to be compared."""
    return {name: getattr(options, name) for name in ("epochs", "search_images", "batch_norm_batches")}


def check_settings(options: argparse.Namespace, wanted: list[Cell]) -> None:
    """Refuse to put cells of other settings into one table."""
    for cell in wanted:
        if (path := path_of(options, cell)).exists():
            stored = json.loads(path.read_text())
            for name, value in shared(options).items():
                if cell.agent == "uniform" and name != "epochs":
                    continue  # its plan does not depend on the images
                if stored.get(name, value) != value:
                    raise SystemExit(
                        f"{path} was made with {name} {stored[name]}, not {value}: give another --out, or that value."
                    )


def run(options: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Search, fine-tune, judge."""
    kind, _, limit = cell.budget.partition(":")
    recipe = Recipe.model_validate(
        {
            "model": cell.model,
            "data": options.data,
            "weights": options.weights,
            "agent": cell.agent,
            "seed": cell.seed,
            "epochs": max(1, options.epochs),
            "budgets": {kind: limit},
            "search": {
                "search_images": options.search_images,
                "batch_norm_batches": options.batch_norm_batches,
                "brief_iterations": cell.brief,
            },
        }
    ).resolved()
    job = prepared(options, recipe, kind)
    budgets = job.budgets()
    env, evaluator = environment(job, budgets)
    folder = options.out / "searches" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    agent = create_agent(cell.agent, seed=cell.seed, schedule=Schedule(), settings=recipe.search.settings)
    limits = Limits(max_evaluations=cell.evaluations, use_all=True)
    result = agent.search(
        env,
        evaluator,
        limits,
        log=EpisodeLog(folder / "episodes.jsonl"),
        checkpoint=Checkpoint(folder / "state.pt"),
    )
    slim = job.space.apply(result.best)
    reestimate_batch_norm(slim, job.data.train, batches=10, device=job.torch_device)
    before = accuracy(slim, job.data.test, device=job.torch_device)
    started = time.perf_counter()
    if options.epochs:
        training = trainer(
            job, slim, options.epochs, rate=job.recipe.training.finetune_learning_rate, teach=True
        )
        for _ in range(options.epochs):
            training.run_epoch()
    slim.eval()
    widths = job.space.widths(result.widths)
    costs = {each.name: float(np.asarray(each.predict(widths[None]))[0]) / each.dense for each in budgets}
    return {
        **asdict(cell),
        **shared(options),
        "search_accuracy": result.accuracy,
        "before": before,
        "after": accuracy(slim, job.data.test, device=job.torch_device),
        "kept": all(float(np.asarray(each.predict(widths[None]))[0]) <= each.target for each in budgets),
        "share": costs[kind if kind != "flops" else "macs"],
        "measured_share": measured_share(job, slim, folder) if kind == "latency" else None,
        "used": result.evaluations,
        "search_minutes": result.seconds / 60,
        "evaluation_minutes": result.timing["evaluation"] / 60,
        "finetune_minutes": (time.perf_counter() - started) / 60,
        "widths": dict(result.widths),
        "best_so_far": best_so_far([candidate.reward for candidate in result.candidates]),
    }


def prepared(options: argparse.Namespace, recipe: Recipe, kind: str) -> Job:
    """The job, with the latency table that all cells of a network share."""
    if kind != "latency":
        return prepare(recipe)
    path = options.out / "tables" / f"{recipe.model}.json"
    if path.exists():
        return prepare(recipe, LatencyTable.read(path))
    job = prepare(recipe)
    assert job.table is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    job.table.write(path)
    return job


def measured_share(job: Job, slim: Any, folder: Path) -> float:
    """Time of the slim network over that of the dense one, measured in turn on this machine."""
    import torch

    example = torch.zeros(1, *job.data.input_shape)
    dense_path, slim_path = folder / "dense.onnx", folder / "slim.onnx"
    export_onnx(job.model, example, dense_path)
    export_onnx(slim, example, slim_path)
    dense, ours = measured(dense_path, slim_path, job.recipe.threads, job.recipe.contract.repeats)
    return float(ours.median_ms / dense.median_ms)


def best_so_far(rewards: list[float]) -> list[float]:
    """The best reward after each candidate, those of partial plans included."""
    return [round(float(value), 5) for value in np.maximum.accumulate(rewards)] if rewards else []


def show(options: argparse.Namespace, wanted: list[Cell], console: Console) -> None:
    """Print the table, mean and spread over the seeds, what is missing, and save it beside the cells."""
    done = {
        cell: json.loads(path_of(options, cell).read_text())
        for cell in wanted
        if path_of(options, cell).exists()
    }
    rows = []
    table = Table(
        title=f"{options.model}: test accuracy before -> after {options.epochs} epochs of fine-tuning"
    )
    names = (
        "budget",
        "agent",
        "brief",
        "evaluations",
        "used",
        "before",
        "after",
        "share",
        "measured",
        "kept",
        "minutes",
        "seeds",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("budget", "agent") else "right")
    groups = dict.fromkeys(replace(cell, seed=0) for cell in wanted)
    for group in groups:
        row = asdict(group) | summary([done[cell] for cell in done if replace(cell, seed=0) == group])
        rows.append(row)
        table.add_row(*(str(row[name]) for name in names))
    missing = [cell.name for cell in wanted if cell not in done]
    console.print(table)
    if missing:
        console.print(f"{len(missing)} of {len(wanted)} cells are missing; the same command fills them.")
    saved = {"rows": rows, "cells": [*done.values()], "missing": missing}
    write_atomic(options.out / f"table-{options.model}.json", json.dumps(saved, indent=1) + "\n")


def summary(of: list[dict[str, Any]]) -> dict[str, str]:
    """One row of the table from the cells of its seeds."""
    if not of:
        names = ("used", "before", "after", "share", "measured", "kept", "minutes")
        return dict.fromkeys(names, "-") | {"seeds": "0"}

    def spread(name: str) -> str:
        values = [entry[name] for entry in of]
        text = f"{statistics.mean(values):.2%}"
        return text if len(values) == 1 else f"{text} ±{100 * statistics.stdev(values):.2f}"

    shares = [entry["measured_share"] for entry in of if entry["measured_share"] is not None]
    return {
        "used": f"{statistics.mean(entry['used'] for entry in of):.0f}",
        "before": spread("before"),
        "after": spread("after"),
        "share": f"{statistics.mean(entry['share'] for entry in of):.1%}",
        "measured": f"{statistics.mean(shares):.1%}" if shares else "",
        "kept": "yes" if all(entry["kept"] for entry in of) else "no",
        "minutes": f"{statistics.mean(entry['search_minutes'] for entry in of):.1f}",
        "seeds": str(len(of)),
    }


if __name__ == "__main__":
    main()
