"""The replay: transitions with their epoch and their episode's return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from compressor.search.candidate import Transition

_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "epochs", "returns")


class EpochReplay(ReplayBuffer):
    """Stable-Baselines3's replay, with each transition's epoch of the weights and its episode's reward.

    When transitions are drawn, the context at the end of their observations is filled in from `contexts`, which the
    owner updates with its environment model: observations of an early epoch get the current description of that epoch.
    Rewards are stored unscaled and scaled when drawn.

    Attributes:
        contexts: (epochs, context size); no rows without context.
        centre, scale: Rewards are drawn as (reward - centre) / scale.
        whole_returns: Whether every transition is drawn as if it were the last, with its episode's reward.
    """

    def __init__(self, *args: Any, whole_returns: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.whole_returns = whole_returns
        self.contexts: NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)
        self.centre, self.scale = 0.0, 1.0
        self.epochs = np.zeros((self.buffer_size, 1), dtype=np.int64)
        self.returns = np.zeros((self.buffer_size, 1), dtype=np.float32)

    def add_step(self, transition: Transition, action: float, earned: float, epoch: int) -> None:
        """Store a step: its action as the networks see it, in [-1, 1], and its episode's reward."""
        self.epochs[self.pos] = epoch
        self.returns[self.pos] = earned
        self.add(
            transition.observation[None],
            transition.following[None],
            np.array([[action]], dtype=np.float32),
            np.array([transition.reward]),
            np.array([float(transition.last)]),
            [{}],
        )

    def standardise(self) -> None:
        """Scale rewards by the mean and the standard deviation of the episodes stored so far."""
        returns = self.returns[: self.size()]
        self.centre, self.scale = float(returns.mean()), max(float(returns.std()), 1e-3)

    def _get_samples(
        self, batch_inds: NDArray[np.int64], env: VecNormalize | None = None
    ) -> ReplayBufferSamples:
        observations = self.observations[batch_inds, 0].copy()
        following = self.next_observations[batch_inds, 0].copy()
        if size := self.contexts.shape[1]:
            context = self.contexts[self.epochs[batch_inds, 0]]
            observations[:, -size:], following[:, -size:] = context, context
        dones = self.dones[batch_inds]
        scaled = (self.returns[batch_inds] - self.centre) / self.scale
        if self.whole_returns:
            dones = np.ones_like(dones)
        else:
            scaled = scaled * dones
        return ReplayBufferSamples(
            torch.from_numpy(observations),
            torch.from_numpy(self.actions[batch_inds, 0]),
            torch.from_numpy(following),
            torch.from_numpy(dones.astype(np.float32)),
            torch.from_numpy(scaled.astype(np.float32)),
        )

    def draw_returns(self, batch: int, features: int) -> tuple[torch.Tensor, ...]:
        """Draw transitions for the environment model.

        Returns:
            The first `features` numbers of the observations (batch, features), actions (batch, 1), epochs
            (batch,) and the scaled rewards of their episodes, (batch,).
        """
        drawn = np.random.randint(0, self.size(), size=batch)
        return (
            torch.from_numpy(self.observations[drawn, 0, :features]),
            torch.from_numpy(self.actions[drawn, 0]),
            torch.from_numpy(self.epochs[drawn, 0]),
            torch.from_numpy(((self.returns[drawn, 0] - self.centre) / self.scale).astype(np.float32)),
        )

    def state(self) -> dict[str, Any]:
        """Return the stored transitions, as tensors."""
        arrays = {name: torch.from_numpy(getattr(self, name)[: self.size()].copy()) for name in _ARRAYS}
        return {**arrays, "position": self.pos, "full": self.full, "centre": self.centre, "scale": self.scale}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in _ARRAYS:
            stored = state[name].numpy()
            getattr(self, name)[: len(stored)] = stored
        self.pos, self.full = int(state["position"]), bool(state["full"])
        self.centre, self.scale = float(state["centre"]), float(state["scale"])
