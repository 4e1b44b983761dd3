"""Baseline of the learning agents: a knapsack with saliency as value and the budgets as price."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compressor.core import progress
from compressor.recipe import AgentSettings
from compressor.search.allocation import POWERS, Allocator, Sensitivity, saliency_values
from compressor.search.base import Agent, register_agent
from compressor.search.proposals import near_widths, uniform_or_cheapest
from compressor.search.records import SearchResult
from compressor.search.session import SearchSession, best_of_round, from_earlier_rounds

if TYPE_CHECKING:
    from compressor.search.bounds import Widths

SAVE_EVERY = 10


class KnapsackSettings(AgentSettings):
    evaluations: int = Field(50, ge=1, description="Scored plans, unless the limits set another number.")
    sensitivity: bool = Field(
        True,
        description="Whether to measure each group's effect on the accuracy, and to fit the values to it, if "
        "there are at least three evaluations for each group.",
    )
    spread: float = Field(
        0.5, gt=0, description="Standard deviation of the first changes to the logarithm of the groups' weights."
    )


@register_agent
class KnapsackAgent(Agent):
    """Solves the allocation for one set of values after another, and keeps the plan with the best score.

    One evaluation is the published method: Taylor saliency (Molchanov et al., CVPR 2019) summed over the channels
    that a group keeps. Further evaluations refine it: the saliency's exponent is varied; each group alone is pruned
    twice, and the loss of accuracy becomes its value, as a power of the removed share; then the groups' weights in the
    better of the two are changed at random, and changes with a higher score are kept. Each candidate is an optimum of
    its values at the budget, or lies near the best plan if that optimum is known.
    """

    name = "knapsack"
    Settings = KnapsackSettings

    def _search(self, run: SearchSession) -> SearchResult:
        return _KnapsackSearch(run, self.settings).search()


class _KnapsackSearch:
    def __init__(self, run: SearchSession, settings: KnapsackSettings) -> None:
        self.run, self.env, self.settings = run, run.env, settings
        self.allocator = Allocator(run.env)
        groups = len(run.env.bounds.dense)
        self._best: dict[str, Any] = {
            "source": "saliency1.0",
            "weights": [0.0] * groups,
            "reward": None,
            "widths": [],
        }
        self._spread = settings.spread
        self._sensitivity = Sensitivity(run, self.allocator.levels)
        self._saliency = run.env.saliency()
        run.own = self._state
        if run.restored is not None:
            self._restore(run.restored)

    def search(self) -> SearchResult:
        run, groups = self.run, len(self.env.bounds.dense)
        total = self._planned()
        if run.place.round:
            self._adapt()
        else:
            for step in run.remaining("saliency", len(POWERS)):
                self._try(f"saliency{POWERS[step]}", np.zeros(groups))
                run.done("saliency")
            if self.settings.sensitivity and total >= 3 * groups + len(POWERS):
                self._sensitivity.measure()
                for _ in run.remaining("measured", 1):
                    if self._sensitivity.complete:
                        self._try("sensitivities", np.zeros(groups))
                    run.done("measured")
        self._refine(total)
        best = best_of_round(run)
        if best is not None:
            return run.choose([best.widths])
        if run.place.round:
            return run.choose([])  # only the result of earlier rounds
        return run.choose([uniform_or_cheapest(self.env).tolist()])  # no time for anything else

    def _planned(self) -> int:
        if self.run.place.round:
            return self.run.later(6)
        return self.run.limits.planned(self.settings.evaluations)

    def _refine(self, total: int) -> None:
        """Change the groups' weights in the best values; success widens the changes, failure narrows them."""
        phase = f"refine{self.run.place.round or ''}"
        with progress.bar("Refining the values", total=total) as bar:
            bar.advance(self.run.evaluations)
            for step in self.run.remaining(phase, 4 * total):
                if self.run.spent() or self.run.evaluations >= total:
                    break
                self.env.ahead(self._likely(step))
                weights, generator = self._changed(step, self._spread)
                better = self._try(self._best["source"], weights, generator)
                self._spread = self._next_spread(self._spread, better)
                self.run.place.steps[phase] = step + 1
                if (step + 1) % SAVE_EVERY == 0:
                    self.run.save()
                bar.advance()

    def _changed(self, step: int, spread: float) -> tuple[NDArray[np.float64], np.random.Generator]:
        """Return the best weights with the random change of a step, and the step's generator after it."""
        generator = np.random.default_rng([self.run.agent.seed, self.run.place.round, step])
        change = spread * generator.standard_normal(len(self.allocator.levels))
        return np.array(self._best["weights"]) + change, generator

    @staticmethod
    def _next_spread(spread: float, better: bool) -> float:
        return float(np.clip(spread * (1.5 if better else 0.92), 0.05, 1.0))

    def _likely(self, step: int) -> Iterator[Widths]:
        """Yield what this step and the next ones try if none improves on the best, as is usual."""
        spread = self._spread
        while True:
            weights, generator = self._changed(step, spread)
            yield self._solved(self._best["source"], weights, generator, spread)
            step, spread = step + 1, self._next_spread(spread, False)

    def _adapt(self) -> None:
        """Score the best plan so far, scaled to the new budgets; then the best values, solved for them.

        For another target, the unrefined values follow.
        """
        phase, others = f"again{self.run.place.round}", list[str]()
        if self.run.another_target:
            others = [f"saliency{power}" for power in POWERS]
            others += ["sensitivities"] if self._sensitivity.complete else []
        for step in self.run.remaining(phase, 2 + len(others)):
            if self.run.spent():
                return
            source, weights = self._best["source"], np.array(self._best["weights"])
            if step == 0:
                self._best["reward"] = None
                self._scored(next(from_earlier_rounds(self.run)), source, weights)
            elif step == 1:
                self._try(source, weights)
            else:
                self._try(others[step - 2], np.zeros_like(weights))
            self.run.done(phase)

    def _try(
        self, source: str, weights: NDArray[np.float64], generator: np.random.Generator | None = None
    ) -> bool:
        """Solve for these values and score the plan; return whether it is the best so far."""
        if self.run.spent():
            return False
        return self._scored(self._solved(source, weights, generator, self._spread), source, weights)

    def _scored(self, widths: Widths, source: str, weights: NDArray[np.float64]) -> bool:
        """Score a plan from or near the optimum of these values; return whether it is the best so far."""
        candidate = self.run.score(widths, source)
        better = self._best["reward"] is None or candidate.reward > self._best["reward"]
        if better:
            self._best = {
                "source": source,
                "weights": weights.tolist(),
                "reward": candidate.reward,
                "widths": list(candidate.widths),
            }
        return better

    def _solved(
        self, source: str, weights: NDArray[np.float64], generator: np.random.Generator | None, spread: float
    ) -> Widths:
        """Return the optimum of these values; with a generator, and if it is known already, widths near the best."""
        pairs = zip(self._values(source), np.exp(weights), strict=True)
        widths = self.allocator.solve([value * weight for value, weight in pairs])
        if generator is not None and self.env.known(widths):  # other values, the same optimum
            return self._vary(generator, spread)
        return widths

    def _vary(self, generator: np.random.Generator, base: float) -> Widths:
        """Return widths near the best ones, further away until they are new."""
        best = np.array(self._best["widths"], dtype=np.int64)
        for attempt in range(8):
            spread = base + 0.1 * attempt
            widths = near_widths(self.env, best, generator, spread, share=0.3 + 0.1 * attempt)
            if not self.env.known(widths):
                break
        return widths

    def _values(self, source: str) -> list[NDArray[np.float64]]:
        if source == "sensitivities":
            return self._sensitivity.values()
        power = float(source.removeprefix("saliency"))
        return saliency_values(self._saliency, self.allocator.levels, power)

    def _state(self) -> dict[str, Any]:
        return {"best": dict(self._best), "spread": self._spread, "losses": self._sensitivity.losses}

    def _restore(self, state: dict[str, Any]) -> None:
        self._best, self._spread = dict(state["best"]), float(state["spread"])
        self._sensitivity.losses = list(state["losses"])
