"""Which score of a candidate orders plans as the networks that are delivered without training are ordered.

    python -m benchmarks.scores --data folder:/data/cifar10-jpeg --weights cifar_resnet20=resnet20.pt

The plans are as good and as alike as those among which a search chooses: near two that solve the budget for the
channels' saliency. Each is built as candidates are (compensated quickly) and as it is delivered (layer by layer). The
log probabilities of both on images of the search split give every score; the accuracy of the delivered network on the
test images says which order is right. Scores are also computed from parts of the images, drawn forty times.

Networks' outputs are kept in `--work`; a stopped command continues with the plans that are missing, several commands
may run side by side, and docs/results/scores.md is written at the end from the plans that are there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console

from benchmarks import cells
from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.run.job import Job

METHODS = {"quick": "as candidates", "layers": "as delivered"}
IMAGES = (500, 1000, 2000, 5000)
DRAWS = 40
NEAR = 15
"""Plans near each of the two."""
LEAST = 4
"""Plans that are ranked; fewer have no table."""


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    console = Console(width=150)
    deadline = time.monotonic() + 60 * options.minutes
    sections = []
    for model in options.weights:
        for budget in options.budgets:
            job = cells.compensating(cells.load_job(options, model, 0, budget), "auto", options.fit_images)
            study = Study(options, job, f"{model}-{budget}")
            if not options.page_only:
                study.run(deadline, console)
            sections += [f"## {model}, {budget}", *section(study.found(), len(study.plans))]
    write_atomic(options.page, "\n\n".join([introduction(options), *sections]) + "\n")
    console.print(f"Wrote {options.page}", highlight=False)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = cells.parser_of("scores", __doc__)
    parser.add_argument("--budgets", nargs="+", default=["params:30%"], metavar="KIND:LIMIT")
    parser.set_defaults(epochs=1, search_images=max(IMAGES), batch_norm_batches=10)  # a recipe has them; nothing trains
    return cells.parsed(parser, arguments)


def plans_of(job: Job, env: Any) -> list[tuple[int, ...]]:
    """Return two plans that solve the budget for the channels' saliency, and plans near them."""
    from compressor.search.allocation import POWERS, Allocator
    from compressor.search.proposals import near_widths

    generator = np.random.default_rng(job.recipe.seed)
    allocator = Allocator(env)
    centres = [allocator.solve_saliency(power) for power in POWERS[1:]]
    found = [tuple(widths.tolist()) for widths in centres]
    for centre in centres:
        for place in range(NEAR):
            near = near_widths(env, centre, generator, 0.2 + 0.3 * place / NEAR, share=0.6)
            found.append(tuple(int(width) for width in near))
    return list(dict.fromkeys(found))


class Study:
    """The plans of a network at a budget, and the outputs of their networks.

    Args:
        options: Options of the command.
        job: Network, data and budget.
        name: Of the folder in `--work`.
    """

    def __init__(self, options: argparse.Namespace, job: Job, name: str) -> None:
        from compressor.run.stages import environment

        self.job, self.fit_images = job, options.fit_images
        self.env, _ = environment(job, job.budgets())
        self.plans = plans_of(job, self.env)
        plain = name.replace(":", "-").replace("%", "")
        self.folder = options.work / f"{plain}-{options.fit_images}"
        self.images = job.task.search.sample(min(max(IMAGES), len(job.task.search)), 0).in_memory()

    def run(self, deadline: float, console: Console) -> None:
        """Build the missing networks until this time, and save their outputs."""
        import torch

        from compressor.search.networks import Networks

        job = self.job
        feed, images, device = job.task.calibration, self.fit_images, job.torch_device
        builders = {method: Networks(job.space, feed, method, images=images, device=device) for method in METHODS}
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, widths in enumerate(self.plans):
            path = self._path(number)
            if path.exists() or time.monotonic() > deadline:
                continue
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    if path.exists():
                        continue
                    built = {method: builder.build(self.env.plan(widths)) for method, builder in builders.items()}
                    outputs = {method: self._outputs(network) for method, network in built.items()}
                    test = cells.tested(job, built["layers"])
                    finished = path.with_suffix(".part")
                    torch.save({**outputs, "test": test}, finished)
                    finished.replace(path)
            except Timeout:
                continue  # another command builds it
            console.print(f"{number + 1} of {len(self.plans)}: {test:.2%}", highlight=False)

    def found(self) -> list[dict[str, Any]]:
        """Return the outputs of each plan that is there, by method, with the dense network's and the accuracy."""
        import torch

        labels = torch.cat([labels for _, labels in self.images.batches(256)])
        shared = {"dense": self._outputs(self.job.model), "labels": labels}
        paths = (self._path(number) for number in range(len(self.plans)))
        return [torch.load(path, weights_only=True) | shared for path in paths if path.exists()]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.pt"

    def _outputs(self, network: nn.Module) -> Tensor:
        from compressor.training.scoring import log_probabilities

        return log_probabilities(network, self.images, device=self.job.torch_device)


def scores() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return scores by name: of log probabilities (N, C), the dense network's and labels, a number for each image."""
    import torch
    from torch.nn import functional

    def divergence(temperature: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def score(found: Tensor, dense: Tensor, _: Tensor) -> Tensor:
            mine, theirs = ((each / temperature).log_softmax(dim=1) for each in (found, dense))
            return -functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(dim=1)

        return score

    return {
        "accuracy": lambda found, dense, labels: (found.argmax(dim=1) == labels).float(),
        "agreement with dense": lambda found, dense, labels: (found.argmax(dim=1) == dense.argmax(dim=1)).float(),
        "cross-entropy": lambda found, dense, labels: found.gather(1, labels[:, None])[:, 0],
        "difference of probabilities": lambda found, dense, labels: -(found.exp() - dense.exp()).abs().sum(dim=1),
        "squared difference of logits": lambda found, dense, labels: -torch.var(found - dense, dim=1, correction=0),
        **{f"divergence, temperature {value:g}": divergence(value) for value in (1.0, 2.0, 4.0, 8.0)},
    }


def section(found: list[dict[str, Any]], planned: int) -> list[str]:
    """Return the paragraphs of a network at a budget, of which this many plans are planned."""
    missing = planned - len(found)
    parts = [f"{missing} of {planned} plans are missing; the same command builds them."] if missing else []
    if len(found) < LEAST:
        return parts
    test = 100 * np.array([each["test"] for each in found])
    spread = f"{test.min():.1f} to {test.max():.1f} %, with a standard deviation of {test.std(ddof=1):.2f} points"
    return [table(found), f"{len(found)} plans; test accuracies from {spread}.", *parts]


def table(found: list[dict[str, Any]]) -> str:
    """Return the rank correlation of each score with the test accuracy, by method and number of images."""
    from scipy.stats import spearmanr

    test = np.array([each["test"] for each in found])
    total = len(found[0]["labels"])
    numbers = [number for number in IMAGES if number < total] + [min(total, max(IMAGES))]
    head = [f"{METHODS[method]}, {number:,}" for method in METHODS for number in numbers]
    rows = []
    for name, score in scores().items():
        row = [name]
        for method in METHODS:
            each_image = [score(each[method].float(), each["dense"], each["labels"]).numpy() for each in found]
            values = np.stack(each_image)
            for number in numbers:
                draws = [np.random.default_rng(draw).permutation(total)[:number] for draw in range(DRAWS)]
                of = [spearmanr(values[:, drawn].mean(axis=1), test)[0] for drawn in draws]
                row.append(f"{np.mean(of):.2f}")
        rows.append(row)
    return "\n".join(cells.table_lines(("score", *head), rows))


def introduction(options: argparse.Namespace) -> str:
    return (
        "# Scores of candidates\n\n"
        "Written by `python -m benchmarks.scores`; do not edit. Rank correlation (Spearman) of scores on the search\n"
        "split with the accuracy, on the test images, of the network that is delivered without training. Networks are\n"
        f"compensated quickly, as candidates are, or from {options.fit_images} images, as they are delivered. Columns\n"
        f"have a number of images; fewer than all are drawn {DRAWS} times."
    )


if __name__ == "__main__":
    try:
        main()
    except CompressorError as error:
        raise SystemExit(f"{error.message} {error.hint or ''}") from None
