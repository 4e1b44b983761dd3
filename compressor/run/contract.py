"""What was measured of a plan, judged against the latency that was promised, and which plan is kept.

Everything is judged as a share of the dense network's time, because that share stays the same on a machine with
neighbours while milliseconds do not (`latency.ratio`). Milliseconds that are asked for are a share of the dense
network's quiet level: the lowest that this run and its table have seen.

A plan that was measured well below its target has lost accuracy for nothing: the table predicted it too slow. The
search then goes on with the table lowered to what was measured. Every plan that misses the target widens the margin for
those after it. Of the plans that keep the target the one that leaves least of it unused is taken. A difference inside
the interval of a measurement is none: nothing is searched for again because of it. A plan that cannot be decided sends
the search on only where its whole interval lies above what the search aimed at.
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
"""What a plan that misses its target adds to the margin, as a share of it."""

WIDEST = 0.5
"""The widest margin, however many have missed."""

UNUSED = 0.01
"""Below the margin by this share, a plan is worth another search."""

BINDING = 0.03
"""A plan predicted further below the aim than this share of it was held there by something else than the latency."""


def margin(run: RunDir, job: Job) -> float:
    """The share below the target that is aimed at: the recipe's, and half of it more for each plan that missed.

    Those count that had missed when the search was last sent on: between a miss and that, nothing is searched.
    """
    if not job.measurable:
        return 0.0
    missed = int(run.manifest.get("missed", 0))
    return min(WIDEST, job.recipe.contract.margin * (1 + WIDER * missed))


def quiet_dense_ms(run: RunDir, job: Job, now_ms: float) -> float:
    """What the dense network takes on the quiet device, as what milliseconds stand for.

    Args:
        now_ms: Its quiet level during a measurement.

    Returns:
        Where milliseconds are asked for, the lowest that this run has seen; else what it is now.
    """
    if not job.latency_in_ms:
        return now_ms
    return min([now_ms, *(float(each["dense_ms"]) for each in run.manifest["rounds"])])


def searched_share(run: RunDir, job: Job) -> float | None:
    """The latency that the search keeps to, as a share of the dense network's, before any margin is taken off.

    It changes only when the search is sent on, so that a run that was stopped goes on within the same budget.
    """
    if job.table is None:
        return None
    return job.latency_share(float(run.manifest.get("quiet_dense_ms", job.table.dense_ms(job.space))))


def predicted_share(job: Job, plan: ChannelPlan) -> float:
    """The slim network's time as a share of the dense one's, by the table."""
    assert job.table is not None
    return job.table.predict(job.space, plan) / job.table.dense_ms(job.space)


def prunes_nothing(job: Job, plan: ChannelPlan) -> bool:
    """Whether a plan is the dense network."""
    return _dense(job, list(job.space.widths(plan.widths)))


def _dense(job: Job, widths: Sequence[int]) -> bool:
    return bool(np.array_equal(widths, job.space.dense_widths))


def judged(run: RunDir, job: Job, plan: ChannelPlan, timing: Timing) -> dict[str, Any]:
    """The record of one measurement of a plan, with its verdict on the latency that is asked for."""
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
    """Whether the plan measured last sends the search on: it misses its target, leaves too much of it unused, or cannot
    be decided though it is certainly slower than was aimed at."""
    last = run.manifest["rounds"][-1]
    if last["verdict"] == "undecided":
        return bool(last["interval"][0] > (1 - margin(run, job)) * last["target_ratio"])
    return last["verdict"] == "missed" or slack_left(run, job)


def slack_left(run: RunDir, job: Job) -> bool:
    """Whether the plan measured last certainly leaves so much of its target unused that the search should go on."""
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
        # by the refitted table the next search may certainly take more than the last one
        and aim * predicted / high > (1 + UNUSED) * allowed
    )


def remember(run: RunDir, plan: ChannelPlan) -> None:
    """Write down the plan that was measured last, and does not miss the target."""
    write_atomic(_file(run, len(run.manifest["rounds"])), plan.to_json())


def kept_plan(run: RunDir, plan: ChannelPlan) -> ChannelPlan:
    """The plan to go on with: of those that kept the target whenever they were measured, the one closest to it.

    Where none did, the one furthest below of those that never missed it.

    Args:
        run: With the measurements so far.
        plan: The search's last, which is taken where all missed.
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
