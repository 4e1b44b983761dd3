"""What a plan will earn, learned from those that were scored: a Gaussian process, and what it picks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

Inputs = NDArray[np.float64]

_FIRST, _GROWTH = 20, 1.5
"""Plans up to which the kernel is fitted whenever there are more, and by what factor they grow until it is again."""
_MOST = 500
"""Plans that are learned from: the latest."""
_WORK = 1.6e6
"""Square of the plans times the inputs, at most, of those that the kernel is fitted to, the latest: about a second."""
_STEPS = 30
"""Iterations of a fit."""


class RewardModel:
    """A Gaussian process from plans to rewards; the next plan is the one of the greatest expected improvement.

    The usual way to spend tens to hundreds of dear evaluations (Snoek et al., NeurIPS 2012, arXiv 1206.2944): a Matern
    kernel (5/2) with a length for each input, fitted by the likelihood. All that it says follows from what it was
    given last; nothing needs to be saved.
    """

    def __init__(self) -> None:
        self._inputs: Inputs = np.zeros((0, 0))
        self._rewards: Inputs = np.zeros(0)
        self._kernel: tuple[Any, Any] | None = None  # what it was fitted to, and the kernel

    def learn(self, inputs: Inputs, rewards: Inputs, kind: int) -> None:
        """Learn from all plans so far.

        Args:
            inputs: (N, inputs), in the order in which they were scored; of the same `kind` only ever continued.
            rewards: (N,).
            kind: another number where the rows are not the continuation of the last ones.
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
        """Indices of proposals (P, inputs) to be scored next, without waiting for one another's rewards.

        Each is the one of the greatest expected improvement if those picked before earn what is expected of them.

        Args:
            proposals: what there is to pick from.
            best: the reward to improve on; None stands for the highest that is expected.
            number: how many are picked, as far as there are as many.
        """
        inputs, rewards, picked = self._inputs, self._rewards, list[int]()
        while len(picked) < min(number, len(proposals)):
            mean, deviation = self._process(inputs, rewards).predict(proposals, return_std=True)
            gains = expected_improvement(mean, deviation, float(mean.max()) if best is None else best)
            gains[picked] = -1.0
            index = int(np.lexsort([mean, gains])[-1])  # by the mean where no gain is to be expected of any
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
    """How far rewards of these means and deviations (P,) are expected to exceed the best, counting 0 below it.

    >>> expected_improvement(np.array([0.6, 0.5]), np.array([1e-12, 1.0]), 0.5).round(3).tolist()
    [0.1, 0.399]
    """
    from scipy.stats import norm

    deviation = np.maximum(deviation, 1e-12)
    z = (mean - best) / deviation
    return np.asarray((mean - best) * norm.cdf(z) + deviation * norm.pdf(z))


def _fitted_kernel(inputs: Inputs, rewards: Inputs) -> Any:
    """The kernel of the greatest likelihood, from the same start each time."""
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
    with warnings.catch_warnings():  # of lengths at their bounds: inputs that hardly matter
        warnings.simplefilter("ignore")
        return (
            GaussianProcessRegressor(kernel, optimizer=descend, normalize_y=True).fit(inputs, rewards).kernel_
        )
