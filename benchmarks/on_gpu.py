"""Everything in this project that needs a GPU or a board, behind one command.

    python -m benchmarks.on_gpu --list          # what would run: reason, expected time, command; works anywhere
    python -m benchmarks.on_gpu --data folder:/data/cifar10-jpeg --weights resnet20.pt --board ssh://me@orin.local
    python -m benchmarks.on_gpu --only 'engines/*' targets --minutes 180

Engines built and run in each precision, latency tables and their error, targets, energy, batches in streams, trainings
of full length, and bundles on a board. Items whose parts are missing here (a runtime, data, a board) are left out with
the reason. Each item is a command in a process of its own, with its output in `--results`; finished ones are kept with
their results, so that a stopped call continues, also within an item. A failed item is tried again by the next call.
The table at the end is saved as table.md. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import cells
from benchmarks.cells import Lines
from benchmarks.fixed_runs import COMMAND
from benchmarks.gpu_items import NEEDS, Item, items
from compressor.core.files import write_atomic
from export.device.bundle import TARGETS
from export.engine.cuda import find_device

BAD_INPUT = 2
LEFT_OUT = "left out: it needs "
Say = Callable[[str], Any]
"""Prints a line as it is."""


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the items and stop")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of items, as in a shell")
    parser.add_argument("--data", help="CIFAR-10: folder:PATH with train/ and test/, or as for compress")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="state dict of a cifar_resnet20 trained on it")
    parser.add_argument("--epochs", type=int, default=60, help="of fine-tuning in the trainings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--board", metavar="ssh://USER@HOST", help="a board with TensorRT that ssh reaches")
    parser.add_argument("--target", choices=sorted(TARGETS), default="jetson-orin-nano-8gb", help="which board that is")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no item after this time")
    parser.add_argument("--results", type=Path, default=Path("runs/on_gpu"), help="folder of all results")
    options = parser.parse_args(arguments)
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights {options.weights}: there is no such file")
    if options.epochs < 1:
        parser.error(f"--epochs {options.epochs}: expected 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is selected and can run here; returns the exit code."""
    options = parsed(arguments)
    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    every = {item.name: item for item in items(options)}
    chosen = [every[name] for name in cells.chosen(every, options)]
    if not chosen:
        say(f"No item is called {' or '.join(options.only)}. There are: {', '.join(every)}.")
        return BAD_INPUT
    lacks = {need: NEEDS[need](options) for need in sorted({need for item in chosen for need in item.needs})}
    if options.list:
        show_list(chosen, lacks, say)
        return 0
    if all(item.missing(lacks) for item in chosen):
        first = "There is no NVIDIA GPU on this machine" if lacks.get("gpu") else "Parts are missing on this machine"
        needed = dict.fromkeys(item.missing(lacks) for item in chosen)
        say(f"{first}, and nothing was run. It needs {'; or '.join(needed)}. --list shows the items.")
        return BAD_INPUT
    for item in chosen:
        if not item.missing(lacks) and (problem := changed(item, log_of(options, item))):
            say(problem)
            return BAD_INPUT
    gpu = find_device()
    lines = Lines(options.results / "results.jsonl", {"gpu": None if gpu is None else asdict(gpu)})
    failed = run_all(options, chosen, lacks, lines, say)
    text = table(chosen, lacks, lines, failed)
    write_atomic(options.results / "table.md", text)
    say(f"{text}\nSaved {options.results / 'table.md'}")
    return 1 if failed else 0


def log_of(options: argparse.Namespace, item: Item) -> Path:
    """Return where the output of an item is kept; its first line is the command that began it."""
    return Path(options.results) / f"{item.name.replace('/', '-')}.log"


def changed(item: Item, log: Path) -> str:
    """Describe how an item was begun by another command, such as one for other data or another board; else ""."""
    begun = log.read_text(errors="replace").partition("\n")[0] if log.exists() else ""
    if begun in ("", f"$ {item.typed()}"):
        return ""
    return (
        f"{item.name} in {log.parent} was begun by\n    {begun[2:]}\nand this is\n    {item.typed()}\n"
        "Give the same values, or another --results."
    )


def show_list(chosen: Sequence[Item], lacks: Mapping[str, str], say: Say) -> None:
    """Print each item with its reason, its expected time, its command, and what it lacks here."""
    for item in chosen:
        say(f"{item.name}: about {duration(item.minutes)} (an estimate)\n    {item.reason}\n    {item.typed()}")
        if missing := item.missing(lacks):
            say(f"    {LEFT_OUT}{missing}")
    total = sum(item.minutes for item in chosen if not item.missing(lacks))
    say(f"What can run here takes about {duration(total)}.")


def duration(minutes: float) -> str:
    """Return a duration in words: "40 min" or "2.5 h"."""
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def run_all(
    options: argparse.Namespace, chosen: Sequence[Item], lacks: Mapping[str, str], lines: Lines, say: Say
) -> dict[str, str]:
    """Run the items that have no result yet; returns why those failed that did."""
    deadline, failed = time.monotonic() + 60 * options.minutes, dict[str, str]()
    for item in chosen:
        if item.missing(lacks) or time.monotonic() > deadline:
            continue
        with lines.claimed(item.name) as ours:
            if not ours:
                continue
            log = log_of(options, item)
            say(f"{item.name}: about {duration(item.minutes)}, output in {log}")
            started = time.monotonic()
            code = run(item, log)
            minutes = round((time.monotonic() - started) / 60, 1)
            try:
                if code not in item.ends:
                    raise ValueError(last_line(log) or f"exit code {code}")
                lines.add(item.name, {"result": item.found(), "minutes": minutes})
            except (OSError, ValueError, LookupError, TypeError) as error:
                failed[item.name] = " ".join(str(error).split()) or type(error).__name__
                say(f"{item.name} failed: {failed[item.name]}")
    return failed


def run(item: Item, log: Path) -> int:
    """Run an item's command to its end, with its output added to a file; returns its exit code."""
    due = item.due if log.exists() else item.command
    program, *arguments = due
    command = [*([sys.executable] if program == "python" else COMMAND), *arguments]
    environment = {**os.environ, **({"COMPRESSOR_BACKEND": item.backend} if item.backend else {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        output.write(f"$ {item.typed(due)}\n")
        output.flush()
        return subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode


def last_line(path: Path) -> str:
    """Return the last line of a log."""
    return next((line.strip() for line in reversed(path.read_text(errors="replace").splitlines()) if line.strip()), "")


def table(chosen: Sequence[Item], lacks: Mapping[str, str], lines: Lines, failed: Mapping[str, str]) -> str:
    """Return all results as a table, with what is still to be run and why."""
    done, rows = lines.entries(), []
    for item in chosen:
        if entry := done.get(item.name):
            rows.append((item.name, entry["result"], f"{entry['minutes']:g}"))
        elif item.name in failed:
            rows.append((item.name, f"failed: {failed[item.name]}", ""))
        else:
            missing = item.missing(lacks)
            rows.append((item.name, f"{LEFT_OUT}{missing}" if missing else "not run yet", ""))
    return "\n".join(cells.table_lines(("item", "result", "minutes"), rows)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
