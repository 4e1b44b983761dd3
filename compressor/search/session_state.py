"""Content of a search's checkpoint besides the agent's own state: its progress, and what it must match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError

if TYPE_CHECKING:
    from compressor.search.environment import PruningEnv

FORMAT = 4
"""Version of the checkpoint's content; another one is rejected."""


@dataclass
class Place:
    """Progress of a search; all of it is saved in the checkpoint.

    Attributes:
        steps: Number of finished steps of each phase.
        epoch: Training epochs so far.
        round: Number of times that the search has continued with tightened budgets.
        evaluations_before: Evaluations of earlier rounds.
        training_seconds, seconds: Times before the last save.
        chosen: Widths of the result, once there is one.
        kept: Its plan as JSON, if the agent chose the channels as well.
        training: Records of the training epochs, as in the manifest.
        learned: What each part of the method has learned; see `SearchResult`.
    """

    steps: dict[str, int] = field(default_factory=dict)
    epoch: int = 0
    round: int = 0
    evaluations_before: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    chosen: list[int] | None = None
    kept: str | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    learned: dict[str, dict[str, float]] = field(default_factory=dict)


def check(state: Mapping[str, Any], path: Path, agent: str, trains: bool, env: PruningEnv) -> None:
    """Raise an error for a checkpoint of another search.

    Raises:
        CompressorError: It is of another agent, space or version, or of a search with other training.
    """
    where = f"The search's state in {path}"
    hint = f"Delete {path} to search again, or continue with the agent and settings that wrote it."
    if state.get("format") != FORMAT:
        raise CompressorError(f"{where} has format {state.get('format')!r}, expected {FORMAT}.", hint)
    if state["agent"] != agent:
        raise CompressorError(f"{where} is of the agent {state['agent']}, not of {agent}.", hint)
    if state["space"] != space_fingerprint(env):
        raise CompressorError(f"{where} is of another pruning space, with other groups or widths.", hint)
    if (state["trainer"] is None) != (not trains):
        found, given = ("without", "with") if state["trainer"] is None else ("with", "without")
        raise CompressorError(f"{where} is of a search {found} training, not {given}.", hint)


def budget_fingerprint(env: PruningEnv, chosen: Sequence[int] | None) -> dict[str, list[float]]:
    """Return values that identify budgets: the targets, and predictions that a corrected latency table changes."""
    rows = np.stack([env.bounds.dense, env.bounds.cheapest if chosen is None else np.array(chosen)])
    return {
        budget.name: [float(budget.target), *np.asarray(budget.predict(rows), dtype=np.float64).tolist()]
        for budget in env.budgets
    }


def alike(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> bool:
    """Return whether two results of `budget_fingerprint` are of the same budgets."""
    return ours.keys() == theirs.keys() and all(
        np.allclose(ours[name], theirs[name], rtol=1e-9) for name in ours
    )


def check_unfinished(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Raise an error if an unfinished search would continue with other budgets, as given by `budget_fingerprint`.

    Raises:
        CompressorError: The targets differ.
    """
    before, now = ({name: told[0] for name, told in each.items()} for each in (ours, theirs))
    if before.keys() == now.keys() and all(np.isclose(before[name], now[name], rtol=1e-9) for name in now):
        return
    said = [
        ", ".join(f"{name} <= {target:g}" for name, target in each.items()) or "no budget"
        for each in (before, now)
    ]
    raise CompressorError(
        f"The search's state in {path} is of an unfinished search within {said[0]}, not within {said[1]}.",
        "Finish it within those budgets first, or delete that file to search again.",
    )


def space_fingerprint(env: PruningEnv) -> str:
    """Return a checksum of the groups and their legal widths: if it matches, widths mean the same."""
    choices = env.bounds.choices
    described = [
        [group.name, int(group.width), len(legal), int(legal[0])]
        for group, legal in zip(env.space.groups, choices, strict=True)
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
