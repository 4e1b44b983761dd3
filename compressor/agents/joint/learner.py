"""The learning part of the joint agent: policy, replay, and the random numbers that they use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.agents.joint.settings import JointSettings
from compressor.agents.randomness import OwnRandomness
from compressor.agents.search_run import Episode, Policy
from compressor.env.bounds import LegalWidths
from compressor.env.environment import Observation, PruningEnv

if TYPE_CHECKING:
    pass


class Learner:
    """Remembers episodes and learns a policy from them.

    Args:
        env: read for its spaces.
        settings: the method's numbers.
        seed: of the networks and of all that is drawn.
    """

    def __init__(self, env: PruningEnv, settings: JointSettings, seed: int) -> None:
        from compressor.agents.joint.sac import PruningSac

        self.settings = settings
        self.randomness = OwnRandomness(seed)
        with self.randomness.active():
            self.sac = PruningSac(env, settings)
            self.generator = np.random.default_rng(np.random.randint(2**31))

    def policy(self, *, deterministic: bool = False) -> Policy:
        """The policy as it is now; the ratio that it asks for, before the bounds move it."""

        def act(observation: Observation, legal: LegalWidths) -> float:
            with self.randomness.active():
                action, _ = self.sac.predict(observation, deterministic=deterministic)
            return float(action[0])

        return act

    def remember(self, episode: Episode, epoch: int) -> None:
        """Store an episode that was scored on the weights of `epoch` (0 before any joint epoch)."""
        actions = np.array([[transition.action] for transition in episode.transitions], dtype=np.float32)
        self.sac.replay_buffer.add_episode(
            episode, self.sac.policy.scale_action(actions)[:, 0].tolist(), epoch
        )

    def learn(self, episodes: int) -> dict[str, float]:
        """Update actor and critics for so many new episodes; returns the losses."""
        updates = self.settings.updates_per_episode * episodes
        with self.randomness.active():
            self.sac.train(updates, self.settings.batch)
        values = self.sac.logger.name_to_value
        return {
            "agent/actor_loss": float(values["train/actor_loss"]),
            "agent/critic_loss": float(values["train/critic_loss"]),
        }

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        import json

        return {
            "sac": self.sac.state(),
            "randomness": self.randomness.state(),
            "generator": json.dumps(self.generator.bit_generator.state),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        import json

        self.sac.restore(state["sac"])
        self.randomness.restore(state["randomness"])
        self.generator.bit_generator.state = json.loads(state["generator"])
