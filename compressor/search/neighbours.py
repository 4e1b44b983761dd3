"""Propose plans near the best so far: of many random ones, those of the best reward, as a Gaussian process predicts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressor.budgets.function import FunctionBudget
from compressor.search.proposals import grown, near_rows, near_widths

if TYPE_CHECKING:
    from compressor.search.bounds import Widths
    from compressor.search.session import SearchSession


Inputs = NDArray[np.float64]

_FIRST, _GROWTH = 20, 1.5
"""The kernel is fitted after each plan up to this number, then each time that the number has grown by this factor."""
_MOST = 500
"""Maximum number of plans to learn from: the latest."""
_WORK = 1.6e6
"""Maximum of plans squared times inputs for fitting the kernel (the latest plans): about a second."""
_STEPS = 30
"""Iterations of a fit."""


class RewardModel:
    """A Gaussian process from plans to rewards; the next plan is the one with the largest expected improvement.

    The usual way to spend tens to hundreds of expensive evaluations (Snoek et al., NeurIPS 2012, arXiv 1206.2944): a
    Matern kernel (5/2) with a length scale for each input, fitted by maximum likelihood. Its predictions depend only on
    the data of the last call; nothing needs to be saved.
    """

    def __init__(self) -> None:
        self._inputs: Inputs = np.zeros((0, 0))
        self._rewards: Inputs = np.zeros(0)
        self._kernel: tuple[Any, Any] | None = None  # what it was fitted to, and the kernel

    def learn(self, inputs: Inputs, rewards: Inputs, kind: int) -> None:
        """Learn from all plans so far.

        Args:
            inputs: (N, inputs), in the order of scoring; for the same `kind`, rows are only ever appended.
            rewards: (N,).
            kind: Changes if the rows do not continue the last ones.
        """
        fitted = _FIRST
        while fitted * _GROWTH <= len(inputs):
            fitted = int(fitted * _GROWTH)
        fitted = min(fitted, len(inputs))
        if self._kernel is None or self._kernel[0] != (kind, fitted):
            most = int((_WORK / inputs.shape[1]) ** 0.5)
            some = slice(max(0, fitted - most), fitted)
            self._kernel = (kind, fitted), _fitted_kernel(inputs[some], rewards[some])
        self._inputs, self._rewards = inputs[-_MOST:], rewards[-_MOST:]

    def pick(self, proposals: Inputs, best: float | None, number: int) -> list[int]:
        """Return indices of proposals (P, inputs) to score next, without waiting for each other's rewards.

        Each has the largest expected improvement if those picked before earn their expected reward.

        Args:
            proposals: Plans to pick from.
            best: Reward to improve on; None for the highest expected one.
            number: How many to pick, at most.
        """
        inputs, rewards, picked = self._inputs, self._rewards, list[int]()
        while len(picked) < min(number, len(proposals)):
            mean, deviation = self._process(inputs, rewards).predict(proposals, return_std=True)
            gains = expected_improvement(mean, deviation, float(mean.max()) if best is None else best)
            gains[picked] = -1.0
            index = int(np.lexsort([mean, gains])[-1])  # by the mean if no improvement is expected of any
            picked.append(index)
            inputs, rewards = np.vstack([inputs, proposals[index]]), np.append(rewards, mean[index])
        return picked

    def _process(self, inputs: Inputs, rewards: Inputs) -> Any:
        from sklearn.gaussian_process import GaussianProcessRegressor

        assert self._kernel is not None, "learn comes first"
        return GaussianProcessRegressor(self._kernel[1], optimizer=None, normalize_y=True).fit(
            inputs, rewards
        )


def expected_improvement(mean: Inputs, deviation: Inputs, best: float) -> Inputs:
    """Return by how much rewards of these means and deviations (P,) are expected to exceed `best`, 0 if below it.

    >>> expected_improvement(np.array([0.6, 0.5]), np.array([1e-12, 1.0]), 0.5).round(3).tolist()
    [0.1, 0.399]
    """
    from scipy.stats import norm

    deviation = np.maximum(deviation, 1e-12)
    z = (mean - best) / deviation
    return np.asarray((mean - best) * norm.cdf(z) + deviation * norm.pdf(z))


def _fitted_kernel(inputs: Inputs, rewards: Inputs) -> Any:
    """Return the kernel of maximum likelihood, from the same start each time."""
    from scipy.optimize import minimize
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    def descend(objective: Any, start: Inputs, bounds: Any) -> tuple[Inputs, float]:
        found = minimize(
            objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS}
        )
        return found.x, float(found.fun)

    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(np.ones(inputs.shape[1]), (0.05, 20.0), nu=2.5)
    kernel = kernel + WhiteKernel(1e-3, (1e-5, 1.0))
    with warnings.catch_warnings():  # about length scales at their bounds: inputs that hardly matter
        warnings.simplefilter("ignore")
        return (
            GaussianProcessRegressor(kernel, optimizer=descend, normalize_y=True).fit(inputs, rewards).kernel_
        )


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
        expensive = any(isinstance(budget, FunctionBudget) for budget in run.env.budgets)
        self._proposals = 1 if expensive else proposals
        self._land = None if expensive else land
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
        landed = dict.fromkeys(tuple(self._landed(grown(self._env, rows[index])).tolist()) for index in picked)
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
