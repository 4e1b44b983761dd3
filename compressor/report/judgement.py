"""The report's verdict: whether the budget is met as measured, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.report.collect import Manifest, rows, section, text
from compressor.report.formats import ABSENT, cost, count, number, percent, ratio, significant

State = Literal["kept", "slower", "missed", "predicted", "undecided", "unfinished", "none"]
BudgetVerdict = Literal["kept", "missed", "predicted", "undecided"]

NAMES = {"latency": "latency", "flops": "MACs", "macs": "MACs", "params": "parameters", "memory": "memory"}
COUNTED = ("MACs", "params")  # exact numbers of the built network: they are counted, not measured
AFTERWARDS = ("report",)  # the report is written while its own stage is running
SLOWER = 1.02  # of the dense network's time: two measurements of one network differ by as much


@dataclass(frozen=True)
class BudgetLine:
    """One budget as the page and the terminal print it."""

    name: str
    target: str
    dense: str
    predicted: str
    measured: str
    margin: str
    verdict: BudgetVerdict
    phrase: str


@dataclass(frozen=True)
class Verdict:
    """Result of a run: a `state` for its color, the sentence, and further remarks."""

    state: State
    sentence: str
    remarks: tuple[str, ...] = ()


def verdict(manifest: Manifest) -> str:
    """Return the verdict in one line, for the terminal.

    >>> verdict({"status": "finished", "budgets": [{"name": "latency", "unit": "ms",
    ...          "target": 1.5, "dense": 3.0, "predicted": 1.4, "measured": 1.45, "kept": True}]})
    'Budget kept: latency 1.45 ms measured, 3.3% under the target of 1.50 ms.'
    """
    judged = judge(manifest)
    return " ".join((judged.sentence, *judged.remarks))


def judge(manifest: Manifest) -> Verdict:
    """Judge every budget; a run that was not measured completely gets no verdict."""
    if not measured_to_the_end(manifest):
        return Verdict("unfinished", _unfinished(manifest))
    lines = budget_lines(manifest)
    remarks = _remarks(manifest)
    if not lines:
        return Verdict("none", "No budget was set.", remarks)
    phrases = {verdict: [line.phrase for line in lines if line.verdict == verdict] for verdict in _HEADINGS}
    found = [verdict for verdict in _HEADINGS if phrases[verdict]]
    sentence = " ".join(f"{_HEADINGS[verdict]}: {'; '.join(phrases[verdict])}." for verdict in found)
    state: State = found[0]
    if state == "kept" and slower_than_dense(manifest):
        state = "slower"
    return Verdict(state, sentence, remarks)


_HEADINGS: dict[BudgetVerdict, str] = {
    "missed": "Budget missed",
    "undecided": "Not decided",
    "predicted": "Only predicted",
    "kept": "Budget kept",
}
"""The verdict's introductions of its budgets, the worst first."""


def verdict_of(budget: Mapping[str, Any]) -> BudgetVerdict:
    """Return the verdict on one of the manifest's budgets.

    Runs of earlier versions recorded only whether it was met; a budget that was not measured is predicted.
    """
    recorded = budget.get("verdict")
    for verdict in _HEADINGS:
        if recorded == verdict:
            return verdict
    kept = budget.get("kept")
    if not isinstance(kept, bool):
        measured, target = number(budget.get("measured")), number(budget.get("target"))
        if measured is None or target is None:
            return "predicted"
        kept = measured <= target
    return "kept" if kept else "missed"


def pruned(manifest: Manifest) -> bool:
    """Return whether the slim network has fewer channels than the dense one."""
    return any(group.get("kept") != group.get("width") for group in rows(manifest, "groups"))


def time_ratio(manifest: Manifest) -> tuple[float, str] | None:
    """Return the slim network's latency over the dense one's, and whether it is "measured" or only "predicted".

    None if it is not known, or if nothing was pruned: any difference is noise then.
    """
    if not pruned(manifest):
        return None
    latency = section(manifest, "latency")
    if (in_turns := number(latency.get("ratio"))) is not None:  # more stable than the quotient of two medians
        return in_turns, "measured"
    for slim, dense, how in (
        ("measured_ms", "dense_ms", "measured"),
        ("predicted_ms", "predicted_dense_ms", "predicted"),
    ):
        if (found := ratio(latency.get(slim), latency.get(dense))) is not None:
            return found, how
    return None


def slower_than_dense(manifest: Manifest) -> bool:
    """Return whether pruning has made the network slower: certainly if its ratio has an interval, otherwise by more
    than measurements of one network differ."""
    found = time_ratio(manifest)
    if found is None:
        return False
    interval = section(manifest, "latency").get("interval")
    low = number(interval[0]) if found[1] == "measured" and isinstance(interval, list) and interval else None
    return found[0] > SLOWER if low is None else low > 1


def measured_to_the_end(manifest: Manifest) -> bool:
    """Return whether all stages that determine the numbers are finished, not counting the report's own."""
    if text(manifest, "status") == "finished":
        return True
    return bool(section(section(manifest, "stages"), "measure").get("finished"))


def budget_lines(manifest: Manifest) -> list[BudgetLine]:
    """Return the manifest's budgets, in its order."""
    return [_line(budget) for budget in rows(manifest, "budgets")]


def _line(budget: Mapping[str, Any]) -> BudgetLine:
    unit = text(budget, "unit")
    name = NAMES.get(text(budget, "name"), text(budget, "name", "unnamed"))
    target, measured, predicted = (number(budget.get(key)) for key in ("target", "measured", "predicted"))
    return BudgetLine(
        name=name,
        target=cost(target, unit),
        dense=cost(budget.get("dense"), unit),
        predicted=cost(predicted, unit),
        measured=cost(measured, unit),
        margin=margin(measured, target),
        verdict=verdict_of(budget),
        phrase=_phrase(name, unit, target, measured, predicted),
    )


def margin(value: float | None, target: float | None) -> str:
    """Describe how far `value` is from its upper limit: '3.3% under', '8.0% over', 'exactly at'."""
    if value is None or target is None or target <= 0:
        return ABSENT
    if value == target:
        return "exactly at"
    return f"{percent(abs(value / target - 1))} {'under' if value < target else 'over'}"


def _phrase(
    name: str, unit: str, target: float | None, measured: float | None, predicted: float | None
) -> str:
    value, how = (measured, " measured") if measured is not None else (predicted, "")
    if value is None:
        return f"{name} has neither a measurement nor a prediction, target {cost(target, unit)}"
    if unit in COUNTED and measured is not None:
        how = " counted"
    # the name of a count is its unit: "MACs 1.2 G counted"
    shown, aim = (count(value), count(target)) if unit in COUNTED else (cost(value, unit), cost(target, unit))
    if target is None:
        return f"{name} {shown}{how}, target not recorded"
    return f"{name} {shown}{how}, {margin(value, target)} the target of {aim}"


def _remarks(manifest: Manifest) -> tuple[str, ...]:
    remarks = []
    if section(manifest, "latency").get("estimated") is True:
        remarks.append("The latency table of this device is estimated, not measured on it.")
    if (found := time_ratio(manifest)) is not None and slower_than_dense(manifest):
        factor, how = found
        remarks.append(
            f"The slim network is slower: {significant(factor)} times as slow as the dense network as {how}."
        )
    return tuple(remarks)


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
