"""Records of a search: its limits, candidates, progress and result, and what its checkpoint must match."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.pruning.plan import ChannelPlan
from compressor.search.bounds import LegalWidths
from compressor.search.environment import Observation

if TYPE_CHECKING:
    from compressor.search.environment import PruningEnv


MEASUREMENT = "sensitivity"
"""Phase of the plans that measure a group; they prune that group alone and need not meet the budgets."""


@dataclass(frozen=True)
class Limits:
    """Limits of a search.

    Attributes:
        max_evaluations: Maximum number of candidates scored in each round (the search, and each continuation with
            changed budgets), including those of the final choice; None for no limit.
        use_all: Whether to use all of `max_evaluations`, as comparisons at equal cost need; otherwise the agent's
            settings determine the number, and the limit only reduces it.
        max_seconds: Wall time of all rounds in seconds, including the time before a resume; None for no limit. After it
            no candidate and no training epoch is started, except for the one candidate that a round without any needs
            for its result; started work is finished. A search that this limit cuts short is not reproducible.
    """

    max_evaluations: int | None = None
    max_seconds: float | None = None
    use_all: bool = False

    def __post_init__(self) -> None:
        if self.max_evaluations is not None and self.max_evaluations < 1:
            raise CompressorError(f"The limit of evaluations is {self.max_evaluations}, expected 1 or more.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise CompressorError(
                f"The time limit of the search is {self.max_seconds} s, expected more than 0."
            )

    def planned(self, usual: int) -> int:
        """Return the number of evaluations to plan for: `usual`, if available; or all available ones."""
        if self.max_evaluations is None:
            return usual
        return self.max_evaluations if self.use_all else min(self.max_evaluations, usual)


@dataclass(frozen=True)
class Candidate:
    """A scored plan.

    Attributes:
        widths: Channels that each group keeps, in the space's order.
        accuracy: Accuracy on the search split, 0..1, with the weights of `epoch`.
        reward: Reward that the agent maximizes.
        costs: Predicted cost of each budget by name.
        phase: Phase of the search.
        epoch: Training epochs of the weights in the search.
        round: How often the budgets had been tightened; each candidate meets those of its round.
        given_up: Whether the evaluation was stopped early because the best could not be reached; `accuracy` and
            `reward` are then those of the images seen so far.
    """

    widths: tuple[int, ...]
    accuracy: float
    reward: float
    costs: Mapping[str, float]
    phase: str
    epoch: int
    round: int = 0
    given_up: bool = False

    def to_plain(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "widths": list(self.widths), "costs": dict(self.costs)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Candidate:
        return cls(**{**plain, "widths": tuple(int(width) for width in plain["widths"])})


@dataclass(frozen=True)
class Finalist:
    """A plan whose network was scored as it would be delivered.

    Attributes:
        widths: Channels that each group keeps, in the space's order.
        accuracy, reward: As of a `Candidate`, of that network.
    """

    widths: tuple[int, ...]
    accuracy: float
    reward: float


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        best: Chosen plan, by the final weights.
        widths: Channels that it keeps, by group name.
        reward, accuracy: Scores of the chosen plan on the search split with the final weights.
        candidates: All scored plans and the measurements of single groups, in order. Other plans scored for learning
            (the dense network and partial plans) count as evaluations only.
        evaluations: Number of scored candidates that were not known already.
        seconds: Wall time of the search, including the time before resumes.
        timing: Seconds by "evaluation", "training", "agent" (everything else) and "total".
        training: Phase, epoch, loss, accuracy, regularizer and seconds of each training epoch.
        learned: Measures of what each part of the method has learned, for parts that learn apart from the policy.
        finalists: The best few candidates, if these were scored as they would be delivered; the best of them is chosen.
    """

    best: ChannelPlan
    widths: Mapping[str, int]
    reward: float
    accuracy: float
    candidates: tuple[Candidate, ...]
    evaluations: int
    seconds: float
    timing: Mapping[str, float]
    training: tuple[Mapping[str, Any], ...] = ()
    learned: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    finalists: tuple[Finalist, ...] = ()

    def front(self, cost: str) -> tuple[Candidate, ...]:
        """Return the candidates that no other one beats in both accuracy and the named cost, the cheapest first.

        Only candidates on the latest weights and on all images are compared. Candidates above the budget are included;
        they show what a larger budget would bring.
        """
        latest = max((each.epoch for each in self.candidates), default=0)
        alike = [each for each in self.candidates if each.epoch == latest and not each.given_up]
        front: list[Candidate] = []
        for candidate in sorted(alike, key=lambda c: (c.costs[cost], -c.accuracy)):
            if not front or candidate.accuracy > front[-1].accuracy:
                front.append(candidate)
        return tuple(front)


Policy = Callable[[Observation, LegalWidths], float]
"""Maps an observation and the legal widths of the current group to a ratio to remove."""


@dataclass(frozen=True)
class Transition:
    """One step of an episode.

    Attributes:
        observation, following: Observations (9 + context,) before and after the step.
        action: Removed ratio, after clipping to the bounds.
        reward: 0 except for the last step.
        last: Whether it ended the episode.
        requested: Ratio that the policy requested, before clipping.
    """

    observation: Observation
    action: float
    following: Observation
    reward: float
    last: bool
    requested: float


@dataclass(frozen=True)
class Episode:
    """A finished pass through all groups."""

    transitions: tuple[Transition, ...]
    candidate: Candidate


FORMAT = 6
"""Version of the checkpoint's content; another one is rejected."""


@dataclass
class Place:
    """Progress of a search; all of it is saved in the checkpoint.

    Attributes:
        steps: Number of finished steps of each phase.
        epoch: Training epochs so far.
        round: Number of times that the search has continued with other budgets.
        first_round: Round with which this run's part began: 0, or a later one after the search of another target.
        evaluations_before: Evaluations of earlier rounds.
        training_seconds, seconds: Times before the last save.
        chosen: Widths of the result, once there is one.
        kept: Its plan as JSON, if the agent chose the channels as well.
        training: Records of the training epochs, as in the manifest.
        learned: What each part of the method has learned; see `SearchResult`.
        results: Widths of the results of earlier rounds.
        finalists: Widths of this round's finalists, their accuracies and rewards.
    """

    steps: dict[str, int] = field(default_factory=dict)
    epoch: int = 0
    round: int = 0
    first_round: int = 0
    evaluations_before: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    chosen: list[int] | None = None
    kept: str | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    learned: dict[str, dict[str, float]] = field(default_factory=dict)
    results: list[list[int]] = field(default_factory=list)
    finalists: list[tuple[list[int], float, float]] = field(default_factory=list)


def check_state(state: Mapping[str, Any], path: Path, agent: str, trains: bool, env: PruningEnv) -> None:
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
    if (state["weights"] is None) != (not trains):
        found, given = ("without", "with") if state["weights"] is None else ("with", "without")
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
    before, now = ({name: values[0] for name, values in each.items()} for each in (ours, theirs))
    if before.keys() == now.keys() and all(np.isclose(before[name], now[name], rtol=1e-9) for name in now):
        return
    described = [
        ", ".join(f"{name} <= {target:g}" for name, target in each.items()) or "no budget"
        for each in (before, now)
    ]
    raise CompressorError(
        f"The search's state in {path} is of an unfinished search within {described[0]}, not within {described[1]}.",
        "Finish it within those budgets first, or delete that file to search again.",
    )


def space_fingerprint(env: PruningEnv) -> str:
    """Return a checksum of the groups and their legal widths: if it matches, widths mean the same."""
    choices = env.bounds.choices
    described = [
        [group.name, int(group.width), len(legal), int(legal[0])]
        for group, legal in zip(env.space.groups, choices[: env.bounds.groups], strict=True)
    ]
    described += [[name] for name in env.bounds.names[env.bounds.groups :]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
