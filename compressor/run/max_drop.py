"""The fastest network that loses at most so many points of accuracy: its latency is narrowed down by runs of a front.

Whether a network keeps the limit is judged on the search split, after compensation and fine-tuning. The range of
latencies is halved a few times; each step is a run that continues the search of the one before it. The fastest network
that keeps the limit is then confirmed on the test split, with the standard error of what it loses there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.core.answers import read_answers
from compressor.core.errors import CompressorError
from compressor.core.front import Confirmed, DropLimit, Front, Lost, TargetRun
from compressor.recipe.parts import SEPARATOR, Budgets
from compressor.recipe.targets import Target
from compressor.run.finetuning import finetuned_network

if TYPE_CHECKING:
    from compressor.run.folder import RunFolder
    from compressor.run.job import Job
    from compressor.training.task import Task

STEPS = 5
"""Networks that are tried at most: the range is then a 32nd of the first, 3 % of the dense network's time or less."""

RESOLUTION = 0.01
"""Share of the dense network's time at which the range is small enough."""

ABOVE_LEAST = 1.02
"""Lower end of the range, relative to the time of the smallest network, so that a corrected table still reaches it."""


def with_latency(budgets: Budgets, share: float) -> Budgets:
    """Return the budgets of one step: this share of the dense network's time, beside the other limits."""
    return budgets.model_copy(update={"latency": f"{100 * share:g}%", "max_drop": None})


def check_alone(budgets: Budgets) -> None:
    """Refuse a limit of lost accuracy beside others that it does not go with.

    Raises:
        CompressorError: Says what to leave out.
    """
    if budgets.latency is not None:
        raise CompressorError(
            "--max-drop looks for the latency, and --latency gives it.", "Leave out one of the two."
        )
    if any(SEPARATOR in text for text in (*budgets.given().values(), *budgets.functions)):
        raise CompressorError("--max-drop looks for one network.", "Give one limit of each other budget.")


def check_metrics(task: Task) -> None:
    """Refuse a limit of lost accuracy where search split and test split are scored by different metrics.

    Raises:
        CompressorError: Says what to give.
    """
    searched, tested = task.on_search().metric, task.metric
    if searched != tested:
        words = [each.name if each.share else f"a {each.name} that is no share" for each in (searched, tested)]
        raise CompressorError(
            f"max_drop limits one loss, and the search split is scored by {words[0]}, the test split by {words[1]}.",
            "Give evaluate=, a function that scores as test= does, on the inputs of the search.",
        )


@dataclass(frozen=True)
class Narrowing:
    """Halves the range of latencies in which the fastest network that keeps the limit lies.

    Args:
        budgets: The limit of lost points, and other budgets.
        least: Smallest share of the dense network's time that can be reached.
    """

    budgets: Budgets
    least: float

    @classmethod
    def of(cls, job: Job, budgets: Budgets) -> Narrowing:
        """Return the search over all that the job's table says can be reached.

        Raises:
            CompressorError: The smallest network is hardly faster than the dense one.
        """
        assert job.table is not None
        smallest = float(job.table.curve(job.space)(job.space.smallest_row[None])[0])
        share = smallest / job.table.fitted_dense_ms(job.space) / (1 - job.recipe.contract.margin)
        least = min(1.0, ABOVE_LEAST * share)
        if 1 - least <= RESOLUTION:
            raise CompressorError(
                f"--max-drop looks for a faster network, but by the latency table the smallest one takes {share:.0%} "
                "of the dense network's time, the margin of the contract included.",
                "Limit another cost (--flops 50%), or measure the table again if the machine was busy: "
                "compress profile",
            )
        return cls(budgets, least)

    def next(self, done: Sequence[TargetRun]) -> Target | None:
        low, high = self.least, 1.0
        for each in done:
            share = float(each.budgets["latency"].rstrip("%")) / 100
            if keeps(each, float(self.budgets.max_drop or 0)):
                high = min(high, share)
            else:
                low = max(low, share)
        if len(done) >= STEPS or high - low <= RESOLUTION:
            return None
        budgets = with_latency(self.budgets, round((low + high) / 2, 3))
        return Target(f"latency-{str(budgets.latency).rstrip('%')}", budgets)


def keeps(target: TargetRun, limit: float) -> bool:
    """Return whether a network loses at most `limit` points on the search split."""
    return target.lost is not None and target.lost.search_drop is not None and target.lost.search_drop <= limit


def lost(run: RunFolder, job: Job) -> Lost:
    """Compare what a run deploys with the dense network; `job.model` has the weights of the end of its search.

    In another precision than FP32 that is the file whose time was measured.
    """
    dense = job.teacher if job.trained and job.teacher is not None else job.model
    task, device, manifest = job.task.on_search(), job.torch_device, run.manifest
    goals = task.test_goals(dense, device)
    network, after = finetuned_network(run, job), None
    if manifest.deployed is not None:
        after = task.file_score(run.file(manifest.deployed.file), network, goals, lambda _: None)
    if after is None:
        after = task.test_score(network, goals, device)
    before = task.test_score(dense, goals, device)
    scale, accuracy, slim = 100 if task.metric.share else 1, manifest.accuracy, manifest.deployed_score
    tested = None
    if accuracy.dense is not None and slim is not None:
        tested = (100 if accuracy.share else 1) * (accuracy.dense - slim)
    error = _error(run, job)
    return Lost(
        search=after,
        search_dense=before,
        search_drop=scale * (before - after),
        search_images=task.test_inputs,
        test_drop=tested,
        error=None if error is None else 100 * error,
    )


def _error(run: RunFolder, job: Job) -> float | None:
    """Return the standard error of what is lost on the test split; None if it is not known.

    Both networks see the same images, so that only those count on which one is right and the other is not.
    """
    import torch

    from compressor.core.metrics import AGREEMENT
    from compressor.training.scoring import error_of_difference, standard_error

    known, slim, file = run.manifest.accuracy, run.manifest.deployed_score, run.manifest.deployed
    if known.metric == AGREEMENT and known.images is not None and slim is not None:
        return standard_error(slim, known.images)
    answers = read_answers(run.path)
    if not answers.dense or not answers.slim:
        return None
    dense, truth, own = torch.tensor(answers.dense), torch.tensor(answers.truth), torch.tensor(answers.slim)
    if file is not None and (found := job.task.file_answers(run.file(file.file))) is not None:
        own = found[0]
    return error_of_difference(dense, own, truth)


def judged(front: Front, limit: float) -> DropLimit:
    """Return the fastest network that keeps the limit, or the one that loses least; and what the test says of it."""
    shares = {point.target: point.share for point in front.points if point.kind == "ours"}
    kept = [each for each in front.targets if keeps(each, limit)]
    found = DropLimit(points=limit, steps=len(front.targets), most_steps=STEPS)
    if kept:
        best = min(kept, key=lambda each: float(shares.get(each.folder) or float("inf")))
    else:
        best = min(front.targets, key=_searched_drop)
    known = {"chosen": best.folder, "kept": bool(kept), "confirmed": confirmed(best.lost, limit)}
    return found.model_copy(update=known)


def _searched_drop(target: TargetRun) -> float:
    """Return the loss on the search split in points; infinite if it is not known."""
    drop = None if target.lost is None else target.lost.search_drop
    return float("inf") if drop is None else drop


def confirmed(found: Lost | None, limit: float) -> Confirmed | None:
    """Return whether the loss on the test split keeps the limit: undecided within a standard error of it.

    >>> confirmed(Lost(test_drop=0.7, error=0.2), 1.0), confirmed(Lost(test_drop=1.1, error=0.2), 1.0)
    ('kept', 'undecided')
    """
    if found is None or found.test_drop is None:
        return None
    error = found.error or 0.0
    if found.test_drop + error <= limit:
        return "kept"
    return "missed" if found.test_drop - error > limit else "undecided"
