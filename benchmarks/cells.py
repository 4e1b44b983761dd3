"""Cells of a study, one JSON line each, and what `benchmarks.peers` and `benchmarks.proxy` share.

A cell has a name with parts, such as `cifar_resnet20/50%/knapsack/0/plain`. A study that was stopped continues with the
cells that have no line yet; several commands may share the file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console

from compressor.core.files import sha256_file, write_atomic
from compressor.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from compressor.latency.table import LatencyTable
    from compressor.run.job import Job



class Lines:
    """The finished cells of a study, in a file with one JSON object per line.

    Args:
        path: File; created with its first line.
        settings: What all cells have in common. Lines with other settings are refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        for name, entry in self.entries().items():
            if entry["settings"] != self.settings:
                other = {key: value for key, value in entry["settings"].items() if settings.get(key) != value}
                raise SystemExit(
                    f"{name} in {path} was run with {other}: give the same values, or another --results."
                )

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the finished cells by name, as they are on disk now; of equal names the last counts."""
        if not self.path.exists():
            return {}
        found = {}
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a command was stopped while it wrote; the cell is run again
                continue
            found[str(entry["cell"])] = entry
        return found

    def add(self, cell: str, values: dict[str, Any]) -> None:
        """Append a finished cell."""
        line = json.dumps({"cell": cell, **values, "settings": self.settings})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")), self.path.open("ab+") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # after a line that was not finished
            file.write(f"{line}\n".encode())

    @contextmanager
    def claimed(self, cell: str) -> Iterator[bool]:
        """Whether this cell is still to be run, and no other command runs it meanwhile."""
        folder = self.path.parent / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / f"{cell.replace('/', '-').replace(':', '-')}.lock", timeout=0):
                yield cell not in self.entries()
        except Timeout:
            yield False


def parser_of(study: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all studies have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder:PATH with train/ and test/, or as for compress")
    parser.add_argument(
        "--weights", required=True, nargs="+", metavar="NETWORK=FILE", help="state dict of each trained network"
    )
    parser.add_argument("--fit-images", type=int, default=512, help="unlabeled ones, for compensation")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing after this time")
    parser.add_argument("--work", type=Path, default=Path(f"runs/{study}"), help="folder of searches and networks")
    parser.add_argument("--page", type=Path, default=Path(f"docs/results/{study}.md"))
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    return parser


def parser_of_cells(study: str, description: str | None, *, epochs: int) -> argparse.ArgumentParser:
    """Return a parser with the options of studies whose cells search, score and fine-tune."""
    parser = parser_of(study, description)
    parser.add_argument("--epochs", type=int, default=epochs, help="of fine-tuning")
    parser.add_argument("--search-images", type=int, default=2000, help="that score a candidate")
    parser.add_argument("--batch-norm-batches", type=int, default=10, help="of 128 images")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of cells, as in a shell")
    parser.add_argument("--list", action="store_true", help="print the cells to run and their times, and stop")
    results = Path(f"benchmarks/results/{study}.jsonl")
    parser.add_argument("--results", type=Path, default=results, help="file with a line for each cell")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the options; `weights` becomes a dict of files by network."""
    options = parser.parse_args(arguments)
    for text in options.weights:
        _, equals, path = text.partition("=")
        if not equals or not Path(path).is_file():
            parser.error(f"--weights {text}: expected NETWORK=FILE with an existing file")
    pairs = (text.partition("=") for text in options.weights)
    options.weights = {name: Path(path) for name, _, path in pairs}
    if options.epochs < 1:
        parser.error(f"--epochs {options.epochs}: expected 1 or more")
    return options


def command(
    options: argparse.Namespace, study: str, models: Iterable[str], own: Sequence[str], flags: str = ""
) -> str:
    """Return the command that fills a study's missing cells, without the caller's own paths.

    Args:
        options: Options of the study.
        study: Its module.
        models: Its networks.
        own: Names of its own options with values.
        flags: Its own options without values.
    """
    names = ("epochs", "search_images", "batch_norm_batches", "fit_images", *own)
    weights = " ".join(f"{name}=FILE" for name in dict.fromkeys(models))
    values = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
    return (
        f"python -m benchmarks.{study} --data {options.data.partition(':')[0]}:PATH --weights {weights} \\\n"
        f"    {values}{flags} --seeds {' '.join(map(str, options.seeds))}"
    )


def finish(
    options: argparse.Namespace, lines: Lines, page: Callable[[argparse.Namespace, Lines], str], console: Console
) -> None:
    """Write a study's page from its cells, unless they were only to be listed."""
    if options.list:
        return
    if not lines.entries():
        raise SystemExit(f"There are no cells in {options.results} yet: no page is written.")
    write_atomic(options.page, page(options, lines))
    console.print(f"Wrote {options.page}", highlight=False)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what makes cells comparable."""
    names = ("epochs", "search_images", "batch_norm_batches", "fit_images")
    return {name: getattr(options, name) for name in names}


def chosen(cells: Iterable[str], options: argparse.Namespace) -> list[str]:
    """Return the cells that `--only` selects."""
    return [cell for cell in cells if any(fnmatch(cell, pattern) for pattern in options.only)]


def load_job(
    options: argparse.Namespace,
    model: str,
    seed: int,
    budget: str,
    granularity: int | str = 1,
    table: LatencyTable | None = None,
) -> Job:
    """Load a network with its weights, and the data; a budget is written as in "flops:50%"."""
    from compressor.run.job import Job

    kind, _, limit = budget.partition(":")
    recipe = Recipe.model_validate(
        {
            "model": model,
            "data": options.data,
            "weights": str(options.weights[model]),
            "seed": seed,
            "epochs": options.epochs,
            "budgets": {kind: limit},
            "pruning": {"granularity": granularity, "depth": "off"},
            "search": {
                "search_images": options.search_images,
                "batch_norm_batches": options.batch_norm_batches,
                "workers": 1,
            },
            "training": {"mixed_precision": "no"},  # the same on every machine
        }
    )
    return Job.prepare(recipe.resolved(), table)


def changed(job: Job, **parts: Any) -> Job:
    """Return the job with other fields of its recipe; network and data are shared."""
    return dataclasses.replace(job, recipe=job.recipe.changed(parts))


def compensating(job: Job, compensate: str, images: int) -> Job:
    """Return the job with another `pruning.compensate`, on this number of images."""
    from compressor.search.networks import methods

    importance = "l1" if compensate == "off" else "reconstruction"  # as `Job.prepare` chooses
    fields = {"compensate": compensate, "compensation_images": images, "importance": importance}
    recipe = job.recipe.changed({"pruning": fields})
    return dataclasses.replace(job, recipe=recipe, compensation=methods(recipe, job.space))


def with_seed(job: Job, seed: int) -> Job:
    """Return the job with another seed of its training; the splits stay as they are."""
    return changed(job, seed=seed)


def fine_tune(job: Job, network: nn.Module, epochs: int, *, distilled: bool) -> float:
    """Train a network in place as a run of `compress` does, and return the seconds."""
    from compressor.run.trainings import trainer

    started = time.perf_counter()
    rate = job.recipe.training.finetune_learning_rate
    training = trainer(job, network, epochs, rate=rate, teacher=(job.teacher or job.model) if distilled else None)
    for _ in range(epochs):
        training.run_epoch()
    network.eval()
    return time.perf_counter() - started


def tested(job: Job, network: nn.Module) -> float:
    """Return the accuracy on the test images, 0..1."""
    from compressor.training.scoring import accuracy

    return accuracy(network, job.task.test, device=job.torch_device)


def count(job: Job, network: nn.Module) -> int:
    """Return the multiply-adds of one input as fvcore counts them."""
    import torch

    from compressor.pruning.checks import count_macs

    return count_macs(network, (torch.zeros(1, *job.task.preprocessing.input_shape),))[0]


@dataclass(frozen=True)
class Speed:
    """Seconds that this machine needs for an image of the dense network.

    Attributes:
        scored: Forward pass.
        trained: Forward and backward pass.
    """

    scored: float
    trained: float

    @classmethod
    def of(cls, job: Job) -> Speed:
        """Time a few batches; the job's network is not changed."""
        import torch
        from torch.nn import functional

        network = copy.deepcopy(job.model).train()
        images, labels = next(iter(job.task.train.sample(128).batches(128)))

        def forward() -> None:
            with torch.no_grad():
                network(images)

        def step() -> None:
            functional.cross_entropy(network(images), labels).backward()

        def seconds(run: Callable[[], None]) -> float:
            run()
            started = time.perf_counter()
            run()
            run()
            return (time.perf_counter() - started) / 2 / len(images)

        return cls(seconds(forward), seconds(step))


def fine_tuning_seconds(speed: Speed, job: Job, epochs: int, share: float, *, distilled: bool) -> float:
    """Estimate fine-tuning and the test of a network with this share of the dense multiply-adds."""
    trained = speed.trained * share + (speed.scored if distilled else 0.0)
    return epochs * len(job.task.train) * trained + len(job.task.test) * speed.scored * share


def weights_checksums(options: argparse.Namespace) -> dict[str, str]:
    """Return the SHA-256 of each network's weights."""
    return {name: sha256_file(path) for name, path in options.weights.items()}


def epochs(number: int) -> str:
    """Return a number of epochs in words: "1 epoch"."""
    return f"{number} epoch{'' if number == 1 else 's'}"


def minutes(seconds: float) -> str:
    """Return a duration for a table: "40 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
