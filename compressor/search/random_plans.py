"""Random search, a baseline for agents that learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from compressor.core import progress
from compressor.recipe import AgentSettings
from compressor.search.base import Agent, register_agent
from compressor.search.proposals import followed, random_widths, uniform_or_cheapest
from compressor.search.records import SearchResult
from compressor.search.session import best_of_round, from_earlier_rounds

if TYPE_CHECKING:
    from compressor.search.bounds import Widths
    from compressor.search.session import SearchSession


class RandomSettings(AgentSettings):
    evaluations: int = Field(50, ge=1, description="Plans drawn, unless the limits set another number.")


@register_agent
class RandomAgent(Agent):
    """Scores random plans at the budget and keeps the best; the uniform plan is the first of them.

    With changed budgets it begins with the best plan so far, scaled to them.

    A plan is the uniform one with every ratio changed at random, scaled to the budget and clipped to the
    bounds like the actions of learning agents. Each plan has its own generator, so that a resumed
    search draws the same plans.
    """

    name = "random"
    Settings = RandomSettings

    def _search(self, run: SearchSession) -> SearchResult:
        env = run.env
        phase = f"random{run.place.round or ''}"
        total = run.limits.planned(self.settings.evaluations)
        if run.place.round:
            total = run.later(max(5, total // 5))  # a corrected budget is close to the last one
        draws = 4 * total if run.limits.use_all else total  # known plans cost nothing
        with progress.bar("Scoring random plans", total=total) as bar:
            bar.advance(run.evaluations)
            for step in run.remaining(phase, draws):
                before = run.evaluations
                if run.spent() or before >= total:
                    break
                env.ahead(self._plan(run, each) for each in range(step, draws))
                scored = run.score(self._plan(run, step), phase)
                run.place.steps[phase] = step + 1
                if (step + 1) % 10 == 0:
                    run.save()
                bar.advance(run.evaluations - before, note=f"{scored.accuracy:.1%}")
        best = best_of_round(run)
        return run.choose([self._plan(run, 0).tolist() if best is None else best.widths])

    def _plan(self, run: SearchSession, step: int) -> Widths:
        """Return the widths of a step, from its own generator; the first are uniform, or the best of earlier rounds."""
        if step == 0:
            return next(from_earlier_rounds(run)) if run.place.round else uniform_or_cheapest(run.env)
        drawn = random_widths(run.env, np.random.default_rng([self.seed, run.place.round, step]))
        return followed(run.env, drawn)
