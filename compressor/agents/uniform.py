"""The simplest yardstick: the same ratio for every group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.agents.base import Agent, Limits, NoSettings, SearchResult
from compressor.agents.proposals import uniform_widths
from compressor.agents.search_run import SearchRun

if TYPE_CHECKING:
    from compressor.env.environment import PruningEnv
    from compressor.run_dir import Checkpoint, EpisodeLog
    from compressor.training.evaluate import Evaluator


class UniformAgent(Agent):
    """Keeps the largest ratio, one for all groups, at which the budgets hold.

    Found by bisection; each width is rounded to its group's legal ones. What the rounding leaves of the
    budget is not
    filled up: the result would no longer be uniform. One evaluation.
    """

    name = "uniform"
    Settings = NoSettings

    def search(
        self,
        env: PruningEnv,
        evaluator: Evaluator,
        limits: Limits,
        *,
        log: EpisodeLog,
        checkpoint: Checkpoint,
    ) -> SearchResult:
        run = SearchRun(self, env, evaluator, limits, log, checkpoint)
        if (result := run.result()) is not None:
            return result
        run.train("warmup", self.schedule.warmup, "Training before the search")
        return run.choose([uniform_widths(env).tolist()])
