"""A run in two processes of `torchrun` beside the same run in one: widths, accuracy and seconds.

    python -m benchmarks.processes --data folder:/data/cifar10-jpeg --model cifar_resnet20 --weights resnet20.pt

Each repetition makes three runs of `compress` within a share of the MACs, one after the other: one process with one
thread, one with a thread for each core, and processes of one thread each. The search does not train, so that it finds
the same widths everywhere; the fine-tuning has the same batches. Results are saved run by run; a second call goes on.
The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cells import Lines
from benchmarks.fixed_runs import COMMAND
from compressor.core.manifest import MANIFEST, Manifest


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    names = ("data", "model", "flops", "epochs", "evaluations", "processes")
    lines = Lines(options.results, {name: getattr(options, name) for name in names})
    ways = {
        "one process, one thread": (1, 1),
        f"one process, {options.processes} threads": (1, options.processes),
        f"{options.processes} processes, one thread each": (options.processes, 1),
    }
    for repeat in range(options.repeats):
        for way, (processes, threads) in ways.items():
            cell = f"{way}/{repeat}"
            with lines.claimed(cell) as free:
                if free:
                    lines.add(cell, run(options, processes, threads, options.work / cell.replace(" ", "-")))
    cells = lines.entries()
    found = {way: [cells[f"{way}/{each}"] for each in range(options.repeats)] for way in ways}
    Console(width=140).print(tabled(options, found))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder:PATH with train/ and test/, or as for compress")
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--weights", required=True, help="a file, or default")
    parser.add_argument("--flops", default="50%", help="of the dense network")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--evaluations", type=int, default=8, help="of the search")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/processes.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/processes"), help="folder of the runs")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, processes: int, threads: int, out: Path) -> dict[str, Any]:
    """Return the result of one run of `compress`, a fresh one."""
    command = [
        "--model", options.model, "--weights", options.weights, "--data", options.data, "--flops", options.flops,
        "--agent", "knapsack", "--epochs", str(options.epochs), "--out", str(out), "--quiet",
        "--set", f"search.max_evaluations={options.evaluations}", "--set", "search.epochs_share=0",
        "--set", f"search.threads={threads}", "--set", "search.workers=1", "--set", "export.engine=false",
    ]  # fmt: skip
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
        command = [sys.executable, *launcher, *COMMAND, *command]
    else:
        command = [*COMMAND, *command]
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    seconds = time.perf_counter() - began
    return summary(Manifest.read(out / MANIFEST)) | {"seconds": round(seconds, 1)}


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return what the table shows of a run, but for its whole time."""
    return {
        "processes": int(manifest.machine.get("processes", 1)),
        "widths": [group.kept for group in manifest.groups],
        "epoch_s": [float(each.seconds or 0) for each in manifest.training],
        "compensated": manifest.accuracy.compensated,
        "finetuned": manifest.accuracy.finetuned,
    }


def tabled(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> Table:
    """Return the results of each way: medians of the times, and each accuracy."""
    title = f"{options.model}, {options.flops} of the MACs, {options.epochs} epochs of fine-tuning, {options.data}"
    table = Table(title=title, title_justify="left")
    for column in ("run in", "the same widths", "compensated, %", "after fine-tuning, %", "epoch, s", "whole run, s"):
        table.add_column(column)
    first = next(iter(found.values()))[0]
    for way, runs in found.items():
        epochs = [seconds for each in runs for seconds in each["epoch_s"]]
        table.add_row(
            way,
            "yes" if all(each["widths"] == first["widths"] for each in runs) else "no",
            ", ".join(f"{100 * each['compensated']:.2f}" for each in runs),
            ", ".join(f"{100 * each['finetuned']:.2f}" for each in runs),
            f"{statistics.median(epochs):.1f}",
            f"{statistics.median(each['seconds'] for each in runs):.0f}",
        )
    return table


if __name__ == "__main__":
    main()
