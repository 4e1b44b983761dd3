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
        """Return the search over all that the job's table says can be reached."""
        assert job.table is not None
        smallest = float(job.table.curve(job.space)(job.space.smallest_row[None])[0])
        share = smallest / job.table.fitted_dense_ms(job.space) / (1 - job.recipe.contract.margin)
        return cls(budgets, min(1.0, ABOVE_LEAST * share))

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
    """Compare a run's delivered network with the dense one; `job.model` has the weights of the end of its search."""
    dense = job.teacher if job.trained and job.teacher is not None else job.model
    task = job.task.on_search()
    scored = task.scorer(dense, job.torch_device)
    before, after = scored(dense), scored(finetuned_network(run, job))
    scale, accuracy = 100 if task.metric.share else 1, run.manifest.accuracy
    tested = None
    if accuracy.dense is not None and accuracy.finetuned is not None:
        tested = (100 if accuracy.share else 1) * (accuracy.dense - accuracy.finetuned)
    error = _error(run)
    return Lost(
        search=after,
        search_dense=before,
        search_drop=scale * (before - after),
        search_images=task.test_inputs,
        test_drop=tested,
        error=None if error is None else 100 * error,
    )


def _error(run: RunFolder) -> float | None:
    """Return the standard error of what is lost on the test split; None if it is not known.

    Both networks see the same images, so that only those count on which one is right and the other is not.
    """
    import torch

    from compressor.core.metrics import AGREEMENT
    from compressor.training.scoring import error_of_difference, standard_error

    known = run.manifest.accuracy
    if known.metric == AGREEMENT and known.images is not None and known.finetuned is not None:
        return standard_error(known.finetuned, known.images)
    answers = read_answers(run.path)
    if not answers.dense or not answers.slim:
        return None
    return error_of_difference(*(torch.tensor(each) for each in (answers.dense, answers.slim, answers.truth)))


def judged(front: Front, limit: float) -> DropLimit:
    """Return the fastest network that keeps the limit, or the one that loses least; and what the test says of it."""
    shares = {point.target: point.share for point in front.points if point.kind == "ours"}
    kept = [each for each in front.targets if keeps(each, limit)]
    found = DropLimit(points=limit, steps=len(front.targets), most_steps=STEPS)
    if kept:
        best = min(kept, key=lambda each: float(shares.get(each.folder) or float("inf")))
    else:
        best = min(front.targets, key=lambda each: each.lost.search_drop or 0.0 if each.lost else float("inf"))
    known = {"chosen": best.folder, "kept": bool(kept), "confirmed": confirmed(best.lost, limit)}
    return found.model_copy(update=known)


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
