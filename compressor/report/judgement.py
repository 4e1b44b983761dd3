"""The report's verdict: whether the budget is met as measured, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressor.core.manifest import Budget, How, Manifest, Measurement
from compressor.core.manifest import Verdict as BudgetVerdict
from compressor.report.formats import ABSENT, cost, count, number, percent, ratio, significant

State = Literal["kept", "slower", "doubtful", "missed", "predicted", "undecided", "unfinished", "none"]

NAMES = {"latency": "latency", "flops": "MACs", "macs": "MACs", "params": "parameters", "memory": "memory"}
COUNTED = ("MACs", "params")  # exact numbers of the built network, whose unit is their name
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


def verdict(manifest: Manifest | Mapping[str, Any]) -> str:
    """Return the verdict in one line, for the terminal.

    >>> verdict({"status": "finished", "budgets": [{"name": "latency", "unit": "ms",
    ...          "target": 1.5, "dense": 3.0, "predicted": 1.4, "measured": 1.45, "kept": True}]})
    'Budget kept: latency 1.45 ms measured, 3.3% under the target of 1.50 ms.'
    """
    judged = judge(manifest)
    return " ".join((judged.sentence, *judged.remarks))


def judge(manifest: Manifest | Mapping[str, Any]) -> Verdict:
    """Judge every budget; a run that was not measured completely gets no verdict."""
    manifest = Manifest.tolerant(manifest)
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
    if state in ("kept", "slower") and manifest.warnings:
        state = "doubtful"
    return Verdict(state, sentence, remarks)


_HEADINGS: dict[BudgetVerdict, str] = {
    "missed": "Budget missed",
    "undecided": "Not decided",
    "predicted": "Only predicted",
    "kept": "Budget kept",
}
"""The verdict's introductions of its budgets, the worst first."""


def verdict_of(entry: Budget | Measurement) -> BudgetVerdict:
    """Return the verdict on a budget or on a round; earlier versions recorded only whether it was kept."""
    if entry.verdict is not None:
        return entry.verdict
    measured, target = (
        (entry.measured, entry.target) if isinstance(entry, Budget) else (entry.measured_ms, entry.target_ms)
    )
    kept = entry.kept
    if kept is None:
        if number(measured) is None or number(target) is None:
            return "predicted"
        kept = float(measured or 0) <= target
    return "kept" if kept else "missed"


def pruned(manifest: Manifest) -> bool:
    """Return whether the slim network has fewer channels or blocks than the dense one."""
    return bool(manifest.removed) or any(group.kept != group.width for group in manifest.groups)


def time_ratio(manifest: Manifest) -> tuple[float, str] | None:
    """Return the slim network's latency over the dense one's, and whether it is "measured" or only "predicted".

    None if it is not known, or if nothing was changed: any difference is noise then.
    """
    if not pruned(manifest) and manifest.latency.precision != "mixed":
        return None
    latency = manifest.latency
    if latency.ratio is not None:  # measured in turns: more stable than the quotient of two medians
        return latency.ratio, "measured"
    for slim, dense, how in (
        (latency.measured_ms, latency.dense_ms, "measured"),
        (latency.predicted_ms, latency.predicted_dense_ms, "predicted"),
    ):
        if (found := ratio(slim, dense)) is not None:
            return found, how
    return None


def slower_than_dense(manifest: Manifest) -> bool:
    """Return whether pruning has made the network slower: certainly if its ratio has an interval, otherwise by more
    than measurements of one network differ."""
    found, interval = time_ratio(manifest), manifest.latency.interval
    if found is None:
        return False
    low = interval[0] if found[1] == "measured" and interval else None
    return found[0] > SLOWER if low is None else low > 1


def measured_to_the_end(manifest: Manifest) -> bool:
    """Return whether all stages that determine the numbers are finished, not counting the report's own."""
    return manifest.status == "finished" or manifest.finished("measure")


def budget_lines(manifest: Manifest) -> list[BudgetLine]:
    """Return the manifest's budgets, in its order."""
    title = manifest.conditions.title
    return [_line(budget, title if budget.name == "latency" else "") for budget in manifest.budgets]


def _line(budget: Budget, title: str) -> BudgetLine:
    unit = budget.unit
    name = title or NAMES.get(budget.name, budget.name or "unnamed")
    return BudgetLine(
        name=name,
        target=cost(budget.target, unit),
        dense=cost(budget.dense, unit),
        predicted=cost(budget.predicted, unit),
        measured=cost(budget.measured, unit)
        + (" (computed)" if budget.measured is not None and _how(budget) == "computed" else ""),
        margin=margin(budget.measured, budget.target),
        verdict=verdict_of(budget),
        phrase=_phrase(name, budget),
    )


def _how(budget: Budget) -> How:
    """Return how `measured` was found; earlier versions did not record it."""
    return budget.how or ("counted" if budget.unit in COUNTED else "measured")


def margin(value: float | None, target: float) -> str:
    """Describe how far `value` is from its upper limit: '3.3% under', '8.0% over', 'exactly at'."""
    value, limit = number(value), number(target)
    if value is None or limit is None or limit <= 0:
        return ABSENT
    if value == limit:
        return "exactly at"
    return f"{percent(abs(value / limit - 1))} {'under' if value < limit else 'over'}"


def _phrase(name: str, budget: Budget) -> str:
    unit, measured, target = budget.unit, budget.measured, budget.target
    value, how = (measured, f" {_how(budget)}") if measured is not None else (budget.predicted, "")
    if value is None:
        return f"{name} has neither a measurement nor a prediction, target {cost(target, unit)}"
    # the name of a count is its unit: "MACs 1.2 G counted"
    shown, aim = (count(value), count(target)) if unit in COUNTED else (cost(value, unit), cost(target, unit))
    if number(target) is None:
        return f"{name} {shown}{how}, target not recorded"
    return f"{name} {shown}{how}, {margin(value, target)} the target of {aim}"


def _remarks(manifest: Manifest) -> tuple[str, ...]:
    remarks = list(manifest.warnings.values())
    if manifest.latency.estimated:
        remarks.append("The latency table of this device is estimated, not measured on it.")
    if (found := time_ratio(manifest)) is not None and slower_than_dense(manifest):
        factor, how = found
        remarks.append(
            f"The slim network is slower: {significant(factor)} times as slow as the dense network as {how}."
        )
    return tuple(remarks)


def _unfinished(manifest: Manifest) -> str:
    stages = [name for name in manifest.stages if name not in AFTERWARDS]
    done = [name for name in stages if manifest.finished(name)]
    begun = [name for name in stages if name not in done]
    state = f"finished: {', '.join(done)}" if done else "no stage has finished yet"
    return (
        f"This run is not finished, so there is no verdict ({state}"
        + (f"; begun: {', '.join(begun)}" if begun else "")
        + ")."
    )
