"""What a candidate should be scored by: the rank correlation of each proxy with the accuracy after fine-tuning.

    python -m benchmarks.proxy --data folder:/data/cifar10-jpeg \\
        --weights cifar_resnet20=resnet20.pt cifar_resnet56=resnet56.pt

For each budget there are plans of all qualities: half from the searches in benchmarks/results/agents, half random,
from nearly uniform to very uneven. Each network is scored as it is cut (batch norm re-estimated) and as it is
compensated, from moments and layer by layer, by three numbers on the same images of the search split: accuracy,
cross-entropy, and divergence from the dense network's outputs. Each is then fine-tuned with two seeds, whose
disagreement bounds the correlation that any proxy can reach.

A cell is a scored or a fine-tuned network. Each is a line of `--results`; a stopped command continues with the cells
that have none, several commands may run side by side, and docs/results/proxy.md is written again after each plan.
`--list` prints the missing cells with an estimate of their time on this machine; `--only 'cifar_resnet20/params:50%/*'`
selects some. With `--reuse`, accuracies of the agents' study serve as one of the two where weights, images and
fine-tuning are the same; they may come from another machine and version.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import cells
from benchmarks.cells import Lines, Speed
from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.run.job import Job

BUDGETS = {
    "cifar_resnet20": ("latency:50%", "latency:30%", "params:50%", "params:30%"),
    "cifar_resnet56": ("flops:50%", "params:50%"),
}
NETWORKS = ("cut", "moments", "quick", "layers")
"""How a candidate is built before it is scored; each is a cell of a plan."""

SCORES = ("accuracy", "cross_entropy", "divergence")
LABELS = {
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy",
    "divergence": "divergence from dense",
    "cut": "cut, batch norm re-estimated",
    "moments": "compensated from moments",
    "quick": "compensated layer by layer, quickly, from a quarter of the images",
    "layers": "compensated layer by layer",
}
RESAMPLES = 2000
INTRODUCTION = """# Scores of candidates

Written by `python -m benchmarks.proxy` from its cells; do not edit. Each proxy orders plans of all qualities (half from
searches, half random) before any training; the table shows its rank correlation (Spearman) with the accuracy on the
test images after {epochs} of fine-tuning with distillation, mean of two seeds, from the {start} network; ± is
its standard error over plans (bootstrap). Proxies are computed on {search_images} images of the search split; batch
norm is re-estimated on {batch_norm_images} images, compensation has {fit_images} unlabeled images.
Cross-entropy and divergence are negated, so that a good proxy is positive. *Seeds agree* is the rank correlation of the
two seeds' accuracies, and *ceiling* what a perfect proxy would have with the mean of two such noisy accuracies, the
square root of 2r/(1+r). *Upper half* has only the plans above the median after fine-tuning, among which a search
chooses. *Lost* is by how many points the plan that the proxy puts first is behind the best one, after fine-tuning.
*Seconds* are those of one candidate with one thread: network, batch norm, compensation and images.
"""


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    console = Console(width=150)
    own = {name: getattr(options, name) for name in ("start", "plans", "reuse")}
    lines = Lines(options.results, {**cells.settings_of(options), **own})
    if not options.page_only:
        Study(options, lines, console).run()
    cells.finish(options, lines, page, console)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = cells.parser_of_cells("proxy", __doc__, epochs=1)
    parser.add_argument("--plans", type=int, default=32, help="of each budget")
    parser.add_argument("--seeds", nargs=2, type=int, default=[0, 1], help="of fine-tuning")
    parser.add_argument(
        "--start", choices=NETWORKS, default="cut", help="network that fine-tuning starts from"
    )
    parser.add_argument(
        "--recorded", type=Path, default=Path("benchmarks/results/agents"), help="results of benchmarks.agents"
    )
    parser.add_argument("--reuse", action="store_true", help="use recorded accuracies as one of the two")
    options = cells.parsed(parser, arguments)
    if options.plans < 4:
        parser.error(f"--plans {options.plans}: expected 4 or more")
    if unknown := set(options.weights) - set(BUDGETS):
        parser.error(f"--weights {min(unknown)}: expected {' or '.join(BUDGETS)}")
    return options


# ---------------------------------------------------------------- plans
def plans_of(options: argparse.Namespace, job: Job, model: str, budget: str) -> list[dict[str, Any]]:
    """Return plans of all qualities at a budget: widths in the space's order, and accuracies that are known.

    Half are recorded ones, spread evenly over their accuracies; the others are random, the first ones nearly uniform,
    the last ones very uneven.
    """
    from compressor.run.stages import environment
    from compressor.search.proposals import near_widths

    env, _ = environment(job, job.budgets())
    known = recorded(options, job, model, budget)
    order = sorted(known, key=lambda widths: statistics.fmean(known[widths].values()))
    places = np.linspace(0, len(order) - 1, min(len(order), options.plans // 2)).round().astype(int)
    chosen = {order[place]: known[order[place]] for place in places.tolist()}
    kept = {widths: known[widths] for widths in chosen if env.bounds.feasible(np.array([widths]))[0]}
    found: dict[tuple[int, ...], dict[int, float]] = dict(kept)
    missing = options.plans - len(found)
    for number in range(20 * options.plans):
        if len(found) == options.plans:
            break
        generator = np.random.default_rng([0, number])
        spread = 0.1 + 1.1 * (number % missing) / missing
        widths = near_widths(env, env.bounds.dense, generator, spread, share=1.0)
        found.setdefault(tuple(int(width) for width in widths), {})
    if len(found) < options.plans:
        raise CompressorError(f"{model} has only {len(found)} plans at {budget}; --plans is {options.plans}.")
    return [
        {"widths": list(widths), "source": "recorded" if widths in kept else "random", "after": after}
        for widths, after in found.items()
    ]


def recorded(
    options: argparse.Namespace, job: Job, model: str, budget: str
) -> dict[tuple[int, ...], dict[int, float]]:
    """Return the plans of benchmarks.agents at a budget, with the accuracy after fine-tuning by seed."""
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for path in sorted((options.recorded / "cells").glob(f"{model}-*.json")):
        entry = json.loads(path.read_text())
        names = [group.name for group in job.space.groups]
        if (entry["model"], entry["budget"]) == (model, budget) and list(entry["widths"]) == names:
            after = found.setdefault(tuple(entry["widths"].values()), {})
            after.setdefault(int(entry["seed"]), float(entry["after"]))
    return found


def same_training(options: argparse.Namespace, job: Job, model: str) -> bool:
    """Whether recorded accuracies are of the same weights and images, and of fine-tuning as it is here."""
    path = options.recorded / "networks" / f"{model}.json"
    if not options.reuse or options.start != "cut" or not path.exists():
        return False
    entries = (json.loads(each.read_text()) for each in (options.recorded / "cells").glob(f"{model}-*.json"))
    weights = json.loads(path.read_text())["weights_sha256"]
    return weights == cells.weights_checksums(options)[model] and all(
        entry["epochs"] == options.epochs and entry["test_images"] == len(job.task.test) for entry in entries
    )


# ---------------------------------------------------------------- running the cells
class Study:
    """Runs the missing cells, one budget after another, because its networks share what is loaded."""

    def __init__(self, options: argparse.Namespace, lines: Lines, console: Console) -> None:
        self.options, self.lines, self.console = options, lines, console
        self.deadline = time.monotonic() + 60 * options.minutes
        self.total = 0.0

    def run(self) -> None:
        for model in (name for name in BUDGETS if name in self.options.weights):
            for budget in BUDGETS[model]:
                row = f"{model}/{budget}"
                if self._missing(row) and time.monotonic() < self.deadline:
                    self._budget(model, budget)
        if self.options.list:
            self.console.print(f"All together about {self.total / 3600:.1f} hours on one core.", highlight=False)

    def _missing(self, row: str) -> list[str]:
        """Return the cells of a budget that are to be run: the plans, then scores and fine-tunings of each."""
        done = self.lines.entries()
        tuned = [f"tuned{place}" for place in range(2)]
        parts = [f"plan{number:02d}/{part}" for number in range(self.options.plans) for part in (*NETWORKS, *tuned)]
        wanted = [f"{row}/plans", *cells.chosen((f"{row}/{part}" for part in parts), self.options)]
        return [cell for cell in wanted if cell not in done] if len(wanted) > 1 else []

    def _budget(self, model: str, budget: str) -> None:
        from compressor.latency.table import LatencyTable

        options, row = self.options, f"{model}/{budget}"
        latency = budget.startswith("latency")
        path = options.recorded / "tables" / f"{model}.json"
        table = LatencyTable.read(path) if latency and path.exists() else None
        # a count is compared over all widths; a latency over those that suit the device, as in benchmarks.agents
        job = cells.load_job(options, model, 0, budget, "auto" if latency else 1, table)
        speed = Speed.of(job)
        scorer = Scorer(options, job)
        if f"{row}/plans" not in self.lines.entries():
            with self.lines.claimed(f"{row}/plans") as ours:
                if ours:
                    self.lines.add(f"{row}/plans", {"plans": plans_of(options, job, model, budget)})
        while f"{row}/plans" not in self.lines.entries():
            time.sleep(1)  # another command is drawing them
        plans = self.lines.entries()[f"{row}/plans"]["plans"]
        for cell in self._missing(row):
            number, part = int(cell.split("/")[2].removeprefix("plan")), cell.rpartition("/")[2]
            plan = plans[number]
            seconds = self._estimate(job, speed, plan, part)
            self.total += seconds
            self.console.print(f"{cell}: about {cells.minutes(seconds)}", highlight=False)
            if options.list:
                continue
            if time.monotonic() > self.deadline:
                return
            with self.lines.claimed(cell) as ours:
                if ours:
                    values = self._cell(job, scorer, model, plan, part)
                    self.lines.add(cell, values)
            if part == "tuned1":
                write_atomic(options.page, page(options, self.lines))

    def _estimate(self, job: Job, speed: Speed, plan: dict[str, Any], part: str) -> float:
        """Return the seconds that a cell will take, from the time of an image and the number of images."""
        space = job.space
        share = space.macs(np.array(plan["widths"])) / space.macs(space.dense_widths)
        if part.startswith("tuned"):
            return cells.fine_tuning_seconds(speed, job, self.options.epochs, share, distilled=True)
        images = self.options.search_images + 128 * self.options.batch_norm_batches
        fit = 10 * self.options.fit_images * speed.scored if part == "layers" else 0.0
        return images * speed.scored * share + fit

    def _cell(
        self, job: Job, scorer: Scorer, model: str, plan: dict[str, Any], part: str
    ) -> dict[str, Any]:
        if not part.startswith("tuned"):
            return scorer.score(plan["widths"], part)
        seeds = self._seeds(job, model, plan)
        seed, known = seeds[int(part.removeprefix("tuned"))]
        if known is not None:
            return {"seed": seed, "after": known, "recorded": True}
        network = scorer.build(plan["widths"], self.options.start)
        seconds = cells.fine_tune(cells.with_seed(job, seed), network, self.options.epochs, distilled=True)
        return {"seed": seed, "after": cells.tested(job, network), "seconds": seconds}

    def _seeds(self, job: Job, model: str, plan: dict[str, Any]) -> list[tuple[int, float | None]]:
        """Return the two seeds of a plan, with the accuracy where it is recorded; one of the two is always run here."""
        known = [(int(seed), after) for seed, after in plan["after"].items()]
        if not known or not same_training(self.options, job, model):
            return [(seed, None) for seed in self.options.seeds]
        other = next(seed for seed in self.options.seeds if seed != known[0][0])
        return [known[0], (other, None)]


class Scorer:
    """Builds networks of plans and scores them by every proxy.

    Args:
        options: Numbers of images.
        job: Network, data and space.
    """

    def __init__(self, options: argparse.Namespace, job: Job) -> None:
        from compressor.search.networks import Networks

        self.job = job
        self.networks = {
            kind: Networks(job.space, job.task.train, kind, images=options.fit_images, device=job.torch_device)
            for kind in NETWORKS
            if kind != "cut"
        }
        ranked = job.task.train.batches(128, shuffle_seed=job.recipe.seed, device=job.torch_device)
        data = [batch for _, batch in zip(range(2), ranked, strict=False)]
        self.ranking = job.space.rank(job.recipe.pruning.importance, data)
        self.batches = options.batch_norm_batches
        self.statistics = job.task.train.sample(128 * self.batches, 0).in_memory()
        self.search = list(job.task.search.sample(options.search_images, 0).batches(128, device=job.torch_device))
        self.dense = [self._outputs(job.model, images) for images, _ in self.search]
        self._warm: set[str] = set()

    def build(self, widths: Sequence[int], kind: str) -> nn.Module:
        """Return the network of a plan: cut, with batch norm re-estimated, or compensated."""
        from compressor.training.scoring import reestimate_batch_norm

        plan = self.job.space.plan(list(widths), self.ranking)
        if kind != "cut":
            return self.networks[kind].build(plan).eval()
        network = self.job.space.apply(plan).eval()
        reestimate_batch_norm(network, self.statistics, batches=self.batches, device=self.job.torch_device)
        return network

    def score(self, widths: Sequence[int], kind: str) -> dict[str, Any]:
        """Return the three scores of a plan's network and the seconds that it took."""
        from torch.nn import functional

        from compressor.training import losses

        if kind not in self._warm:  # what is gathered once for given weights is no candidate's time
            self.build(widths, kind)
            self._warm.add(kind)
        started = time.perf_counter()
        network = self.build(widths, kind)
        right = entropy = divergence = 0.0
        for (images, labels), dense in zip(self.search, self.dense, strict=True):
            outputs = self._outputs(network, images)
            right += int((outputs.argmax(dim=1) == labels).sum())
            entropy += float(functional.nll_loss(outputs, labels, reduction="sum"))
            divergence += losses.divergence(outputs, dense)
        seconds = time.perf_counter() - started
        count = sum(len(labels) for _, labels in self.search)
        return {
            "accuracy": right / count,
            "cross_entropy": entropy / count,
            "divergence": divergence / count,
            "seconds": seconds,
        }

    @staticmethod
    def _outputs(network: nn.Module, images: Tensor) -> Tensor:
        """Return the logarithms of the probabilities of each class, (N, classes)."""
        import torch

        network.eval()
        with torch.no_grad():
            return torch.log_softmax(network(images.contiguous(memory_format=torch.channels_last)), dim=1)


# ---------------------------------------------------------------- the page
def page(options: argparse.Namespace, lines: Lines) -> str:
    """Return the page of all plans whose cells are complete."""
    done = lines.entries()
    start = LABELS[lines.settings["start"]].partition(",")[0]
    values = {
        **lines.settings,
        "start": start,
        "epochs": cells.epochs(lines.settings["epochs"]),
        "batch_norm_images": 128 * lines.settings["batch_norm_batches"],
    }
    parts = [INTRODUCTION.format(**values)]
    missing = 0
    for model, budgets in BUDGETS.items():
        for budget in budgets:
            row = f"{model}/{budget}"
            plans = complete(done, row, options.plans)
            missing += options.plans - len(plans)
            if len(plans) >= 4:
                parts += [f"## {model}, {budget}", "", *section(plans), ""]
    if missing:
        parts += [f"{missing} plans are not complete; the same command runs them.", ""]
    command = cells.command(options, "proxy", BUDGETS, ["plans", "start"], " --reuse" if options.reuse else "")
    return "\n".join([*parts, "```", command, "```", ""])


def complete(done: dict[str, Any], row: str, plans: int) -> list[dict[str, Any]]:
    """Return the plans of a budget that are scored by every proxy and fine-tuned twice."""
    found = []
    for number in range(plans):
        parts = {part: done.get(f"{row}/plan{number:02d}/{part}") for part in (*NETWORKS, "tuned0", "tuned1")}
        if all(parts.values()):
            found.append(parts)
    return found


def section(plans: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of a budget."""
    after = np.array([[plan[f"tuned{place}"]["after"] for place in range(2)] for plan in plans])
    mean = after.mean(axis=1)
    agree = spearman(after[:, 0], after[:, 1])
    ceiling = max(0.0, 2 * agree / (1 + agree)) ** 0.5 if agree > -1 else 0.0
    noise = float(np.abs(after[:, 0] - after[:, 1]).mean() / 1.128)  # of normal values, to a standard deviation
    yield (
        f"{len(plans)} plans, {100 * mean.min():.1f} to {100 * mean.max():.1f} % after fine-tuning (standard deviation "
        f"between plans {100 * mean.std(ddof=1):.2f} points, between seeds {100 * noise:.2f}). "
        f"Seeds agree: {agree:.2f}; ceiling: {ceiling:.2f}."
    )
    yield ""
    upper = mean >= np.median(mean)
    rows = []
    for kind in NETWORKS:
        seconds = statistics.median(plan[kind]["seconds"] for plan in plans)
        for score in SCORES:
            sign = 1 if score == "accuracy" else -1
            values = sign * np.array([plan[kind][score] for plan in plans])
            rows.append(
                (
                    f"{LABELS[score]}, {LABELS[kind]}",
                    f"{spearman(values, mean):.2f} ± {standard_error(values, mean):.2f}",
                    f"{spearman(values[upper], mean[upper]):.2f}",
                    f"{100 * (mean.max() - mean[int(values.argmax())]):.2f}",
                    f"{seconds:.1f}",
                )
            )
    yield from cells.table_lines(("proxy", "rank correlation", "upper half", "lost", "seconds"), rows)


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the rank correlation; 0 where one of the two does not vary."""
    from scipy.stats import rankdata

    ranks = rankdata(one), rankdata(other)
    if min(part.std() for part in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def standard_error(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the standard error of the rank correlation over plans, from resamples with replacement."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(one), (RESAMPLES, len(one)))
    return float(np.std([spearman(one[draw], other[draw]) for draw in draws]))


if __name__ == "__main__":
    try:
        main()
    except CompressorError as error:
        raise SystemExit(f"{error.message} {error.hint or ''}") from None
