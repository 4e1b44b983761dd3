"""What a policy is, and what an episode leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.search.bounds import LegalWidths
from compressor.search.environment import Observation

if TYPE_CHECKING:
    from compressor.search.base import Candidate

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
