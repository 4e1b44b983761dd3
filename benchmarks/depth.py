"""Fewer channels, fewer blocks, or both, at the same measured latency.

    python -m benchmarks.depth --data folder:/data/cifar10-jpeg --model cifar_resnet56 --weights resnet56.pt

Three searches for each agent and seed, with as many evaluations and the same fine-tuning: `widths` may only remove
channels, `depth` only whole blocks (`pruning.depth: auto`, no narrower groups), `both` may do either. Each is a run
of `compress` with its contract: the exported network is measured in turns with the dense one, and the search
continues until it meets the target. The table has the accuracy on the test images, the measured share of the dense
latency, and what was removed. One latency table of this machine serves all three: that of `both`, some of whose
networks lack blocks. Results are saved run by run, a second call goes on with those that are missing, and a run that
was stopped is resumed. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cells import Lines
from compressor.core.manifest import MANIFEST, Manifest
from compressor.recipe import Recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "both": {"depth": "auto"},
    "widths": {"depth": "off"},
    "depth": {"depth": "auto", "min_share": 1.0},
}
"""Fields of `pruning`; the first one measures the latency table."""


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    console = Console(width=150)
    names = ("data", "latency", "evaluations", "epochs", "search_images")
    lines = Lines(options.results, {name: getattr(options, name) for name in names})
    for seed in options.seeds:
        for agent in options.agents:
            for variant in VARIANTS:
                cell = f"{options.model}/{agent}/{seed}/{variant}"
                with lines.claimed(cell) as free:
                    if free:
                        lines.add(cell, run(options, agent, seed, variant))
    table = tabled(options, lines)
    console.print(table)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(options, table))
    console.print(f"Saved {options.results} and {options.page}", highlight=False)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder:PATH with train/ and test/, or as for compress")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True, help="a file, or default")
    parser.add_argument("--latency", default="50%", help="of the dense network")
    parser.add_argument("--agents", nargs="+", default=["knapsack"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=200, help="of each round of a search")
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning; 0 compares compensated networks")
    parser.add_argument("--search-images", type=int, default=2000, help="that score a candidate")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="further fields of the recipe")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/depth.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/depth"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=Path("benchmarks/results/depth.md"))
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, agent: str, seed: int, variant: str) -> dict[str, Any]:
    """Return the result of one run, which continues if it was stopped."""
    from compressor import run_recipe
    from compressor.run.pipeline import resume

    out = options.work / options.model.replace(":", "-") / f"{agent}-{seed}-{variant}"
    if (out / "recipe.yaml").exists():
        result = resume(out)
    else:
        further = [text.partition("=")[::2] for text in options.set]
        recipe = Recipe.model_validate(
            {
                "model": options.model,
                "weights": options.weights,
                "data": options.data,
                "agent": agent,
                "seed": seed,
                "epochs": options.epochs,
                "budgets": {"latency": options.latency},
                "pruning": VARIANTS[variant],
                "search": {
                    "max_evaluations": options.evaluations,
                    "search_images": options.search_images,
                    "epochs_share": 0,
                    "settings": {"evaluations": options.evaluations} if agent == "knapsack" else {},
                },
            }
        )
        for field, value in further:
            recipe = recipe.changed(_nested(field.split("."), json.loads(value)))
        result = run_recipe(recipe, out=out)
    return summary(Manifest.read(result.directory / MANIFEST), result.exit_code)


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nested(path[1:], value)}


def summary(manifest: Manifest, exit_code: int) -> dict[str, Any]:
    """Return what the table shows of a run."""
    accuracy, found = manifest.accuracy, manifest.latency
    scores = (accuracy.finetuned, accuracy.compensated, accuracy.pruned)
    groups = [group for group in manifest.groups if group.width and group.kept is not None]
    return {
        "exit_code": exit_code,
        "dense": accuracy.dense,
        "accuracy": next(score for score in scores if score is not None),
        "ratio": found.ratio,
        "interval": list(found.interval or ()),
        "blocks": manifest.removed,
        "channels": sum(g.kept or 0 for g in groups) / sum(g.width or 0 for g in groups),
        "macs": (manifest.cost.slim.macs or 0) / (manifest.cost.dense.macs or 1),
        "evaluations": None if manifest.search is None else manifest.search.evaluations,
        "rounds": len(manifest.rounds),
    }


def tabled(options: argparse.Namespace, lines: Lines) -> Table:
    """Return the results by agent and variant: the mean over the seeds, and each of them."""
    title = f"{options.model}, {options.latency} of the measured latency, {options.evaluations} evaluations"
    table = Table(title=title, title_justify="left")
    for column in ("agent", "may remove", "accuracy", "of each seed", "measured of dense", "blocks removed"):
        table.add_column(column)
    table.add_column("channels kept")
    table.add_column("MACs")
    entries = lines.entries()
    for agent in options.agents:
        for variant in ("widths", "depth", "both"):
            cells = [entries.get(f"{options.model}/{agent}/{seed}/{variant}") for seed in options.seeds]
            found = [cell for cell in cells if cell is not None]
            if not found:
                continue
            ratios = [_ratio(cell) for cell in found]
            table.add_row(
                agent,
                variant,
                f"{statistics.fmean(cell['accuracy'] for cell in found):.2%}",
                " ".join(f"{cell['accuracy']:.2%}" for cell in found),
                " ".join(ratios),
                " ".join(str(len(cell["blocks"])) for cell in found),
                f"{statistics.fmean(cell['channels'] for cell in found):.0%}",
                f"{statistics.fmean(cell['macs'] for cell in found):.0%}",
            )
    return table


def _ratio(cell: dict[str, Any]) -> str:
    if cell["ratio"] is None:
        return "?"
    missed = "" if cell["exit_code"] == 0 else "*"
    return f"{cell['ratio']:.3f}{missed}"


def page(options: argparse.Namespace, table: Table) -> str:
    """Return the table as Markdown."""
    columns = [str(column.header) for column in table.columns]
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    text = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    text += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    epochs = f"after {options.epochs} epochs of fine-tuning" if options.epochs else "compensated, not trained"
    return (
        f"# Depth and widths\n\nWritten by `python -m benchmarks.depth`. {table.title}; networks are {epochs}. "
        "Accuracies are those of the test images. * marks a run whose budget is missed or undecided.\n\n"
        + "\n".join(text)
        + "\n"
    )


if __name__ == "__main__":
    main()
