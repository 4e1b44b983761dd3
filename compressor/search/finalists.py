"""The final choice of a search: the best few plans are scored as the networks that would be delivered.

Candidates are compensated quickly. That orders good plans less well than the thorough compensation with which a network
is delivered (docs/method/compensation.md, "The final choice").
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compressor.core import progress
from compressor.search.records import Candidate, Finalist

if TYPE_CHECKING:
    from compressor.search.session import SearchSession

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


def finalists(run: SearchSession, candidates: Sequence[Candidate]) -> list[Finalist]:
    """Score the best few candidates as they would be delivered.

    Args:
        run: Session, whose evaluations in this round say how many there may be.
        candidates: What the search may choose from, the best first.

    Returns:
        The finalists, in the same order; none if networks are delivered as candidates are, if there is but one, or
        if the time limit is reached.
    """
    delivered = getattr(run.evaluator, "delivered", None)
    number = most_finalists(run.evaluations)
    if delivered is None or not number or not candidates or run.late:
        return []
    kept = run.env.bounds.feasible(np.array([each.widths for each in candidates], dtype=np.int64))
    unlike = {each.widths: each for each, fits in zip(candidates, kept, strict=True) if fits}
    few = list(unlike.values())[:number]
    found = list[Finalist]()
    with progress.bar("Scoring the finalists", total=len(few)) as bar:
        for each in few if len(few) > 1 else []:
            started = time.perf_counter()
            accuracy = delivered(run.env.plan(each.widths))
            run.env.evaluation_seconds += time.perf_counter() - started
            found.append(Finalist(each.widths, accuracy, run.env.reward(accuracy, each.costs)))
            bar.advance(note=f"{accuracy:.1%}")
    return found
