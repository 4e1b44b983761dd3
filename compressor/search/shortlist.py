"""The final scoring of the best few plans, side by side where there are several workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.search.base import Candidate
    from compressor.search.search_run import SearchRun

Widths = tuple[int, ...]


def score_shortlists(
    run: SearchRun,
    shortlists: Iterable[Iterable[Sequence[int]]],
    *,
    score_all: bool,
    plans: Mapping[Widths, ChannelPlan],
    measure: Callable[[ChannelPlan], float] | None,
) -> list[Candidate]:
    """The feasible plans of one list after another, scored until a limit is reached; the first one in any case.

    Those that cannot beat the best so far are given up. Several workers score the ones that follow with the floor of
    the moment; where it has risen when their turn comes, those that it matters to are scored again. So what is found
    does not depend on the number of workers. A list is begun when the one before it has been scored.

    Args:
        run, shortlists, score_all, plans, measure: as `SearchRun.choose` takes them.
    """
    scored: list[Candidate] = []
    seen: set[Widths] = set()
    workers = run.env.workers if measure is None else 1
    for asked in shortlists:
        coming, waiting = _feasible(run, asked, seen), deque[Widths]()
        while not (scored and (not score_all or run.spent())):
            side_by_side = bool(scored) and workers > 1
            waiting.extend(islice(coming, (2 * workers if side_by_side else 1) - len(waiting)))
            if not waiting:
                break
            floor = max((candidate.reward for candidate in scored), default=None)
            if side_by_side:
                run.env.ahead([each for each in waiting if each not in plans], floor)
            widths = waiting.popleft()
            if widths not in plans and measure is None:
                scored.append(run.score(widths, "final", floor))
            else:
                judged = partial(measure or run.evaluator, plans.get(widths) or run.env.plan(widths))
                scored.append(run.score_by(widths, judged, "final"))
    return scored


def _feasible(run: SearchRun, asked: Iterable[Sequence[int]], seen: set[Widths]) -> Iterator[Widths]:
    """Those that keep the budgets and were not seen yet."""
    for each in asked:
        widths = tuple(int(width) for width in each)
        if widths not in seen and run.env.bounds.feasible(np.array(widths, dtype=np.int64))[0]:
            seen.add(widths)
            yield widths
