"""Every agent at equal evaluations and equal fine-tuning: accuracy before and after, budget kept, evaluations, minutes.

    python -m benchmarks.agents --data folder:/data/cifar10-jpeg --weights resnet20.pt

Each agent searches on the same pretrained weights, which stay as they are, with the same number of evaluations (uniform
pruning needs one; what a search really used is in the column "used"); the slim network is then fine-tuned for the same
epochs. With the same seed all agents score on the same images. `--brief 8` trains each candidate for 8 steps before it
is scored. Test accuracy is on images that neither training nor the search has seen. Every cell is kept as a file, a
search that was stopped goes on where it stood, and docs/results-agents.md is written anew after each: all cells of
`--out`, of whatever network, and which are missing; the same command fills them.
The latency table is made once, on the first call that needs it; make that one with the machine at rest. Once for each
network, too, the accuracy of the given weights is taken; other weights for the same network are refused.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.agents_page import Cell, page, show
from compressor.agents.base import Limits
from compressor.agents.registry import AGENTS, create_agent
from compressor.agents.schedule import Schedule
from compressor.job import Job, prepare
from compressor.latency.table import LatencyTable
from compressor.onnx_files import measured
from compressor.recipe import Recipe
from compressor.run_dir import Checkpoint, EpisodeLog, sha256_file, write_atomic
from compressor.surroundings import environment
from compressor.trainers import trainer
from compressor.training.evaluate import accuracy, reestimate_batch_norm
from export.to_onnx import export_onnx

BUDGETS = ("latency:50%", "latency:30%", "params:50%", "params:30%")
MODELS = ("cifar_resnet20", "cifar_resnet56", "cifar_mobilenet_v2", "cifar_vgg16_bn")
ORDER = tuple(dict.fromkeys(("uniform", "random", "knapsack", *AGENTS)))  # the yardsticks first


def main() -> None:
    options = parsed()
    console = Console(width=150)
    wanted = cells(options, options.model)
    check_settings(options)
    deadline = time.monotonic() + 60 * options.minutes
    for cell in wanted:
        if not options.page_only and not path_of(options, cell).exists() and time.monotonic() < deadline:
            console.print(f"{cell.name} ...", highlight=False)
            write_atomic(path_of(options, cell), json.dumps(run(options, cell), indent=1) + "\n")
            write(options, console)
    write(options, console)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[100, 400])
    parser.add_argument("--agents", nargs="+", default=list(ORDER), choices=sorted(AGENTS))
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
    parser.add_argument("--page", type=Path, default=Path("docs/results-agents.md"))
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    return parser.parse_args()


def cells(options: argparse.Namespace, model: str) -> list[Cell]:
    """All cells of a network, those first that are compared; uniform pruning has one number of evaluations."""
    found = []
    order = product(options.seeds, options.evaluations, options.budgets, options.agents, options.brief)
    for seed, evaluations, budget, agent, brief in order:
        one = agent == "uniform"
        cell = Cell(model, budget, 1 if one else evaluations, agent, seed, 0 if one else brief)
        if cell not in found:
            found.append(cell)
    return found


def path_of(options: argparse.Namespace, cell: Cell | None = None) -> Path:
    """Where a cell's result lies, or all of them."""
    folder: Path = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    return folder if cell is None else folder / f"{cell.name}.json"


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """What all cells of a folder must have in common to be compared."""
    return {name: getattr(options, name) for name in ("epochs", "search_images", "batch_norm_batches")}


def check_settings(options: argparse.Namespace) -> None:
    """Refuse to put cells of other settings, or of an earlier version, into one page."""
    for path in sorted(path_of(options).glob("*.json")):
        stored = json.loads(path.read_text())
        for name, value in shared(options).items():
            if stored["agent"] == "uniform" and name != "epochs":
                continue  # its plan does not depend on the images
            if stored.get(name) != value:
                raise SystemExit(
                    f"{path} was made with {name} {stored.get(name)}, not {value}: give another --out, or that value."
                )
        if lacking := {"test_images", "target_share"} - stored.keys():
            raise SystemExit(f"{path} lacks {min(lacking)}, as of an earlier version: give another --out.")
    path = network_path(options, options.model)
    if not path.exists() and any(path_of(options).glob(f"{options.model}-*.json")):
        raise SystemExit(f"{path} is missing beside the cells, as of an earlier version: give another --out.")
    if path.exists() and json.loads(path.read_text())["weights_sha256"] != sha256_file(Path(options.weights)):
        raise SystemExit(f"{path} was made with other weights than {options.weights}: give another --out.")


def network_path(options: argparse.Namespace, model: str) -> Path:
    """Where it stands which weights were given for a network and how accurate they are."""
    folder: Path = options.out / "networks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{model}.json"


def note_network(options: argparse.Namespace, job: Job) -> None:
    """Keep the accuracy of the given weights on the test images, beside which all cells stand."""
    path = network_path(options, options.model)
    if not path.exists():
        dense = accuracy(job.model, job.data.test, device=job.torch_device)
        found = {"weights_sha256": sha256_file(Path(options.weights)), "dense_accuracy": dense}
        write_atomic(path, json.dumps(found, indent=1) + "\n")


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
    note_network(options, job)
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
        "target_share": next(each.target / each.dense for each in budgets),
        "test_images": len(job.data.test),
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


def write(options: argparse.Namespace, console: Console) -> None:
    """Print the tables of all cells that there are, of whatever network, and write them as a page."""
    found = [json.loads(path.read_text()) for path in path_of(options).glob("*.json")]
    found.sort(
        key=lambda cell: (*(str(cell[name]) for name in ("model", "budget")), ORDER.index(cell["agent"]))
    )
    missing = [
        cell
        for model in dict.fromkeys((*MODELS, options.model))
        for cell in cells(options, model)
        if not path_of(options, cell).exists()
    ]
    paths = {model: network_path(options, model) for model in {cell["model"] for cell in found}}
    dense = {
        model: json.loads(path.read_text())["dense_accuracy"]
        for model, path in paths.items()
        if path.exists()
    }
    show(found, len(missing), console)
    write_atomic(options.page, page(found, dense, missing, command(options)))
    console.print(f"Wrote {options.page}", highlight=False)


def command(options: argparse.Namespace) -> str:
    """What fills the missing cells, with the caller's own paths left out."""
    parts = ["python", "-m", "benchmarks.agents", "--data", f"{options.data.partition(':')[0]}:PATH"]
    parts += ["--model", "MODEL", "--weights", "FILE", "--seeds", *map(str, options.seeds)]
    parts += ["--evaluations", *map(str, options.evaluations), "--budgets", *options.budgets]
    parts += ["--epochs", str(options.epochs), "--search-images", str(options.search_images)]
    parts += ["--agents", *options.agents, "--brief", *map(str, options.brief)]
    return shlex.join([*parts, "--batch-norm-batches", str(options.batch_norm_batches)])


if __name__ == "__main__":
    main()
