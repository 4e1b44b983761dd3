"""The answer to the first question: is the budget kept as measured, and by how much?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.report.collect import Manifest, rows, section, text
from compressor.report.formats import ABSENT, cost, count, number, percent

State = Literal["kept", "missed", "unmeasured", "unfinished", "none"]

NAMES = {"latency": "latency", "flops": "MACs", "macs": "MACs", "params": "parameters", "memory": "memory"}
COUNTED = ("MACs", "params")  # exact numbers of the built network: they are counted, not measured
AFTERWARDS = ("report",)  # a report is written while its own stage still runs


@dataclass(frozen=True)
class BudgetLine:
    """One budget as the page and the terminal print it. `kept` is None while nothing was measured."""

    name: str
    target: str
    dense: str
    predicted: str
    measured: str
    margin: str
    kept: bool | None
    phrase: str


@dataclass(frozen=True)
class Verdict:
    """How the run ended: a `state` for its colour, the sentence, and what else must be said with it."""

    state: State
    sentence: str
    remarks: tuple[str, ...] = ()


def verdict(manifest: Manifest) -> str:
    """The verdict in one line, for the terminal.

    >>> verdict({"status": "finished", "budgets": [{"name": "latency", "unit": "ms",
    ...          "target": 1.5, "dense": 3.0, "predicted": 1.4, "measured": 1.45, "kept": True}]})
    'Budget kept: latency 1.45 ms measured, 3.3% under the target of 1.50 ms.'
    """
    judged = judge(manifest)
    return " ".join((judged.sentence, *judged.remarks))


def judge(manifest: Manifest) -> Verdict:
    """Weigh every budget; a run that was not measured to its end gets no verdict on them."""
    if not measured_to_the_end(manifest):
        return Verdict("unfinished", _unfinished(manifest))
    lines = budget_lines(manifest)
    remarks = _remarks(manifest)
    if not lines:
        return Verdict("none", "No budget was set, so there is none to keep.", remarks)
    missed = [line.phrase for line in lines if line.kept is False]
    open_ = [line.phrase for line in lines if line.kept is None]
    kept = [line.phrase for line in lines if line.kept]
    parts = [("Budget missed", missed), ("Not measured", open_), ("Budget kept", kept)]
    sentence = " ".join(f"{label}: {'; '.join(phrases)}." for label, phrases in parts if phrases)
    state: State = "missed" if missed else "unmeasured" if open_ else "kept"
    return Verdict(state, sentence, remarks)


def measured_to_the_end(manifest: Manifest) -> bool:
    """Whether all stages that decide the numbers are over, the report's own not being one of them."""
    if text(manifest, "status") == "finished":
        return True
    return bool(section(section(manifest, "stages"), "measure").get("finished"))


def budget_lines(manifest: Manifest) -> list[BudgetLine]:
    """The manifest's budgets, in its order."""
    return [_line(budget) for budget in rows(manifest, "budgets")]


def _line(budget: Mapping[str, Any]) -> BudgetLine:
    unit = text(budget, "unit")
    name = NAMES.get(text(budget, "name"), text(budget, "name", "unnamed"))
    target, measured, predicted = (number(budget.get(key)) for key in ("target", "measured", "predicted"))
    kept = budget.get("kept")
    if not isinstance(kept, bool):
        kept = measured <= target if measured is not None and target is not None else None
    return BudgetLine(
        name=name,
        target=cost(target, unit),
        dense=cost(budget.get("dense"), unit),
        predicted=cost(predicted, unit),
        measured=cost(measured, unit),
        margin=margin(measured, target),
        kept=kept,
        phrase=_phrase(name, unit, target, measured, predicted),
    )


def margin(value: float | None, target: float | None) -> str:
    """How far `value` is from the target it must not exceed: '3.3% under', '8.0% over', 'exactly at'."""
    if value is None or target is None or target <= 0:
        return ABSENT
    if value == target:
        return "exactly at"
    return f"{percent(abs(value / target - 1))} {'under' if value < target else 'over'}"


def _phrase(
    name: str, unit: str, target: float | None, measured: float | None, predicted: float | None
) -> str:
    value, how = (measured, "measured") if measured is not None else (predicted, "predicted")
    if value is None:
        return f"{name} has neither a measurement nor a prediction, target {cost(target, unit)}"
    if unit in COUNTED and measured is not None:
        how = "counted"
    # the name of a count is its unit: "MACs 1.2 G counted"
    shown, aim = (count(value), count(target)) if unit in COUNTED else (cost(value, unit), cost(target, unit))
    if target is None:
        return f"{name} {shown} {how}, target not recorded"
    return f"{name} {shown} {how}, {margin(value, target)} the target of {aim}"


def _remarks(manifest: Manifest) -> tuple[str, ...]:
    if section(manifest, "latency").get("estimated") is True:
        return ("The latency table of this device is estimated, not measured on it.",)
    return ()


def _unfinished(manifest: Manifest) -> str:
    stages = {name: stage for name, stage in section(manifest, "stages").items() if name not in AFTERWARDS}
    done = [name for name, stage in stages.items() if isinstance(stage, dict) and stage.get("finished")]
    begun = [name for name in stages if name not in done]
    state = f"finished: {', '.join(done)}" if done else "no stage has finished yet"
    return (
        f"This run is not finished, so there is no verdict ({state}"
        + (f"; begun: {', '.join(begun)}" if begun else "")
        + ")."
    )
