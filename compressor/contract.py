"""How much of a promised latency a plan leaves unused, and which plan is kept when a run goes on to use it.

A plan that was measured well below its target has lost accuracy for nothing: the table predicted it too slow. The
search then goes on, twice at most, with the table lowered to what was measured. Every plan that misses the target
widens the margin for those after it. Of the plans that keep the target the one that leaves least of it unused is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.pruning.plan import ChannelPlan
from compressor.run_dir import RunDir, write_atomic

if TYPE_CHECKING:
    from compressor.job import Job

KEPT_PLAN = "search/kept_plan-{round}.json"
SEARCHES_MORE = 2
"""How often a kept latency is searched on for."""

WIDER = 0.5
"""What a plan that misses its target adds to the margin, as a share of it."""

WIDEST = 0.5
"""The widest margin, however many have missed."""

UNUSED = 0.01
"""Below the margin by this share, a plan is worth another search."""

BINDING = 0.03
"""A plan predicted further below the aim than this was held there by something else than the latency."""


def margin(run: RunDir, job: Job) -> float:
    """The share below the target that is aimed at: the recipe's, and half of it more for each plan that missed.

    Those count that had missed when the search was last sent on: between a miss and that, nothing is searched.
    """
    if not job.measurable:
        return 0.0
    missed = int(run.manifest.get("missed", 0))
    return min(WIDEST, job.recipe.contract.margin * (1 + WIDER * missed))


def slack_left(run: RunDir, job: Job) -> bool:
    """Whether the plan measured last keeps its target by so much that the search should go on."""
    rounds: list[dict[str, Any]] = run.manifest["rounds"]
    last = rounds[-1]
    lowered = sum(measured < predicted for predicted, measured in run.manifest.get("corrections", []))
    if not last["kept"] or lowered >= SEARCHES_MORE or len(rounds) + 2 > job.recipe.contract.max_rounds:
        return False
    if last["widths"] == [int(width) for width in job.space.dense_widths]:
        return False
    allowed = margin(run, job)
    return bool(
        last["measured_ms"] < (1 - allowed - UNUSED) * last["target_ms"]
        and last["predicted_ms"] > (1 - allowed - BINDING) * last["target_ms"]
    )


def remember(run: RunDir, plan: ChannelPlan) -> None:
    """Write down the plan that was measured last, and keeps the target."""
    write_atomic(_file(run, len(run.manifest["rounds"])), plan.to_json())


def kept_plan(run: RunDir, plan: ChannelPlan) -> ChannelPlan:
    """The plan to go on with: of those that kept the target whenever they were measured, the one closest to it.

    Args:
        run: With the measurements so far.
        plan: The search's last, which is taken where none did.
    """
    used: dict[tuple[int, ...], float] = {}
    files: dict[tuple[int, ...], Path] = {}
    for number, each in enumerate(run.manifest["rounds"], start=1):
        widths = tuple(each["widths"])
        used[widths] = max(used.get(widths, 0.0), each["measured_ms"] / each["target_ms"])
        if _file(run, number).exists():
            files[widths] = _file(run, number)
    kept = [widths for widths in files if used[widths] <= 1]
    if not kept:
        return plan
    best = max(kept, key=lambda widths: used[widths])
    return ChannelPlan.from_json(files[best].read_text(encoding="utf-8"))


def _file(run: RunDir, number: int) -> Path:
    return run.file(KEPT_PLAN.format(round=number))
