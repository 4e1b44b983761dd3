"""The scored plans of a search as the manifest lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.core.manifest import Candidate, Finalist

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace
    from compressor.search.records import Candidate as ScoredPlan
    from compressor.search.records import SearchResult


def recorded(
    found: Sequence[ScoredPlan], uniform: tuple[int, ...] | None, space: PruningSpace, plan: ChannelPlan
) -> list[Candidate]:
    """Return the candidates of a search.

    Args:
        found: Its scored plans, in their order.
        uniform: Widths of uniform pruning within the budgets; None if no ratio meets them.
        space: The space of the plans.
        plan: The plan that is delivered.
    """
    candidates = [_candidate(each, each.widths == uniform) for each in found]
    return with_choice(candidates, [each.widths for each in found], space, plan)


def finalists(result: SearchResult) -> list[Finalist]:
    """Return the candidates of a search that were scored again as they would be delivered, the best first."""
    scores = {each.widths: each.accuracy for each in result.candidates}
    chosen = tuple(result.widths.values())
    return [
        Finalist(candidate_score=scores[each.widths], score=each.accuracy, chosen=each.widths == chosen)
        for each in result.finalists
    ]


def _candidate(found: ScoredPlan, uniform: bool) -> Candidate:
    given_up: dict[str, bool] = {"given_up": True} if found.given_up else {}
    return Candidate(
        reward=found.reward,
        accuracy=found.accuracy,
        costs=dict(found.costs),
        source="uniform" if uniform else found.phase,
        epoch=found.epoch,
    ).model_copy(update=given_up)


def with_choice(
    candidates: Sequence[Candidate], rows: Sequence[Sequence[int]], space: PruningSpace, plan: ChannelPlan
) -> list[Candidate]:
    """Return the candidates, of these rows, with one mark: on the last that was scored with the widths of a plan."""
    delivered = space.settled(space.row(plan)[None])[0].tolist()
    places = [place for place, row in enumerate(rows) if list(row) == delivered]
    return [
        each if each.chosen == (place in places[-1:]) else each.model_copy(update={"chosen": not each.chosen})
        for place, each in enumerate(candidates)
    ]
