"""Where the cells of `benchmarks.agents` lie, and which may stand beside one another.

`results` holds what is worth keeping and small: a file for each cell, and for each network the latency table that its
cells share and what weights were given. `work` holds the searches themselves, which a stopped command goes on with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from benchmarks.agents_page import Cell
from compressor.core.files import sha256_file, write_atomic

if TYPE_CHECKING:
    from compressor.run.job import Job

SETTINGS = ("epochs", "search_images", "batch_norm_batches", "compensate", "score", "depth", "image_size")
"""What all cells must have in common to be compared."""
EARLIER = {"compensate": "off", "score": "accuracy", "depth": "off", "image_size": None}
"""Values of cells from before these settings existed."""


def cell_path(options: argparse.Namespace, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return Path(options.results) / "cells" / f"{cell.name}.json"


def network_path(options: argparse.Namespace, model: str) -> Path:
    """Where it stands which weights were given for a network and how accurate they are."""
    return Path(options.results) / "networks" / f"{model}.json"


def table_path(options: argparse.Namespace, model: str) -> Path:
    """Where the latency table of a network lies."""
    return Path(options.results) / "tables" / f"{model}.json"


def search_path(options: argparse.Namespace, cell: Cell) -> Path:
    """The folder of a cell's search, made where it is missing; one of other settings or weights is another."""
    made_of = {**settings(options), "data": options.data, "weights": sha256_file(Path(options.weights))}
    stamp = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]
    path = Path(options.work) / f"{cell.name}-{stamp}"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def claimed(options: argparse.Namespace, cell: Cell) -> Iterator[bool]:
    """Whether this cell is still to be run, and no other command is running it meanwhile."""
    path = cell_path(options, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            yield not path.exists()
    except Timeout:
        yield False


def stored(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells that there are, of whatever network."""
    folder = Path(options.results) / "cells"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def keep(options: argparse.Namespace, cell: Cell, found: dict[str, Any]) -> None:
    """Write a cell down."""
    path = cell_path(options, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found) + "\n")


def forget_search(options: argparse.Namespace, cell: Cell) -> None:
    """Remove a search whose cell is kept: where the cell is deleted, it is to be run anew."""
    shutil.rmtree(search_path(options, cell))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the cells of a folder have in common."""
    return {name: getattr(options, name) for name in SETTINGS}


def check(options: argparse.Namespace) -> None:
    """Refuse to put cells of other settings, or of other weights, into one page."""
    if not Path(options.weights).is_file():
        raise SystemExit(f"There are no weights at {options.weights}.")
    for cell in stored(options):
        for name, value in settings(options).items():
            if cell["agent"] == "uniform" and name not in ("epochs", "compensate", "image_size"):
                continue  # its plan does not depend on the images
            if (made := cell.get(name, EARLIER.get(name))) != value:
                raise SystemExit(
                    f"A {cell['agent']} cell in {options.results} was made with {name} {made}, not {value}: "
                    "give another --results, or that value."
                )
    path = network_path(options, options.model)
    if path.exists() and json.loads(path.read_text())["weights_sha256"] != sha256_file(Path(options.weights)):
        raise SystemExit(
            f"{path} was made with other weights than {options.weights}: give another --results."
        )


def note_network(options: argparse.Namespace, job: Job) -> None:
    """Keep the accuracy of the given weights on the test images, beside which all cells stand."""
    from compressor.training.scoring import accuracy

    path = network_path(options, options.model)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        dense = accuracy(job.model, job.task.test, device=job.torch_device)
        found = {"weights_sha256": sha256_file(Path(options.weights)), "dense_accuracy": dense}
        write_atomic(path, json.dumps(found) + "\n")


def dense_accuracies(options: argparse.Namespace) -> dict[str, float]:
    """Accuracy (0..1) of the given weights of each network that has cells."""
    folder = Path(options.results) / "networks"
    return {
        path.stem: json.loads(path.read_text())["dense_accuracy"] for path in sorted(folder.glob("*.json"))
    }
