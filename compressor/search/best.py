"""The best plans of a search so far, which every agent asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compressor.search.proposals import scaled_widths
from compressor.search.values import PHASE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from compressor.search.base import Candidate
    from compressor.search.bounds import Widths
    from compressor.search.search_run import SearchRun


def best_of_round(run: SearchRun) -> Candidate | None:
    """The best plan of this round of the search, on whatever weights."""
    return _highest(c for c in eligible(run) if c.round == run.place.round)


def best_on_weights(run: SearchRun) -> Candidate | None:
    """The best plan of this round that was scored on the weights as they are."""
    place = run.place
    return _highest(c for c in eligible(run) if (c.epoch, c.round) == (place.epoch, place.round))


def best_known(run: SearchRun, number: int) -> list[tuple[int, ...]]:
    """Widths of the best plans of this round and of earlier results, first those scored on the latest weights."""
    latest = max((c.epoch for c in run.candidates), default=0)
    known = [c for c in eligible(run) if c.round == run.place.round or c.phase == "final"]
    known.sort(key=lambda c: (c.epoch == latest, *merit(c)), reverse=True)
    return list(dict.fromkeys(candidate.widths for candidate in known))[:number]


def carried_over(run: SearchRun) -> Iterator[Widths]:
    """In a later round of the search, widths (G,) of the result of the last one and of the best of all: each scaled to
    the budgets as they are now, and as it was. In the first round there are none."""
    results = [c for c in eligible(run) if c.round < run.place.round and c.phase == "final"]
    latest = max((c.epoch for c in results), default=0)
    last = [c for c in results if c.round == run.place.round - 1]
    for among in (last, results):
        best = _highest(c for c in among if c.epoch == latest)
        if best is not None:
            widths = np.array(best.widths, dtype=np.int64)
            yield scaled_widths(run.env, widths / run.env.bounds.dense)
            yield widths


def merit(candidate: Candidate) -> tuple[float, int]:
    """What plans are compared by: the reward, then the channels kept, since what a budget allows costs nothing."""
    return candidate.reward, sum(candidate.widths)


def eligible(run: SearchRun) -> list[Candidate]:
    """What a search may choose from: measurements of single groups only where they keep the budgets."""
    measured = [candidate.widths for candidate in run.candidates if candidate.phase == PHASE]
    if not measured:
        return list(run.candidates)
    kept = dict(zip(measured, run.env.bounds.feasible(np.array(measured, dtype=np.int64)), strict=True))
    return [c for c in run.candidates if c.phase != PHASE or kept[c.widths]]


def _highest(candidates: Iterable[Candidate]) -> Candidate | None:
    """The candidate of the greatest merit, of equal ones the first; None where there is none."""
    return max(candidates, key=merit, default=None)
