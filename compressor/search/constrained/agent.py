"""The constrained agent: PPO with a Lagrange multiplier for each budget (arXiv 2110.08558)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.search.base import Agent
from compressor.search.candidate import SearchResult
from compressor.search.constrained.published import PUBLISHED
from compressor.search.constrained.search import ConstrainedSearch
from compressor.search.constrained.settings import PAPER, ConstrainedSettings
from compressor.search.registry import register_agent

if TYPE_CHECKING:
    from compressor.search.session import SearchSession


@register_agent
class ConstrainedAgent(Agent):
    """Learns a policy whose plans meet the budgets on average, and keeps the best plan that does.

    Episodes may exceed the budgets: the excess cost is weighed against the accuracy by multipliers, which rise while
    the budgets are exceeded. Budgets are only evaluated, never differentiated. The result is the best episode within
    the budgets, scored again beside the best few and the policy's own plan, scaled to the budgets.
    """

    name = "constrained"
    source = "arXiv 2110.08558"
    published = PUBLISHED
    Settings = ConstrainedSettings

    def __init__(self, *, settings: Mapping[str, Any] | None = None, **options: Any) -> None:
        given = dict(settings or {})
        super().__init__(settings={**PAPER, **given} if given.get("paper") else given, **options)

    def unread_settings(self) -> dict[str, str]:
        names = ("near_spread", "proposals")
        if self.settings.action == "channel":
            return dict.fromkeys(
                (*names, "near_share"), "action is 'channel': plans are more than their widths"
            )
        if any(self.settings.finetune_iterations):
            return dict.fromkeys((*names, "near_share"), "finetune_iterations trains each candidate")
        return {} if self.settings.near_share else dict.fromkeys(names, "near_share is 0")

    def _search(self, run: SearchSession) -> SearchResult:
        dense = run.env.bounds.dense
        if run.env.bounds.feasible(dense)[0]:
            return run.choose([dense.tolist()])  # no budget requires pruning
        search = ConstrainedSearch(run, self.settings)
        if run.place.round:
            return search.choose()  # a budget was tightened: the search reuses what it has learned
        search.start()
        updates = search.updates()
        # Known plans cost nothing: if all evaluations are to be used, more updates follow.
        for update in run.remaining("update", (4 if run.limits.use_all else 1) * updates):
            if not search.play(update, updates):
                break
            search.learn()
            search.stay_near_the_best()
            run.done("update")
        return search.choose()
