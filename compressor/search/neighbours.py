"""Plans near the best so far, of many those that the model of the reward expects most of."""

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
"""Plans that are picked at a time, so that several workers can score them side by side."""

_ATTEMPTS = 8

_ENOUGH = 8
"""Plans that must have been scored before the model is asked."""


class NearBest:
    """Draws plans near a given one and hands them out one by one.

    The model learns from all that was scored on the present weights (partial plans and single groups included) and,
    where weights move, from the candidates of earlier epochs, with the epoch as one more input. Where each price is a
    call of a user's function, many proposals would cost more than they bring: the plans are drawn at random then.

    Args:
        run: what was scored.
        spread: standard deviation of the changes to the logarithm of ratios.
        proposals: how many plans are drawn for the model to pick from; 1 does without it.
        land: the plan that is scored where one of some widths (G,) is asked for; left out, that one.
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
        """The next plan (G,) to score near these widths, if possible one that is not known yet."""
        if self._place != self._place_now():  # rewards or budgets are others now
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
        """Score the next plan near these widths; several workers score those that come after it as well."""
        found = self.next(widths)
        self._env.ahead([found, *self.coming])
        self._run.score(found, "near")

    @property
    def coming(self) -> list[Widths]:
        """Widths (G,) of the plans that are picked already and will be handed out next."""
        return [np.array(each, dtype=np.int64) for each in self._picked]

    def _pick(self, widths: Widths) -> list[list[int]]:
        """The most promising of many plans; none where too little is known, or nothing new lies near."""
        rows = near_rows(self._env, widths, self._generator, self._spread, self._proposals)
        rows = rows[[not self._env.known(row) for row in rows]]
        plans, epochs, rewards = self._scored()
        if len(rewards) < _ENOUGH or not len(rows):
            return []
        epoch = self._run.place.epoch
        self._model.learn(self._inputs(plans, epochs), rewards, kind=epoch)
        kept = rewards[(epochs == epoch) & self._env.bounds.feasible(plans)]  # what there is to improve on
        proposals = self._inputs(rows, np.full(len(rows), epoch))
        picked = self._model.pick(proposals, float(kept.max()) if len(kept) else None, PICKED)
        landed = dict.fromkeys(tuple(self._landed(rows[index]).tolist()) for index in picked)
        return [list(widths) for widths in landed if not self._env.known(widths)]

    def _landed(self, widths: Widths) -> Widths:
        return widths if self._land is None else self._land(widths)

    def _scored(self) -> tuple[Any, Any, Any]:
        """Widths (N, G), epochs (N,) and rewards (N,) of what was scored; on other weights, of whole candidates."""
        epoch = self._run.place.epoch
        found = {
            (c.epoch, c.widths): c.reward for c in self._run.candidates if c.epoch != epoch and not c.given_up
        }
        found |= {(epoch, widths): reward for widths, reward in self._env.rewards().items()}
        epochs = np.array([epoch for epoch, _ in found])
        return np.array([widths for _, widths in found]), epochs, np.array(list(found.values()))

    def _inputs(self, widths: Any, epochs: Any) -> Any:
        """(N, G + 1) between 0 and 1: kept shares, and the epoch among those of the search."""
        last = max(1, self._run.agent.schedule.total)
        return np.column_stack([widths / self._env.bounds.dense, epochs / last])

    def _drawn(self, widths: Widths) -> Widths:
        """Widths near given ones, further away until they are some that were not scored yet."""
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
        """Take up what `state` returned."""
        self._generator.bit_generator.state = json.loads(state["generator"])
        self._picked, self._place = [list(each) for each in state["picked"]], list(state["place"])
