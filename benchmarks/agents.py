"""Every agent at equal evaluations and equal fine-tuning: accuracy before and after, budget kept, evaluations, minutes.

    python -m benchmarks.agents --data folder:/data/cifar10-jpeg --weights resnet20.pt
    python -m benchmarks.agents --data folder:/data/cifar10-jpeg --weights resnet20.pt --measure
    python -m benchmarks.agents --data folder:/data/cifar10-jpeg --weights resnet20.pt --epochs 0 --budgets flops:50%

Each agent searches on the same pretrained weights, which stay as they are, with the same number of evaluations
(uniform pruning needs one; what a search really used is in the column "evaluations"); the slim network is then
fine-tuned for the same epochs. With the same seed all agents score on the same images. Candidates are compensated by
quick fits, and the slim network thoroughly, unless `--compensate off`; `--epochs 0` compares what is delivered without
training. `--brief 8` trains each candidate for 8 steps before it is scored. Test accuracy is on images that neither
training nor the search has seen.
Every cell is kept as a file, a search that was stopped goes on where it stood, several of these commands may run side
by side, and docs/results/agents.md is written again after each cell: all there are, of whatever network, and which are
missing; the same command fills them. Other weights for the same network are refused.

Latency is measured with the machine at rest: the table of a network on the first call that needs it, and what the slim
networks take by `--measure`, when the searches are done.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import agents_store as store
from benchmarks.agents_page import Cell, page, show
from benchmarks.compared import Right, packed
from compressor.core.agents import AGENTS
from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.records import Checkpoint, EpisodeLog
from compressor.latency.backends.cpu import measured
from compressor.latency.request import Request, Turns
from compressor.latency.table import LatencyTable
from compressor.recipe import Recipe
from compressor.run.compensation import compensation_of
from compressor.run.device import provider_of, request_of
from compressor.run.job import Job
from compressor.run.stages import environment
from compressor.run.trainings import trainer
from compressor.search.base import create_agent
from compressor.search.records import Limits, SearchResult
from compressor.search.schedule import Schedule
from compressor.training.scoring import predictions, reestimate_batch_norm
from export.convert.to_onnx import export_onnx

BUDGETS = ("latency:50%", "latency:30%", "params:50%", "params:30%")
MODELS = ("cifar_resnet20", "cifar_resnet56", "cifar_mobilenet_v2", "cifar_vgg16_bn")
ORDER = tuple(dict.fromkeys(("uniform", "random", "knapsack", *AGENTS)))  # the yardsticks first


def main() -> None:
    options = parsed()
    console = Console(width=150)
    store.check(options)
    if options.measure:
        measure(options, console)
    elif not options.page_only:
        deadline = time.monotonic() + 60 * options.minutes
        for cell in cells(options, options.model):
            with store.claimed(options, cell) as ours:
                if ours and time.monotonic() < deadline:
                    console.print(f"{cell.name} ...", highlight=False)
                    store.keep(options, cell, run(options, cell))
                    store.forget_search(options, cell)
                    write(options)
    if not store.stored(options):
        raise SystemExit(f"There are no cells in {options.results} yet: nothing is written.")
    console.print(f"Wrote {write(options, console)}", highlight=False)


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
    parser.add_argument("--compensate", choices=["off", "auto"], default="auto")
    parser.add_argument("--score", choices=["accuracy", "closeness"], default="accuracy", help="of candidates")
    parser.add_argument("--depth", choices=["off", "auto"], default="off", help="auto: blocks may go, too")
    parser.add_argument("--image-size", type=int)
    parser.add_argument(
        "--brief",
        nargs="+",
        type=int,
        default=[0],
        help="steps of training on each candidate before it is scored",
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after this time")
    parser.add_argument("--results", type=Path, help="default: by --compensate, --score, --depth and --epochs")
    parser.add_argument("--work", type=Path, default=Path("runs/agents"), help="where the searches lie")
    parser.add_argument("--measure", action="store_true", help="measure the latencies that are missing")
    parser.add_argument("--page", type=Path, help="default: by --compensate, --score, --depth and --epochs")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    options = parser.parse_args()
    name = "agents" if options.compensate == "off" else "agents-compensated"
    name += f"-{options.score}" if options.score != "accuracy" else ""
    name += "-depth" if options.depth == "auto" else ""
    name += "-untrained" if not options.epochs else ""
    options.results = options.results or Path("benchmarks/results", name)
    options.page = options.page or Path("docs/results", f"{name}.md")
    return options


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


def run(options: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Search, fine-tune, judge."""
    kind = cell.budget.partition(":")[0]
    recipe = recipe_of(options, cell)
    job = prepared(options, recipe, kind)
    store.note_network(options, job)
    budgets = job.budgets()
    env, evaluator = environment(job, budgets)
    folder = store.search_path(options, cell)
    agent = create_agent(cell.agent, seed=cell.seed, schedule=Schedule(), settings=recipe.search.settings)
    limits = Limits(max_evaluations=cell.evaluations, use_all=True)
    result = agent.search(
        env,
        evaluator,
        limits,
        log=EpisodeLog(folder / "episodes.jsonl"),
        checkpoint=Checkpoint(folder / "state.pt"),
    )
    compensation = compensation_of(job, result.best)
    if compensation is None:
        slim = job.space.apply(result.best)
        reestimate_batch_norm(slim, job.task.train, batches=10, device=job.torch_device)
    else:
        slim = compensation.network
    before = right_in(job, slim)
    started = time.perf_counter()
    if options.epochs:
        rate, teacher = job.recipe.training.finetune_learning_rate, job.teacher or job.model
        training = trainer(job, slim, options.epochs, rate=rate, teacher=teacher)
        for _ in range(options.epochs):
            training.run_epoch()
    after = right_in(job, slim) if options.epochs else before
    spent = {each.name: float(np.asarray(each.predict(job.space.row(result.best)[None]))[0]) for each in budgets}
    costs = {each.name: spent[each.name] / each.dense for each in budgets}
    return {
        **asdict(cell),
        **store.settings(options),
        "search_accuracy": result.accuracy,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "right_before": packed(before),
        "right_after": packed(after),
        "kept": all(spent[each.name] <= each.target for each in budgets),
        "share": costs[kind if kind != "flops" else "macs"],
        "target_share": next(each.target / each.dense for each in budgets),
        "test_images": len(job.task.test),
        "measured_share": None,
        "used": result.evaluations,
        "search_minutes": result.seconds / 60,
        "evaluation_minutes": result.timing["evaluation"] / 60,
        "finetune_minutes": (time.perf_counter() - started) / 60,
        "widths": dict(result.widths),
        "removed": list(result.best.removed),
        "found": found(result, env.bounds.feasible),
    }


def right_in(job: Job, network: Any) -> Right:
    """Which test images a network classifies correctly, (N,)."""
    classes, labels = predictions(network, job.task.test, device=job.torch_device)
    return np.asarray(classes == labels)


def recipe_of(options: argparse.Namespace, cell: Cell) -> Recipe:
    """What a cell runs."""
    kind, _, limit = cell.budget.partition(":")
    return Recipe.model_validate(
        {
            "model": cell.model,
            "data": options.data,
            "weights": options.weights,
            "agent": cell.agent,
            "seed": cell.seed,
            "epochs": max(1, options.epochs),
            "budgets": {kind: limit},
            # a count is compared over all widths; a latency over those that suit the device
            "pruning": {
                "depth": options.depth,
                "granularity": "auto" if kind == "latency" else 1,
                "compensate": options.compensate,
            },
            "image_size": options.image_size,
            "search": {
                "search_images": options.search_images,
                "batch_norm_batches": options.batch_norm_batches,
                "workers": 1,
                "brief_iterations": cell.brief,
                "measure": options.score,
            },
        }
    ).resolved()


def prepared(options: argparse.Namespace, recipe: Recipe, kind: str) -> Job:
    """The job, with the latency table that all cells of a network share.

    Searches read the table on any machine, so that cells of several machines can be compared; what is measured must be
    measured where the table was.
    """
    if kind != "latency":
        return Job.prepare(recipe)
    path = store.table_path(options, recipe.model)
    if path.exists():
        table = LatencyTable.read(path)
        if options.measure:
            provider_of(recipe).require_same(table, request_of(recipe))
        return Job.prepare(recipe, table)
    job = Job.prepare(recipe)
    assert job.table is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    job.table.write(path)
    return job


def measure(options: argparse.Namespace, console: Console) -> None:
    """Time the slim networks of all cells that lack it, in turns with the dense one; their weights do not matter, so
    that cells of the same widths share one measurement."""
    entries = [entry for entry in store.stored(options) if entry["model"] == options.model]
    shares = {_plan_of(entry): entry["measured_share"] for entry in entries if entry["measured_share"]}
    for entry in entries:
        if is_unmeasured(entry):
            cell = Cell(**{name: entry[name] for name in Cell.__dataclass_fields__})
            if _plan_of(entry) not in shares:
                job = prepared(options, recipe_of(options, cell), "latency")
                slim = job.space.apply(job.space.plan(entry["widths"], removed=entry.get("removed", ())))
                with tempfile.TemporaryDirectory() as folder:
                    shares[_plan_of(entry)] = measured_share(job, slim, Path(folder))
            entry["measured_share"] = shares[_plan_of(entry)]
            store.keep(options, cell, entry)
            console.print(f"{cell.name}: {entry['measured_share']:.1%} of the dense time", highlight=False)


def _plan_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    return (*entry["widths"].items(), *entry.get("removed", ()))


def is_unmeasured(entry: dict[str, Any]) -> bool:
    """Whether a cell's latency is still to be measured."""
    return entry["budget"].startswith("latency") and entry["measured_share"] is None


def measured_share(job: Job, slim: Any, folder: Path) -> float:
    """Time of the slim network over that of the dense one, measured in turn on this machine."""
    import torch

    example = torch.zeros(1, *job.task.preprocessing.input_shape)
    dense_path, slim_path = folder / "dense.onnx", folder / "slim.onnx"
    export_onnx(job.model, example, dense_path)
    export_onnx(slim, example, slim_path)
    request, turns = Request(threads=job.recipe.threads), Turns(job.recipe.contract.repeats)
    return measured(dense_path, slim_path, request, turns).ratio.value


def found(result: SearchResult, feasible: Any) -> list[list[float]]:
    """How soon plans were found: pairs of plans scored by then and the best accuracy of those that keep the budgets."""
    rises: list[list[float]] = []
    seen = set[tuple[int, ...]]()
    for candidate in result.candidates:
        seen.add(candidate.widths)
        kept = not candidate.given_up and feasible(np.array([candidate.widths]))[0]
        if kept and (not rises or candidate.accuracy > rises[-1][1]):
            rises.append([len(seen), candidate.accuracy])
    return rises


def write(options: argparse.Namespace, console: Console | None = None) -> Path:
    """Write the tables of all cells that there are, of whatever network, as a page, and print them."""
    cells_now = sorted(
        store.stored(options), key=lambda cell: (cell["model"], cell["budget"], ORDER.index(cell["agent"]))
    )
    missing = [
        cell
        for model in dict.fromkeys((*MODELS, options.model))
        for cell in cells(options, model)
        if not store.cell_path(options, cell).exists()
    ]
    if console is not None:
        show(cells_now, len(missing), console)
    write_atomic(options.page, page(cells_now, store.dense_accuracies(options), missing, command(options)))
    return Path(options.page)


def command(options: argparse.Namespace) -> str:
    """What fills the missing cells, with the caller's own paths left out."""
    parts = ["python", "-m", "benchmarks.agents", "--data", f"{options.data.partition(':')[0]}:PATH"]
    parts += ["--model", "MODEL", "--weights", "FILE", "--seeds", *map(str, options.seeds)]
    parts += ["--evaluations", *map(str, options.evaluations), "--budgets", *options.budgets]
    parts += ["--epochs", str(options.epochs), "--search-images", str(options.search_images)]
    parts += ["--agents", *options.agents, "--brief", *map(str, options.brief)]
    parts += ["--compensate", options.compensate, "--score", options.score, "--depth", options.depth]
    parts += ["--image-size", str(options.image_size)] if options.image_size else []
    return shlex.join([*parts, "--batch-norm-batches", str(options.batch_norm_batches)])


if __name__ == "__main__":
    try:
        main()
    except CompressorError as error:
        raise SystemExit(f"{error.message} {error.hint or ''}") from None
