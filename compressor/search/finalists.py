"""The final choice of a search: the best few plans are scored as the networks that would be delivered.

Candidates are compensated quickly. That orders good plans less well than the thorough compensation with which a network
is delivered (docs/method/compensation.md, "The final choice").
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core import progress
from compressor.search.records import Candidate, Finalist

if TYPE_CHECKING:
    from compressor.search.environment import PruningEnv

MOST = 5
"""Maximum number of finalists."""

EVALUATIONS_EACH = 20
"""Evaluations of a round for each of its finalists."""

CANDIDATES_EACH = 5
"""Candidates that are scored in about the time of a finalist."""


def most_finalists(evaluations: int) -> int:
    """Return the number of finalists after this number of evaluations in a round; one alone is none."""
    number = min(MOST, evaluations // EVALUATIONS_EACH)
    return number if number > 1 else 0


def finalists(
    env: PruningEnv, evaluator: Any, candidates: Sequence[Candidate], evaluations: int
) -> list[Finalist]:
    """Score the best few candidates as they would be delivered.

    Args:
        env, evaluator: Plans and budgets, and what scores networks; without `delivered` there are no finalists.
        candidates: What the search may choose from, the best first.
        evaluations: Those of this round, which say how many finalists there may be.

    Returns:
        The finalists, in the same order; none if networks are delivered as candidates are, or if there is but one.
    """
    delivered = getattr(evaluator, "delivered", None)
    number = most_finalists(evaluations)
    if delivered is None or not number or not candidates:
        return []
    kept = env.bounds.feasible(np.array([each.widths for each in candidates], dtype=np.int64))
    unlike = {each.widths: each for each, fits in zip(candidates, kept, strict=True) if fits}
    few = list(unlike.values())[:number]
    if len(few) < 2:
        return []
    found = list[Finalist]()
    with progress.bar("Scoring the finalists", total=len(few)) as bar:
        for each in few:
            started = time.perf_counter()
            accuracy = delivered(env.plan(each.widths))
            env.evaluation_seconds += time.perf_counter() - started
            found.append(Finalist(each.widths, accuracy, env.reward(accuracy, each.costs)))
            bar.advance(note=f"{accuracy:.1%}")
    return found
