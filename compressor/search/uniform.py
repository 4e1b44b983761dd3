"""The simplest yardstick: the same ratio for every group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.search.base import Agent, NoSettings
from compressor.search.candidate import SearchResult
from compressor.search.proposals import uniform_widths
from compressor.search.registry import register_agent

if TYPE_CHECKING:
    from compressor.search.session import SearchSession


@register_agent
class UniformAgent(Agent):
    """Keeps the largest ratio, one for all groups, at which the budgets hold.

    Found by scanning the ratios ever finer; each width is rounded to its group's legal ones. What the rounding leaves
    of the budget is not filled up: the result would no longer be uniform. One evaluation.
    """

    name = "uniform"
    Settings = NoSettings

    def _search(self, run: SearchSession) -> SearchResult:
        return run.choose([uniform_widths(run.env).tolist()])
