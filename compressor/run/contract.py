"""Compare the measured latency of each plan with the target, and choose the plan to keep.

All comparisons use shares of the dense network's time. A share stays the same on a shared machine, while milliseconds
do not (`latency.paired`). A target in milliseconds is converted to a share of the dense network's quiet level: the
lowest time that this run and its table have seen.

A plan measured well below its target has lost accuracy without need, because the table predicted it too slow. The
search then continues with the table lowered to the measurement. Every plan that misses the target widens the margin for
the plans after it. Of the plans that meet the target, the one closest to it is chosen. A difference inside the
confidence interval of a measurement does not count: it never causes another search. An undecided plan causes another
search only if its whole interval lies above the aim of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.files import write_atomic
from compressor.pruning.plan import ChannelPlan
from compressor.run.folder import RunDir

if TYPE_CHECKING:
    from compressor.latency.paired import Timing
    from compressor.run.job import Job

KEPT_PLAN = "search/kept_plan-{round}.json"

WIDER = 0.5
"""Added to the margin for each plan that misses its target, as a share of the recipe's margin."""

WIDEST = 0.5
"""Upper bound of the margin, however many plans have missed."""

UNUSED = 0.01
"""Another search is worthwhile for a plan that is this share of the target or more below the margin."""

BINDING = 0.03
"""A plan predicted further below the aim than this share of it was limited by something other than latency."""


def margin(run: RunDir, job: Job) -> float:
    """Return the safety margin below the target: the recipe's, plus half of it for each plan that missed.

    Only the misses known when the search last continued count; nothing is searched between a miss and that moment.
    """
    if not job.measurable:
        return 0.0
    missed = int(run.manifest.get("missed", 0))
    return min(WIDEST, job.recipe.contract.margin * (1 + WIDER * missed))


def quiet_dense_ms(run: RunDir, job: Job, now_ms: float) -> float:
    """Return the dense network's time on the quiet device, the reference for targets in milliseconds.

    Args:
        now_ms: Quiet level of the dense network during the current measurement, in milliseconds.

    Returns:
        For a target in milliseconds, the lowest time that this run has seen; otherwise `now_ms`.
    """
    if not job.latency_in_ms:
        return now_ms
    return min([now_ms, *(float(each["dense_ms"]) for each in run.manifest["rounds"])])


def searched_share(run: RunDir, job: Job) -> float | None:
    """Return the latency limit of the search as a share of the dense network's time, before the margin is subtracted.

    It changes only when the search continues, so that a resumed run keeps the same budget.
    """
    if job.table is None:
        return None
    return job.latency_share(float(run.manifest.get("quiet_dense_ms", job.table.dense_ms(job.space))))


def predicted_share(job: Job, plan: ChannelPlan) -> float:
    """Return the slim network's time as a share of the dense one's, predicted by the table."""
    assert job.table is not None
    return job.table.predict(job.space, plan) / job.table.dense_ms(job.space)


def prunes_nothing(job: Job, plan: ChannelPlan) -> bool:
    """Return whether a plan leaves the network dense."""
    return _dense(job, list(job.space.widths(plan.widths)))


def _dense(job: Job, widths: Sequence[int]) -> bool:
    return bool(np.array_equal(widths, job.space.dense_widths))


def judged(run: RunDir, job: Job, plan: ChannelPlan, timing: Timing) -> dict[str, Any]:
    """Return the record of one measurement of a plan, with its verdict on the latency target."""
    dense_ms = quiet_dense_ms(run, job, timing.ratio.dense_ms)
    target, ratio, predicted = job.latency_share(dense_ms), timing.ratio, predicted_share(job, plan)
    assert target is not None
    widths = [int(width) for width in job.space.widths(plan.widths)]
    if prunes_nothing(job, plan):  # the same network twice: there is nothing to measure
        ratio = replace(ratio, value=1.0, low=1.0, high=1.0)
    elif ratio.verdict(target) == "undecided":
        for each in run.manifest["rounds"]:  # an earlier measurement of the same plan; weights do not matter for time
            if each["widths"] == widths and each["interval"][1] is not None:
                ratio = ratio.together(each["ratio"], *each["interval"])
    verdict, value, low, high = ratio.verdict(target), ratio.value, ratio.low, ratio.high
    return {
        "predicted_ms": predicted * dense_ms,
        "measured_ms": value * dense_ms,
        "target_ms": target * dense_ms,
        "dense_ms": dense_ms,
        "predicted_ratio": predicted,
        "ratio": value,
        "interval": [low, high if high < float("inf") else None],
        "target_ratio": target,
        "bursts": ratio.bursts,
        "seconds": round(ratio.seconds, 1),
        "verdict": verdict,
        "kept": None if verdict == "undecided" else verdict == "kept",
        "widths": widths,
    }


def search_on(run: RunDir, job: Job) -> bool:
    """Return whether the search must continue after the last measured plan.

    It does if the plan misses its target, leaves too much of it unused, or is undecided though it is certainly slower
    than the aim.
    """
    last = run.manifest["rounds"][-1]
    if last["verdict"] == "undecided":
        return bool(last["interval"][0] > (1 - margin(run, job)) * last["target_ratio"])
    return last["verdict"] == "missed" or slack_left(run, job)


def slack_left(run: RunDir, job: Job) -> bool:
    """Return whether the last measured plan certainly leaves enough of its target unused to search again."""
    *before, last = run.manifest["rounds"]
    if last["verdict"] != "kept" or len(before) + 3 > job.recipe.contract.max_rounds:
        return False
    if _dense(job, last["widths"]):
        return False
    if any(each["widths"] == last["widths"] for each in before):  # the search has found nothing else
        return False
    high, predicted, share = last["interval"][1], last["predicted_ratio"], searched_share(run, job)
    if high is None or share is None:
        return False
    aim, allowed = ((1 - margin(run, job)) * each for each in (last["target_ratio"], share))
    return bool(
        high < aim - UNUSED * last["target_ratio"]
        and predicted > (1 - BINDING) * allowed
        # the refitted table certainly allows the next search more time than the last one
        and aim * predicted / high > (1 + UNUSED) * allowed
    )


def remember(run: RunDir, plan: ChannelPlan) -> None:
    """Save the last measured plan, which does not miss the target."""
    write_atomic(_file(run, len(run.manifest["rounds"])), plan.to_json())


def kept_plan(run: RunDir, plan: ChannelPlan) -> ChannelPlan:
    """Return the plan to continue with: the one closest to the target among those that met it in every measurement.

    If none met it, the plan furthest below the target among those that never missed it.

    Args:
        run: Run with the measurements so far.
        plan: Last plan of the search, used if all plans missed.
    """
    used: dict[tuple[int, ...], float] = {}
    verdicts: dict[tuple[int, ...], set[str]] = {}
    files: dict[tuple[int, ...], Path] = {}
    for number, each in enumerate(run.manifest["rounds"], start=1):
        widths = tuple(each["widths"])
        used[widths] = max(used.get(widths, 0.0), each["ratio"] / each["target_ratio"])
        verdicts.setdefault(widths, set()).add(each["verdict"])
        if _file(run, number).exists():
            files[widths] = _file(run, number)
    kept = [widths for widths in files if verdicts[widths] == {"kept"}]
    not_missed = [widths for widths in files if "missed" not in verdicts[widths]]
    if kept:
        best = max(kept, key=lambda widths: used[widths])
    elif not_missed:
        best = min(not_missed, key=lambda widths: used[widths])
    else:
        return plan
    return ChannelPlan.from_json(files[best].read_text(encoding="utf-8"))


def _file(run: RunDir, number: int) -> Path:
    return run.file(KEPT_PLAN.format(round=number))
