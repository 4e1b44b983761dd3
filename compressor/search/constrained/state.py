"""State of the constrained agent: the shape of a group's layer, and what was removed so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.running_mean_std import RunningMeanStd

if TYPE_CHECKING:
    from compressor.search.environment import PruningEnv

_CLIP = 5.0


class States:
    """The paper's state, with running normalization (arXiv 2110.08558).

    Index, channels in and out, kernel (2), stride (2) and padding (2) of the first layer whose outputs the group
    holds, and the sum of the past actions if an action is a ratio; the running mean of each is subtracted and the
    result divided by its running standard deviation. Not normalized, and not from the paper: one number for each group,
    1 for the current group.

    Args:
        env: Environment with the groups.
        past: Whether the sum of past actions is part of the state.
        one_hot: Whether the groups' own numbers are.
    """

    def __init__(self, env: PruningEnv, *, past: bool, one_hot: bool) -> None:
        dense = env.bounds.dense
        self._described = np.array([_described(env, group) for group in range(len(dense))], dtype=np.float64)
        self._past, self._own = past, np.eye(len(dense)) if one_hot else np.zeros((len(dense), 0))
        self._running = RunningMeanStd(epsilon=1e-4, shape=(self._described.shape[1] + past,))
        self._seen: list[NDArray[np.float64]] = []
        self.size = self._described.shape[1] + past + self._own.shape[1]
        for group in range(len(dense)):  # a first estimate of the ranges: half of each group removed
            self(group, group / 2)
        self.update()

    def __call__(self, group: int, past: float) -> NDArray[np.float32]:
        """Return the state before a group, (size,); `past` is the sum of the actions so far."""
        plain = np.append(self._described[group], past) if self._past else self._described[group]
        self._seen.append(plain)
        deviation = np.sqrt(self._running.var + 1e-8)
        normal = np.clip((plain - self._running.mean) / deviation, -_CLIP, _CLIP)
        return np.concatenate([normal, self._own[group]]).astype(np.float32)

    def update(self) -> None:
        """Update the running mean and deviation with the states since the last call."""
        if self._seen:
            self._running.update(np.stack(self._seen))
            self._seen.clear()

    def state(self) -> dict[str, Any]:
        """Plain values."""
        running = self._running
        return {"mean": running.mean.tolist(), "var": running.var.tolist(), "count": float(running.count)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._running.mean, self._running.var = np.array(state["mean"]), np.array(state["var"])
        self._running.count = float(state["count"])
        self._seen.clear()


def _described(env: PruningEnv, group: int) -> list[float]:
    dense = env.bounds.dense[None]
    for layer in env.space.layers:
        if any(index == group for index, _ in layer.out_channels.terms):
            inputs = float(layer.in_channels(dense)[0])
            sizes = [*_pair(layer.kernel), *_pair(layer.stride), *_pair(layer.padding)]
            return [float(group), inputs, float(dense[0, group]), *sizes]
    return [float(group), 0.0, float(dense[0, group]), *[0.0] * 6]


def _pair(size: tuple[int, ...]) -> list[float]:
    return [float(size[0]), float(size[-1])] if size else [0.0, 0.0]
