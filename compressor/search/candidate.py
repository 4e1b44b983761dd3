"""Data classes of a search: limits, candidates, episodes and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.core.errors import CompressorError
from compressor.pruning.plan import ChannelPlan
from compressor.search.bounds import LegalWidths
from compressor.search.environment import Observation

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
        asked: Ratio that the policy requested.
    """

    observation: Observation
    action: float
    following: Observation
    reward: float
    last: bool
    asked: float


@dataclass(frozen=True)
class Episode:
    """A finished pass through all groups."""

    transitions: tuple[Transition, ...]
    candidate: Candidate
