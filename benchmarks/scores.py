"""Which score of a candidate orders plans as the networks that are delivered without training are ordered.

    python -m benchmarks.scores --data folder:/data/cifar10-jpeg --weights cifar_resnet20=resnet20.pt

The plans are as good and as alike as those among which a search chooses: near two that solve the budget for the
channels' saliency. Each is built as candidates are (compensated quickly) and as it is delivered (layer by layer). The
log probabilities of both on images of the search split give every score; the accuracy of the delivered network on the
test images says which order is right. Scores are also computed from parts of the images, drawn forty times.

Networks are kept in `--work`; a stopped command continues with the plans that are missing, several commands may run
side by side, and docs/results/scores.md is written at the end.
"""

from __future__ import annotations

import argparse
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
    from torch import Tensor

    from compressor.run.job import Job

METHODS = {"quick": "as candidates", "layers": "as delivered"}
IMAGES = (500, 1000, 2000, 5000)
DRAWS = 40
NEAR = 15
"""Plans near each of the two."""


def main() -> None:
    options = parsed()
    console = Console(width=150)
    parts = [introduction(options)]
    for model in options.weights:
        for budget in options.budgets:
            job = cells.load_job(options, model, 0, budget)
            folder = options.work / f"{model}-{budget.replace(':', '-').replace('%', '')}"
            found = networks(options, cells.compensating(job, "auto", options.fit_images), folder, console)
            parts += [f"## {model}, {budget}", table(found)]
    write_atomic(options.page, "\n\n".join(parts) + "\n")
    console.print(f"Wrote {options.page}", highlight=False)


def parsed() -> argparse.Namespace:
    parser = cells.parser_of("scores", __doc__, epochs=1)
    parser.add_argument("--budgets", nargs="+", default=["params:30%"])
    return cells.parsed(parser, None)


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


def networks(options: argparse.Namespace, job: Job, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Return each plan's log probabilities on the search images by method, what they are to be, and the accuracy."""
    import torch

    from compressor.run.stages import environment
    from compressor.search.networks import Networks
    from compressor.training.scoring import accuracy, log_probabilities

    env, _ = environment(job, job.budgets())
    images = job.task.search.sample(min(max(IMAGES), len(job.task.search)), 0).in_memory()
    labels = torch.cat([labels for _, labels in images.batches(256)])
    dense = log_probabilities(job.model, images)
    builders = {
        method: Networks(job.space, job.task.calibration, method, images=options.fit_images, seed=0)
        for method in METHODS
    }
    folder.mkdir(parents=True, exist_ok=True)
    plans = plans_of(job, env)
    for number, widths in enumerate(plans):
        path = folder / f"{number}.pt"
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if path.exists():
                    continue
                built = {method: builder.build(env.plan(widths)) for method, builder in builders.items()}
                entry = {method: log_probabilities(network, images) for method, network in built.items()}
                test = accuracy(built["layers"], job.task.test)
                torch.save({**entry, "widths": list(widths), "test": test}, path)
        except Timeout:
            continue  # another command builds it
        console.print(f"{number + 1} of {len(plans)}: {test:.2%}", highlight=False)
    return [
        torch.load(path, weights_only=True) | {"dense": dense, "labels": labels}
        for path in (folder / f"{number}.pt" for number in range(len(plans)))
    ]


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


def table(found: list[dict[str, Any]]) -> str:
    """Return the rank correlation of each score with the test accuracy, by method and number of images."""
    from scipy.stats import spearmanr

    test = np.array([each["test"] for each in found])
    total = len(found[0]["labels"])
    numbers = [number for number in IMAGES if number <= total]
    head = [f"{METHODS[method]}, {number}" for method in METHODS for number in numbers]
    lines = [f"| score | {' | '.join(head)} |", "|" + "---|" * (1 + len(head))]
    for name, score in scores().items():
        row = []
        for method in METHODS:
            values = np.stack(
                [score(each[method].float(), each["dense"], each["labels"]).numpy() for each in found]
            )
            for number in numbers:
                draws = [np.random.default_rng(draw).permutation(total)[:number] for draw in range(DRAWS)]
                of = [spearmanr(values[:, drawn].mean(axis=1), test)[0] for drawn in draws]
                row.append(f"{np.mean(of):.2f}")
        lines.append(f"| {name} | {' | '.join(row)} |")
    spread = f"{test.min():.1%} to {test.max():.1%}, with a deviation of {100 * test.std():.2f} points"
    lines += ["", f"{len(found)} plans; test accuracies from {spread}."]
    return "\n".join(lines)


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
