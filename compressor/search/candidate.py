"""What a search scores and finds: limits, candidates, episodes, and its result."""

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
"""Phase of the plans that measure a group; they prune that group alone and need not keep the budgets."""


@dataclass(frozen=True)
class Limits:
    """What a search may cost.

    Attributes:
        max_evaluations: the most candidates scored in each round (the search, and each time that it goes on with
            budgets that have changed), those of the final choice included; None is no limit.
        use_all: use all of `max_evaluations`, as comparisons at equal cost need; otherwise the agent's settings say
            how many it takes, and the limit only cuts them short.
        max_seconds: wall time of all rounds, time before a resume included; None is no limit. After it no candidate
            and no epoch of training is begun, but for the one candidate that a round without any needs for its result;
            what is begun is ended. A run that it cuts short cannot be repeated to the letter.
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
        """Evaluations that a search is to plan for: `usual`, as far as there are as many; or all that there are."""
        if self.max_evaluations is None:
            return usual
        return self.max_evaluations if self.use_all else min(self.max_evaluations, usual)


@dataclass(frozen=True)
class Candidate:
    """A plan that was scored.

    Attributes:
        widths: channels that each group keeps, in the space's order.
        accuracy: on the search split, 0..1, with the weights of `epoch`.
        reward: what the agent maximised.
        costs: predicted cost of each budget by name.
        phase: what the agent was doing.
        epoch: epochs that the weights had been trained for in the search.
        round: 0, or how often the budgets had been tightened; each candidate keeps those of its round.
        given_up: whether the evaluation was broken off, because the best could not be reached any more; `accuracy`
            and `reward` are those of the images seen until then.
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
    """What a search found.

    Attributes:
        best: the chosen plan, by the weights at the end.
        widths: channels that it keeps, by group name.
        reward, accuracy: of the chosen plan, on the search split with the weights at the end.
        candidates: all plans that were scored and the measurements of single groups, in their order. What else was
            scored to learn from it, the dense network and partial plans, counts as evaluations only.
        evaluations: candidates scored that were not known already.
        seconds: wall time of the search, time before resumes included.
        timing: seconds by "evaluation", "training", "agent" (everything else) and "total".
        training: phase, epoch, loss, accuracy, regulariser and seconds of each epoch of training.
        learned: by part of the method, numbers that say what it has learned, where it learns apart from the policy.
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
        """The candidates that no other one beats in both accuracy and the named cost, from cheap to dear.

        Only those compared alike: on the latest weights and on all images. Dearer ones than the budget allows, which
        show what more would bring, are among them.
        """
        latest = max((each.epoch for each in self.candidates), default=0)
        alike = [each for each in self.candidates if each.epoch == latest and not each.given_up]
        front: list[Candidate] = []
        for candidate in sorted(alike, key=lambda c: (c.costs[cost], -c.accuracy)):
            if not front or candidate.accuracy > front[-1].accuracy:
                front.append(candidate)
        return tuple(front)


Policy = Callable[[Observation, LegalWidths], float]
"""From an observation and what is legal for the group at hand to a ratio to remove."""


@dataclass(frozen=True)
class Transition:
    """One step of an episode.

    Attributes:
        observation, following: (9 + context,), before and after it.
        action: the ratio removed, as the bounds moved it.
        reward: 0 but for the last step.
        last: whether it ended the episode.
        asked: the ratio that the policy asked for.
    """

    observation: Observation
    action: float
    following: Observation
    reward: float
    last: bool
    asked: float


@dataclass(frozen=True)
class Episode:
    """A finished walk through all groups."""

    transitions: tuple[Transition, ...]
    candidate: Candidate
