"""Propose plans near the best so far: of many random ones, those with the best predicted reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.budgets.function import FunctionBudget
from compressor.search.proposals import near_rows, near_widths
from compressor.search.reward_model import RewardModel

if TYPE_CHECKING:
    from compressor.search.bounds import Widths
    from compressor.search.session import SearchSession

PICKED = 4
"""Number of plans picked at a time, so that several workers can score them in parallel."""

_ATTEMPTS = 8

_ENOUGH = 8
"""Number of plans that must have been scored before the model is used."""


class NearBest:
    """Draws plans near a given one and returns them one by one.

    The model learns from all plans scored on the current weights (including partial plans and single groups) and, if
    weights change, from the candidates of earlier epochs, with the epoch as an additional input. If each price is a
    call of a user's function, many proposals are too expensive: the plans are then drawn at random.

    Args:
        run: Session with the scored plans.
        spread: Standard deviation of the changes to the logarithm of ratios.
        proposals: Number of plans drawn for the model to pick from; 1 disables the model.
        land: Maps widths (G,) to the plan that is actually scored; None for the widths themselves.
    """

    def __init__(
        self,
        run: SearchSession,
        spread: float,
        proposals: int,
        land: Callable[[Widths], Widths] | None = None,
    ) -> None:
        self._run, self._env, self._spread = run, run.env, spread
        dear = any(isinstance(budget, FunctionBudget) for budget in run.env.budgets)
        self._proposals = 1 if dear else proposals
        self._land = None if dear else land
        self._generator = np.random.default_rng([run.agent.seed, 1])
        self._model = RewardModel()
        self._picked: list[list[int]] = []
        self._place = self._place_now()

    def next(self, widths: Widths) -> Widths:
        """Return the next plan (G,) to score near these widths, if possible one that is not known yet."""
        if self._place != self._place_now():  # rewards or budgets have changed
            self._place, self._picked = self._place_now(), []
        while self._picked:
            found = np.array(self._picked.pop(0), dtype=np.int64)
            if not self._env.known(found):
                return found
        if self._proposals > 1:
            self._picked = self._pick(widths)
        if self._picked:
            return np.array(self._picked.pop(0), dtype=np.int64)
        return self._drawn(widths)

    def score(self, widths: Widths) -> None:
        """Score the next plan near these widths; several workers score the following ones as well."""
        found = self.next(widths)
        self._env.ahead([found, *self.coming])
        self._run.score(found, "near")

    @property
    def coming(self) -> list[Widths]:
        """Return the widths (G,) of the plans that are picked already and will be returned next."""
        return [np.array(each, dtype=np.int64) for each in self._picked]

    def _pick(self, widths: Widths) -> list[list[int]]:
        """Return the most promising of many plans; none if too little is known, or nothing new is near."""
        rows = near_rows(self._env, widths, self._generator, self._spread, self._proposals)
        rows = rows[[not self._env.known(row) for row in rows]]
        plans, epochs, rewards = self._scored()
        if len(rewards) < _ENOUGH or not len(rows):
            return []
        epoch = self._run.place.epoch
        self._model.learn(self._inputs(plans, epochs), rewards, kind=epoch)
        kept = rewards[(epochs == epoch) & self._env.bounds.feasible(plans)]  # the rewards to improve on
        proposals = self._inputs(rows, np.full(len(rows), epoch))
        picked = self._model.pick(proposals, float(kept.max()) if len(kept) else None, PICKED)
        landed = dict.fromkeys(tuple(self._landed(rows[index]).tolist()) for index in picked)
        return [list(widths) for widths in landed if not self._env.known(widths)]

    def _landed(self, widths: Widths) -> Widths:
        return widths if self._land is None else self._land(widths)

    def _scored(self) -> tuple[Any, Any, Any]:
        """Return widths (N, G), epochs (N,) and rewards (N,) of scored plans; on other weights, of full candidates."""
        epoch = self._run.place.epoch
        found = {
            (c.epoch, c.widths): c.reward for c in self._run.candidates if c.epoch != epoch and not c.given_up
        }
        found |= {(epoch, widths): reward for widths, reward in self._env.rewards().items()}
        epochs = np.array([epoch for epoch, _ in found])
        return np.array([widths for _, widths in found]), epochs, np.array(list(found.values()))

    def _inputs(self, widths: Any, epochs: Any) -> Any:
        """Return inputs (N, G + 1) between 0 and 1: kept shares, and the epoch relative to those of the search."""
        last = max(1, self._run.agent.schedule.total)
        return np.column_stack([widths / self._env.bounds.dense, epochs / last])

    def _drawn(self, widths: Widths) -> Widths:
        """Return widths near given ones, further away until they were not scored yet."""
        for attempt in range(_ATTEMPTS):
            share, spread = float(self._generator.uniform(0.1, 1.0)), self._spread * (1 + attempt / 4)
            found = self._landed(near_widths(self._env, widths, self._generator, spread, share))
            if not self._env.known(found):
                break
        return found

    def _place_now(self) -> list[int]:
        return [self._run.place.epoch, self._run.place.round]

    def state(self) -> dict[str, Any]:
        """Plain values."""
        generator = json.dumps(self._generator.bit_generator.state)
        picked = [list(each) for each in self._picked]
        return {"generator": generator, "picked": picked, "place": list(self._place)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._generator.bit_generator.state = json.loads(state["generator"])
        self._picked, self._place = [list(each) for each in state["picked"]], list(state["place"])
