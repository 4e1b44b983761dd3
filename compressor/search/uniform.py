"""The simplest baseline: the same ratio for every group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.recipe import NoSettings
from compressor.search.base import Agent, register_agent
from compressor.search.bounds import ActionBounds
from compressor.search.proposals import uniform_widths
from compressor.search.records import SearchResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compressor.budgets.base import Budget
    from compressor.pruning.space import PruningSpace
    from compressor.search.session import SearchSession


class UniformSettings(NoSettings):
    """None: there is one plan."""

    @property
    def removes_blocks(self) -> bool:
        return False  # one ratio serves all groups

    def scored_plans(self, most: int, *, joint_epochs: int, groups: int) -> int:
        return 1


@register_agent
class UniformAgent(Agent):
    """Keeps the largest ratio, the same for all groups, that meets the budgets.

    The ratio is found by scanning finer and finer grids; each width is rounded to a legal one. The budget that rounding
    leaves unused is not filled up, because the result would no longer be uniform. One evaluation.
    """

    name = "uniform"
    Settings = UniformSettings

    def check(self, space: PruningSpace, budgets: Sequence[Budget]) -> None:
        uniform_widths(ActionBounds(space, budgets))

    def _search(self, run: SearchSession) -> SearchResult:
        return run.choose([uniform_widths(run.env.bounds).tolist()])
