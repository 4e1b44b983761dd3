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
    from compressor.search.allocation import Allocator, Sensitivity
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
_LEAST = 1e-3
"""Smallest reward that the model tells apart: it learns logarithms."""


class RewardModel:
    """A Gaussian process from plans to rewards; the next plan is the one with the largest expected improvement.

    The usual way to spend tens to hundreds of expensive evaluations (Snoek et al., NeurIPS 2012, arXiv 1206.2944): a
    Matern kernel (5/2) with a length scale for each input, fitted by maximum likelihood, around a mean that is linear
    in a given trend. Its predictions depend only on the data of the last call; nothing needs to be saved.
    """

    def __init__(self) -> None:
        self._inputs: Inputs = np.zeros((0, 0))
        self._rewards: Inputs = np.zeros(0)
        self._line: Inputs = np.zeros(2)  # of the mean over the trend: slope and constant
        self._kernel: tuple[Any, Any] | None = None  # what it was fitted to, and the kernel

    def learn(self, inputs: Inputs, trend: Inputs, rewards: Inputs, kind: int) -> None:
        """Learn from all plans so far.

        Args:
            inputs: (N, inputs), in the order of scoring; for the same `kind`, rows are only ever appended.
            trend: (N,), what the mean is linear in.
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
            rest = rewards[some] - _on(_line(trend[some], rewards[some]), trend[some])
            self._kernel = (kind, fitted), _fitted_kernel(inputs[some], rest)
        self._line = _line(trend[-_MOST:], rewards[-_MOST:])
        self._inputs, self._rewards = inputs[-_MOST:], rewards[-_MOST:] - _on(self._line, trend[-_MOST:])

    def expected(self, plans: Inputs, trend: Inputs) -> Inputs:
        """Return the expected rewards (P,) of plans (P, inputs); for known plans, with less noise than theirs."""
        return self._predicted(self._inputs, self._rewards, plans)[0] + _on(self._line, trend)

    def rank(self, proposals: Inputs, trend: Inputs, best: float | None) -> NDArray[np.int64]:
        """Return the indices of proposals (P, inputs) by falling expected improvement; arguments as of `pick`."""
        return self._ranked(self._inputs, self._rewards, proposals, trend, best)[0]

    def pick(self, proposals: Inputs, trend: Inputs, best: float | None, number: int) -> list[int]:
        """Return indices of proposals (P, inputs) to score next, without waiting for each other's rewards.

        Each has the largest expected improvement if those picked before earn their expected reward.

        Args:
            proposals: Plans to pick from.
            trend: (P,), what the mean is linear in.
            best: Reward to improve on; None for the highest expected one.
            number: How many to pick, at most.
        """
        inputs, rewards, picked = self._inputs, self._rewards, list[int]()
        while len(picked) < min(number, len(proposals)):
            order, rest = self._ranked(inputs, rewards, proposals, trend, best)
            index = next(int(each) for each in order if each not in picked)
            picked.append(index)
            inputs, rewards = np.vstack([inputs, proposals[index]]), np.append(rewards, rest[index])
        return picked

    def _ranked(
        self, inputs: Inputs, rewards: Inputs, proposals: Inputs, trend: Inputs, best: float | None
    ) -> tuple[NDArray[np.int64], Inputs]:
        """Return the order of proposals, and the part of their expected rewards that is not on the line."""
        rest, deviation = self._predicted(inputs, rewards, proposals)
        mean = rest + _on(self._line, trend)
        gains = expected_improvement(mean, deviation, float(mean.max()) if best is None else best)
        return np.lexsort([mean, gains])[::-1], rest  # by the mean if no improvement is expected of any

    def _predicted(self, inputs: Inputs, rewards: Inputs, plans: Inputs) -> tuple[Inputs, Inputs]:
        """Return mean and deviation (P,) of what plans (P, inputs) earn beside the line."""
        from sklearn.gaussian_process import GaussianProcessRegressor

        assert self._kernel is not None, "learn comes first"
        process = GaussianProcessRegressor(self._kernel[1], optimizer=None, normalize_y=True).fit(inputs, rewards)
        mean, deviation = process.predict(plans, return_std=True)
        return mean, deviation


def expected_improvement(mean: Inputs, deviation: Inputs, best: float) -> Inputs:
    """Return by how much rewards of these means and deviations (P,) are expected to exceed `best`, 0 if below it.

    >>> expected_improvement(np.array([0.6, 0.5]), np.array([1e-12, 1.0]), 0.5).round(3).tolist()
    [0.1, 0.399]
    """
    from scipy.stats import norm

    deviation = np.maximum(deviation, 1e-12)
    z = (mean - best) / deviation
    return np.asarray((mean - best) * norm.cdf(z) + deviation * norm.pdf(z))


def _line(trend: Inputs, rewards: Inputs) -> Inputs:
    """Return slope and constant (2,) of the line through rewards (N,) over the trend (N,)."""
    return np.asarray(np.linalg.lstsq(np.column_stack([trend, np.ones(len(trend))]), rewards, rcond=None)[0])


def _on(line: Inputs, trend: Inputs) -> Inputs:
    return np.asarray(line[0] * trend + line[1])


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

_PARENTS, _ROUNDS = 8, 2
"""The most promising plans near which more are drawn, and how often."""

_SOLVED = 6
"""Number of knapsacks among the proposals of a pick: each takes 20 ms with 12 groups."""

_ATTEMPTS = 8

_ENOUGH = 8
"""Number of plans that must have been scored before the model is used."""


class NearBest:
    """Draws plans near a given one and returns them one by one.

    The model learns from all plans scored on the current weights (including partial plans and single groups) and, if
    weights change, from the candidates of earlier epochs, with the epoch as an additional input. It learns logarithms
    of rewards, in which the groups' losses roughly add up; the sum of their measured effects is its trend. The most
    promising plans are varied again, twice. If each price is a call of a user's function, many proposals are too
    expensive: the plans are then drawn at random.

    Args:
        run: Session with the scored plans.
        allocator: Solves knapsacks.
        sensitivity: What is known of each group alone: with it, knapsacks of changed values are among the proposals.
        spread: Standard deviation of the changes to the logarithm of ratios.
        proposals: Number of plans drawn for the model to pick from; 1 disables the model.
        land: Maps widths (G,) to the plan that is actually scored; None for the widths themselves.
    """

    def __init__(
        self,
        run: SearchSession,
        allocator: Allocator,
        sensitivity: Sensitivity,
        spread: float,
        proposals: int,
        land: Callable[[Widths], Widths] | None = None,
    ) -> None:
        self._run, self._env, self._spread = run, run.env, spread
        self._allocator, self._sensitivity = allocator, sensitivity
        self._changes: dict[tuple[int, ...], list[float]] = {}  # of the values whose knapsacks were picked
        self._centre = [0.0] * len(run.env.bounds.dense)
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
        plans, epochs = self._learned()
        if not len(plans):
            return []
        epoch, trend = self._run.place.epoch, self._sensitivity.sum
        kept = plans[(epochs == epoch) & self._env.bounds.feasible(plans)]  # what there is to improve on
        best = float(self._expected(kept).max()) if len(kept) else None
        solved = self._knapsacks(widths)
        near = near_rows(self._env, widths[None], self._generator, self._spread, self._proposals)
        rows = self._new(np.vstack([near, *([key] for key in solved)]))
        for _ in range(_ROUNDS if len(rows) else 0):
            parents = rows[self._model.rank(self._inputs(rows, epoch), trend(rows), best)[:_PARENTS]]
            number = self._proposals // len(parents)
            drawn = near_rows(self._env, parents, self._generator, self._spread / 2, number)
            rows = self._new(np.unique(np.vstack([rows, drawn]), axis=0))
        picked = self._model.pick(self._inputs(rows, epoch), trend(rows), best, PICKED)
        landed = {tuple(self._landed(grown(self._env, rows[i])).tolist()): tuple(rows[i].tolist()) for i in picked}
        self._changes |= {plan: solved[row] for plan, row in landed.items() if row in solved}
        return [list(widths) for widths in landed if not self._env.known(widths)]

    def expected(self, widths: Widths) -> NDArray[np.float64]:
        """Return the logarithms of the expected rewards of plans (N, G), as the model has learned; 0 if there is none.

        A score is noisy: of the best of many, chance is a part. What similar plans have earned tells it apart.
        """
        learned = self._proposals > 1 and len(self._learned()[0])
        return self._expected(widths) if learned else np.zeros(len(widths))

    def _learned(self) -> tuple[Any, Any]:
        """Learn from all scored plans; return their widths (N, G) and epochs (N,), none if these are too few."""
        plans, epochs, rewards = self._scored()
        if len(rewards) < _ENOUGH:
            return plans[:0], epochs[:0]
        trend = self._sensitivity.sum(plans)
        self._model.learn(self._inputs(plans, epochs), trend, rewards, kind=self._run.place.epoch)
        return plans, epochs

    def _expected(self, widths: Widths) -> NDArray[np.float64]:
        inputs = self._inputs(widths, self._run.place.epoch)
        return np.asarray(self._model.expected(inputs, self._sensitivity.sum(widths)))

    def _knapsacks(self, widths: Widths) -> dict[tuple[int, ...], list[float]]:
        """Return optima of randomly changed values of the groups, and the logarithms of the changes.

        The changes are around those of the best plan that is such an optimum.
        """
        if not self._sensitivity.complete:
            return {}
        self._centre = self._changes.get(tuple(widths.tolist()), self._centre)
        values, found = self._sensitivity.values(), dict[tuple[int, ...], list[float]]()
        for _ in range(_SOLVED):
            spread = self._generator.uniform(0.1, 0.8)
            change = np.array(self._centre) + spread * self._generator.standard_normal(len(widths))
            plan = self._allocator.solve([value * np.exp(by) for value, by in zip(values, change, strict=True)])
            found[tuple(plan.tolist())] = change.tolist()
        return found

    def _new(self, rows: Widths) -> Widths:
        return rows[[not self._env.known(row) for row in rows]]

    def _landed(self, widths: Widths) -> Widths:
        return widths if self._land is None else self._land(widths)

    def _scored(self) -> tuple[Any, Any, Any]:
        """Return widths (N, G), epochs (N,) and logarithms of rewards (N,) of scored plans.

        Of those on other weights only full candidates.
        """
        epoch = self._run.place.epoch
        found = {
            (c.epoch, c.widths): c.reward for c in self._run.candidates if c.epoch != epoch and not c.given_up
        }
        found |= {(epoch, widths): reward for widths, reward in self._env.rewards().items()}
        epochs = np.array([epoch for epoch, _ in found])
        rewards = np.log(np.maximum(list(found.values()), _LEAST))
        return np.array([widths for _, widths in found]), epochs, rewards

    def _inputs(self, widths: Any, epochs: Any) -> Any:
        """Return inputs (N, G + 1): logarithms of kept shares, and the epoch relative to those of the search.

        A removed block is an input of -1.
        """
        last, groups = max(1, self._run.agent.schedule.total), self._env.bounds.groups
        shares = widths / self._env.bounds.dense
        shares = np.column_stack([np.log(shares[:, :groups]), shares[:, groups:] - 1.0])
        return np.column_stack([shares, np.full(len(widths), epochs / last)])

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
        return {
            "generator": generator,
            "picked": picked,
            "place": list(self._place),
            "changes": [[list(widths), change] for widths, change in self._changes.items()],
            "centre": list(self._centre),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._generator.bit_generator.state = json.loads(state["generator"])
        self._picked, self._place = [list(each) for each in state["picked"]], list(state["place"])
        self._changes = {tuple(widths): list(change) for widths, change in state["changes"]}
        self._centre = list(state["centre"])
