"""Predict the reward of plans from the scored ones with a Gaussian process, and pick the next plans to score."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
