"""Soft actor-critic with the paper's settings, from Stable-Baselines3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger

from compressor.search.joint.replay import EpochReplay
from compressor.search.joint.settings import JointSettings

if TYPE_CHECKING:
    from compressor.search.environment import PruningEnv


class PruningSac(SAC):
    """SAC with separate learning rates of actor and critics; `train` is used, `learn` is not.

    Args:
        env: Environment, read for its spaces only.
        settings: Settings of the networks and the updates.
    """

    replay_buffer: EpochReplay

    def __init__(self, env: PruningEnv, settings: JointSettings) -> None:
        self._rates = (settings.actor_rate, settings.critic_rate)
        super().__init__(
            "MlpPolicy",
            env,
            learning_rate=settings.critic_rate,
            buffer_size=settings.replay,
            batch_size=settings.batch,
            tau=settings.tau,
            gamma=settings.gamma,
            ent_coef=settings.entropy,
            replay_buffer_class=EpochReplay,
            replay_buffer_kwargs={"whole_returns": settings.returns == "episode"},
            policy_kwargs={"net_arch": [settings.hidden, settings.hidden]},
            device="cpu",
        )
        self.set_logger(Logger(None, []))

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        for optimizer, rate in zip((self.actor.optimizer, self.critic.optimizer), self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def state(self) -> dict[str, Any]:
        """Return networks, optimizers and replay, as tensors and plain values."""
        return {
            "policy": self.policy.state_dict(),
            "actor_optimizer": self.actor.optimizer.state_dict(),
            "critic_optimizer": self.critic.optimizer.state_dict(),
            "replay": self.replay_buffer.state(),
            "updates": self._n_updates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.policy.load_state_dict(state["policy"])
        self.actor.optimizer.load_state_dict(state["actor_optimizer"])
        self.critic.optimizer.load_state_dict(state["critic_optimizer"])
        self.replay_buffer.restore(state["replay"])
        self._n_updates = int(state["updates"])
