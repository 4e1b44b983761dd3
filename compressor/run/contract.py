"""The contract: the slim network keeps its latency target when measured on the device, with little of it left unused.

All comparisons use shares of the dense network's time, which is in the run's precision; in floats if that is mixed. A
share stays the same on a shared machine, while milliseconds do not (`latency.paired`). A target in milliseconds is
converted to a share of the dense network's quiet level: the lowest time that this run and its table have seen.

A plan measured well below its target has lost accuracy without need, because the table predicted it too slow. The
search then continues with the table lowered to the measurement, or to what lies between two measurements on both sides
of the target. Every plan that misses the target widens the margin for
the plans after it. Of the plans that meet the target, the one closest to it is chosen. A difference inside the
confidence interval of a measurement does not count: it never causes another search. An undecided plan causes another
search only if its whole interval lies above the aim of the search.

A recipe may ask for another percentile than the median, such as the time that one run in a hundred exceeds. The table
predicts medians. How far the slim network's percentile lies above its median, compared with the dense one's, is
therefore learned as any other error of the table: predictions are refitted to the ratio of the percentiles. Such a
ratio is known to some per cent only. Once it has been measured, the search aims lower by that noise, so that the whole
interval can lie below the target, and a plan that is undecided for its noise sends the search on. A target in
milliseconds is compared with the slim network's percentile itself, which includes the load of the moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.manifest import Measurement, kept
from compressor.core.progress import say
from compressor.latency.request import Turns
from compressor.pruning.plan import ChannelPlan
from compressor.run.trainings import search_epochs

if TYPE_CHECKING:
    from compressor.budgets.base import Budget, BudgetSpec
    from compressor.latency.paired import Ratio
    from compressor.latency.table import LatencyTable
    from compressor.pruning.space import PruningSpace
    from compressor.recipe import Recipe
    from compressor.run.folder import RunFolder
    from compressor.run.job import Job

KEPT_PLAN = "search/kept_plan-{round}.json"

WIDER = 0.5
"""Added to the margin for each plan that misses its target, as a share of the recipe's margin."""

WIDEST = 0.5
"""Upper bound of the margin, however many plans have missed."""

UNUSED = 0.01
"""Another search is worthwhile for a plan that is this share of the target or more below the margin."""

SHORTEST_PROBE_S = 20.0
"""Time limit of a probe, in seconds, where little training follows."""

BINDING = 0.03
"""A plan predicted further below the aim than this share of it was limited by something other than latency."""


def correction_at(aim: float, points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the (predicted, measured) shares of the dense network's time by which a table is refitted.

    A factor between prediction and measurement holds for plans of a similar size only: refitting by the last plan alone
    can jump from one side of the aim to the other. If plans on both sides of the aim have been measured, the closest
    two are therefore interpolated at the aim; else the last plan counts.

    Args:
        aim: Share that the next plan is to take.
        points: (predicted, measured) shares of the measured plans, by the present table; the last plan at the end.

    >>> correction_at(0.45, [(0.6, 0.7), (0.3, 0.35)])  # 0.6 -> 0.7 and 0.3 -> 0.35
    (0.38571428571428573, 0.45)
    """
    above = min((each for each in points if each[1] > aim), key=lambda each: each[1], default=None)
    below = max((each for each in points if each[1] <= aim), key=lambda each: each[1], default=None)
    if above is None or below is None or above[0] <= below[0]:
        return points[-1]
    part = (aim - below[1]) / (above[1] - below[1])
    return below[0] + part * (above[0] - below[0]), aim


def points_of(
    table: LatencyTable, space: PruningSpace, rounds: Sequence[Measurement]
) -> list[tuple[float, float]]:
    """Return the (predicted, measured) share of the dense network's time of measured plans; predicted by `table`."""
    if not rounds:
        return []
    predicted = table.curve(space)(np.asarray([each.widths for each in rounds])) / table.fitted_dense_ms(space)
    return [(float(share), each.ratio) for share, each in zip(predicted, rounds, strict=True)]


def interval_of(ratio: Ratio) -> list[float | None]:
    """Return a ratio's interval for the manifest."""
    return [ratio.low, ratio.high if ratio.high < float("inf") else None]


def probe_limit_s(recipe: Recipe, training_s: float | None) -> float:
    """Return the time limit of a probe in seconds: that of the training that it may save, but not too short.

    Args:
        recipe: Its measurements have a time limit; another percentile than the median needs all of it.
        training_s: About what fine-tuning takes; None if that is not known.
    """
    limit_s = recipe.contract.seconds
    if training_s is None or not recipe.conditions.at_median:
        return limit_s
    return min(limit_s, max(SHORTEST_PROBE_S, training_s))


def limit_ms(recipe: Recipe, budget: BudgetSpec | None) -> float | None:
    """Return the target of another percentile than the median if it is in milliseconds; else None."""
    if budget is None or budget.relative or recipe.conditions.at_median:
        return None
    return budget.value


class Contract:
    """The latency target of a run, judged by the measurements in its manifest.

    Args:
        run, job: Run and job; the job's table is refitted where the search continues.
    """

    def __init__(self, run: RunFolder, job: Job) -> None:
        self._run, self._job = run, job

    @property
    def measurable(self) -> bool:
        """Whether there is a latency target and a device to measure on."""
        return self._job.latency_budget is not None and self._job.measurable

    def target_share(self, dense_ms: float) -> float | None:
        """Return the latency target as a share of the dense network's time; None without a target.

        Args:
            dense_ms: Latency of the dense network on the quiet device.
        """
        budget = self._job.latency_budget
        return None if budget is None else budget.share(dense_ms)

    def searched_share(self) -> float | None:
        """Return the target of the search as a share of the dense network's time, before the margin is subtracted.

        It changes only when the search continues, so that a resumed run keeps the same budget.
        """
        if self._job.table is None:
            return None
        quiet_ms = self._run.manifest.quiet_dense_ms
        return self.target_share(self._job.table.dense_ms(self._job.space) if quiet_ms is None else quiet_ms)

    def turns(self, plan: ChannelPlan) -> Turns:
        """Return how long a plan is timed: until its target is decided, or without a target if it prunes nothing."""
        job = self._job
        target = None if self._unchanged(self._widths(plan)) else self.searched_share()
        contract = job.recipe.contract
        return Turns(
            contract.repeats,
            target,
            contract.seconds,
            job.recipe.percentile,
            None if target is None else limit_ms(job.recipe, job.latency_budget),
        )

    def probe_turns(self, plan: ChannelPlan) -> Turns:
        """Return how long a plan is timed before its training: at the median, no longer than that training may take.

        A probe finds plans that are not worth training. The delivered network is measured once more, with all the time.
        """
        seconds = probe_limit_s(self._job.recipe, self._finetuning_s())
        return dataclasses.replace(self.turns(plan), seconds=seconds)

    def _finetuning_s(self) -> float | None:
        """Return about how long fine-tuning takes, by the epochs of the search; None if it trained none."""
        left = int(self._job.recipe.epochs or 0) - search_epochs(self._job)
        if not left:
            return 0.0
        seconds = [float(each.seconds) for each in self._run.manifest.training if each.seconds is not None]
        return left * float(np.median(seconds)) if seconds else None

    def quiet_dense_ms(self, now_ms: float) -> float:
        """Return the dense network's time on the quiet device, the reference for targets in milliseconds.

        Args:
            now_ms: Quiet level of the dense network during the current measurement, in milliseconds.

        Returns:
            For a target in milliseconds, the lowest time that this run has seen; otherwise `now_ms`. A percentile is
            that of this measurement in any case.
        """
        budget = self._job.latency_budget
        if budget is None or budget.relative or self._by_percentile:
            return now_ms
        return min([now_ms, *(float(each.dense_ms) for each in self._run.manifest.rounds)])

    def predicted_share(self, plan: ChannelPlan) -> float:
        """Return the slim network's time as a share of the dense one's, predicted by the table."""
        table, space = self._job.table, self._job.space
        assert table is not None
        return table.predict(space, plan) / table.fitted_dense_ms(space)

    def search_targets(self, margin: float = 0.0) -> dict[str, float]:
        """Return the run's targets by name; that of latency in milliseconds of the table, less a share `margin`."""
        job = self._job
        targets = {entry.name: float(entry.target) for entry in self._run.manifest.budgets}
        share = self.searched_share()
        if share is not None and job.table is not None:
            aim = share if share >= 1 else share * (1 - margin)  # the dense network keeps a share of 1
            targets["latency"] = aim * job.table.fitted_dense_ms(job.space)
        return targets

    def search_budgets(self) -> list[Budget]:
        """Return the budgets of the search: the run's targets, with the margin subtracted from the latency."""
        job, targets = self._job, self.search_targets(self._margin())
        budgets: list[Any] = list(job.budgets())  # frozen dataclasses, which their abstract base does not declare
        return [dataclasses.replace(budget, target=targets[budget.name]) for budget in budgets]

    def combined(self, plan: ChannelPlan, ratio: Ratio, file: str) -> Ratio:
        """Return what is known of a plan's ratio: this measurement, and earlier ones if it alone decides nothing.

        Args:
            plan, ratio: The plan and its measurement.
            file: The timed file, as in `Measurement`; only measurements of the same one are combined.
        """
        target, widths = self.target_share(self.quiet_dense_ms(ratio.dense_ms)), self._widths(plan)
        if target is None:
            return ratio
        if self._unchanged(widths):  # the same network twice: there is nothing to measure
            return dataclasses.replace(ratio, value=1.0, low=1.0, high=1.0)
        if ratio.verdict(target) == "undecided":
            own = limit_ms(self._job.recipe, self._job.latency_budget) is not None
            for each in self._run.manifest.rounds:  # weights do not matter for time
                if (each.widths, each.file) == (widths, file) and each.interval[1] is not None:
                    unit = each.dense_ms / ratio.dense_ms if own else 1.0
                    ratio = ratio.together(each.ratio * unit, each.low * unit, each.high * unit)
        return ratio

    def judge(self, plan: ChannelPlan, ratio: Ratio, file: str) -> Measurement:
        """Return a combined measurement of a plan, and of a timed file, with its verdict on the latency target."""
        dense_ms, predicted = self.quiet_dense_ms(ratio.dense_ms), self.predicted_share(plan)
        target = self.target_share(dense_ms)
        assert target is not None
        verdict = ratio.verdict(target)
        return Measurement(
            predicted_ms=predicted * dense_ms,
            measured_ms=ratio.value * dense_ms,
            target_ms=target * dense_ms,
            dense_ms=dense_ms,
            predicted_ratio=predicted,
            ratio=ratio.value,
            interval=interval_of(ratio),
            target_ratio=target,
            bursts=ratio.bursts,
            seconds=round(ratio.seconds, 1),
            verdict=verdict,
            kept=kept(verdict),
            widths=self._widths(plan),
            file=file,
        )

    def remember(self, plan: ChannelPlan) -> None:
        """Save the last measured plan, unless it misses the target."""
        rounds = self._run.manifest.rounds
        if rounds[-1].kept is not False:
            write_atomic(self._file(len(rounds)), plan.to_json())

    def continue_search(self) -> bool:
        """Return to the search if the last measured plan is too slow, or leaves too much of its target unused.

        Returns:
            Whether the search continues; the table is then refitted.
        """
        return (self._too_slow() or self._slack_left()) and self._tighten()

    def return_to_search(self, plan: ChannelPlan) -> bool:
        """After fine-tuning, return to the search or to an earlier plan if the delivered network is too slow.

        If no search is left, an undecided network gives way only to a plan that met the target in every measurement.
        """
        rounds = self._run.manifest.rounds
        if not rounds or not self._too_slow():
            return False
        if self._tighten():
            return True
        best = self.best_plan(plan)
        if best.checksum == plan.checksum:
            return False
        if rounds[-1].verdict == "undecided" and self._verdicts()[tuple(self._widths(best))] != {"kept"}:
            return False
        self._run.reopen("finetune", "export", "measure")
        return True

    def best_plan(self, plan: ChannelPlan) -> ChannelPlan:
        """Return the plan to continue with: the one closest to the target among those that met it in every measurement.

        If none met it, the plan furthest below the target among those that never missed it; if all missed, `plan`, the
        last one of the search.
        """
        used: dict[tuple[int, ...], float] = {}
        verdicts = self._verdicts()
        files: dict[tuple[int, ...], Path] = {}
        for number, each in enumerate(self._run.manifest.rounds, start=1):
            widths = tuple(each.widths)
            used[widths] = max(used.get(widths, 0.0), each.ratio / each.target_ratio)
            if self._file(number).exists():
                files[widths] = self._file(number)
        met = [widths for widths in files if verdicts[widths] == {"kept"}]
        not_missed = [widths for widths in files if "missed" not in verdicts[widths]]
        if not not_missed:
            return plan
        best = max(met, key=used.__getitem__) if met else min(not_missed, key=used.__getitem__)
        return ChannelPlan.from_json(files[best].read_text(encoding="utf-8"))

    def _verdicts(self) -> dict[tuple[int, ...], set[str | None]]:
        """Return the verdicts of all measurements of each plan, by its widths."""
        found: dict[tuple[int, ...], set[str | None]] = {}
        for each in self._run.manifest.rounds:
            found.setdefault(tuple(each.widths), set()).add(each.verdict)
        return found

    def _margin(self) -> float:
        """Return the safety margin below the target: the recipe's, plus half of it for each plan that missed.

        Only the misses known when the search last continued count; nothing is searched between a miss and that moment.
        The noise of a percentile, as known then, is added.
        """
        if not self._job.measurable:
            return 0.0
        manifest = self._run.manifest
        margin = self._job.recipe.contract.margin * (1 + WIDER * manifest.missed)
        return min(WIDEST, margin + float(manifest.noise or 0.0))

    @property
    def _by_percentile(self) -> bool:
        """Whether another percentile than the median is judged."""
        return not self._job.recipe.conditions.at_median

    def _too_slow(self) -> bool:
        """Return whether the last measured plan misses its target.

        An undecided plan counts as a miss if it is certainly slower than the aim, or if a narrower one can be decided
        in spite of the noise of a percentile.
        """
        last = self._run.manifest.rounds[-1]
        if last.verdict != "undecided":
            return last.verdict == "missed"
        if self._by_percentile:
            return last.interval[1] is not None
        return last.low > (1 - self._margin()) * last.target_ratio

    def _slack_left(self) -> bool:
        """Return whether the last measured plan certainly leaves enough of its target unused to search again."""
        *before, last = self._run.manifest.rounds
        if last.verdict != "kept" or len(before) + 3 > self._job.recipe.contract.max_rounds:
            return False
        if self._dense(last.widths) or any(each.widths == last.widths for each in before):  # nothing else was found
            return False
        share = self.searched_share()
        if share is None:
            return False
        aim, allowed = ((1 - self._margin()) * each for each in (last.target_ratio, share))
        predicted, measured = correction_at(aim, [*self._points(before), (last.predicted_ratio, last.high)])
        return bool(
            last.high < aim - UNUSED * last.target_ratio
            and last.predicted_ratio > (1 - BINDING) * allowed
            # the refitted table certainly allows the next search more time than the last one
            and aim * predicted / measured > (1 + UNUSED) * allowed
        )

    def _tighten(self) -> bool:
        """Refit the table with the last measurement, and return whether another search can help."""
        run, job, rounds = self._run, self._job, self._run.manifest.rounds
        if job.table is None or len(rounds) >= job.recipe.contract.max_rounds:
            return False
        manifest, last = run.manifest, rounds[-1]
        if self._by_percentile and last.interval[1] is not None:
            manifest.noise = last.high / last.ratio - 1
        # As shares of the dense network's time: milliseconds would bring the load of other processes into the table.
        aim = (1 - self._margin()) * last.target_ratio
        correction = correction_at(aim, self._points(rounds))
        table = job.table.refit([correction], lower=True)
        try:
            job.budgets(table)
        except CompressorError as error:
            say(f"The latency target cannot be met: {error.message}")
            return False
        job.table = table
        manifest.corrections = [*manifest.corrections, list(correction)]
        manifest.evaluations_before = manifest.search.evaluations or 0 if manifest.search is not None else 0
        manifest.missed = sum(each.kept is False for each in rounds)
        manifest.quiet_dense_ms = last.dense_ms if self._by_percentile else min(each.dense_ms for each in rounds)
        # One write for all: after a kill between the correction and the reopened stages, it would be corrected twice.
        run.reopen("search", "probe", "finetune", "export", "measure")
        say("The table was refitted with the measurement; the search continues.")
        return True

    def _points(self, rounds: Sequence[Measurement]) -> list[tuple[float, float]]:
        """Return the (predicted, measured) share of each measured plan; predicted by the present table."""
        assert self._job.table is not None
        return points_of(self._job.table, self._job.space, rounds)

    def _widths(self, plan: ChannelPlan) -> list[int]:
        return [int(width) for width in self._job.space.row(plan)]

    def _dense(self, widths: Sequence[int]) -> bool:
        return bool(np.array_equal(widths, self._job.space.dense_row))

    def _unchanged(self, widths: Sequence[int]) -> bool:
        """Whether a plan is delivered as the network that it is compared with."""
        return self._dense(widths) and self._job.recipe.precision != "mixed"

    def _file(self, number: int) -> Path:
        return self._run.file(KEPT_PLAN.format(round=number))
