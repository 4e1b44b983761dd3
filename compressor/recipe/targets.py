"""The networks that a recipe with several limits of one budget asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressor.core.errors import CompressorError
from compressor.recipe.parts import SEPARATOR, Budgets

LIMIT = "<="


@dataclass(frozen=True)
class Target:
    """One of several networks.

    Attributes:
        name: Folder of its run below the first, such as `latency-70`.
        budgets: Its limits, one of each budget.
    """

    name: str
    budgets: Budgets


def targets(budgets: Budgets) -> tuple[Target, ...]:
    """Return a target for each limit of the budgets that have several, in their order.

    Budgets with one limit apply to all.

    Raises:
        CompressorError: Two budgets have several limits and not equally many, one is empty, or one is given twice.

    >>> [(target.name, target.budgets.latency) for target in targets(Budgets(latency="70%,5ms", params="60%"))]
    [('latency-70', '70%'), ('latency-5ms', '5ms')]
    """
    given = {name: text for name, text in budgets.given().items() if SEPARATOR in text}
    functions = [_parts(text) for text in budgets.functions]
    limits = {name: _limits(name, text) for name, text in given.items()}
    limits |= {name: _limits(name, text) for name, text in functions if SEPARATOR in text}
    counts = {len(each) for each in limits.values()}
    if len(counts) > 1:
        counted = ", ".join(f"{name} {len(each)}" for name, each in limits.items())
        raise CompressorError(
            f"The budgets have different numbers of limits: {counted}.",
            "Give as many limits of each budget, in the order of the networks, or one for all networks.",
        )
    found: list[Target] = []
    for place in range(counts.pop()):
        fields: dict[str, Any] = {name: limits[name][place] for name in given}
        fields["functions"] = tuple(
            f"{name}{LIMIT}{limits[name][place] if name in limits else text}" for name, text in functions
        )
        label = "-".join(f"{name.rpartition(':')[2]}-{_short(each[place])}" for name, each in limits.items())
        found.append(Target(_safe(label), budgets.model_copy(update=fields)))
    names = [target.name.lower() for target in found]
    if twice := next((target.name for target in found if names.count(target.name.lower()) > 1), None):
        raise CompressorError(f"The limit {twice} is given twice.", "Give each network a limit of its own.")
    return tuple(found)


def _parts(text: str) -> tuple[str, str]:
    """Split a function's budget into its name and its limits."""
    name, _, limit = text.partition(LIMIT)
    return name.strip(), limit.strip()


def _limits(name: str, text: str) -> list[str]:
    found = [part.strip() for part in text.split(SEPARATOR)]
    if not all(found):
        raise CompressorError(f"The budget {name} has an empty limit: {text!r}.", "Write 70%,50%,35%.")
    return found


def _short(limit: str) -> str:
    """Return a limit for a name: 70 for 70%."""
    return limit.removesuffix("%").strip()


def _safe(name: str) -> str:
    """Return a name for a folder: letters, digits, dots and dashes of ASCII."""
    return "".join(each if each.isascii() and (each.isalnum() or each in "._-") else "-" for each in name)
