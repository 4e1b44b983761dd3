"""The learning part of the joint agent: policy, replay, and their random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.search.bounds import LegalWidths
from compressor.search.candidate import Episode, Policy
from compressor.search.environment import Observation, PruningEnv
from compressor.search.joint.settings import JointSettings
from compressor.search.randomness import OwnRandomness

if TYPE_CHECKING:
    from compressor.search.joint.environment_model import EnvironmentModel

_Z_SHOWN = 8
"""Number of components of z that get a curve."""


class Learner:
    """Stores episodes and learns a policy from them.

    Args:
        env: Environment, read for its spaces.
        settings: Settings of the method.
        seed: Seed of the networks and of all draws.

    Attributes:
        learned: Progress of the environment model: `updates`, `weights` (number of different weights with rewards),
            `first_error` and `last_error` (mean squared, of scaled rewards); empty before its first update.
    """

    def __init__(self, env: PruningEnv, settings: JointSettings, seed: int) -> None:
        from compressor.search.joint.sac import PruningSac

        self.settings = settings
        self._env = env
        self._epoch = 0
        self.learned: dict[str, float] = {}
        self.randomness = OwnRandomness(seed)
        with self.randomness.active():
            self.sac = PruningSac(env, settings)
            self.generator = np.random.default_rng(np.random.randint(2**31))
            self.model = self._environment_model()
        self.begin_epoch(0)

    def _environment_model(self) -> EnvironmentModel | None:
        if not self._env.context_size:
            return None
        from compressor.search.joint.environment_model import EnvironmentModel

        return EnvironmentModel(self._env.context_size, self.settings.hidden, self.settings.decoder_rate)

    def begin_epoch(self, epoch: int) -> None:
        """Play episodes on the weights of `epoch` from now on: pass its z to the policy."""
        self._epoch = epoch
        if self.model is not None:
            self.model.reach(epoch)
            self._show()

    def _show(self) -> None:
        """Update the z of all epochs with the current model: in the replay, and for the next episodes."""
        if self.model is not None:
            self.sac.replay_buffer.contexts = self.model.plain_contexts()
            self._env.context = self.sac.replay_buffer.contexts[self._epoch]

    def _note(self, errors: list[float]) -> None:
        """Record the environment model's error in its first updates and in the last ones."""
        few = max(1, len(errors) // 10)
        learned = self.learned
        learned.setdefault("first_error", sum(errors[:few]) / few)
        learned["last_error"] = sum(errors[-few:]) / few
        learned["updates"] = learned.get("updates", 0) + len(errors)
        learned["weights"] = self._epoch + 1

    def policy(self, *, deterministic: bool = False) -> Policy:
        """Return the current policy, which gives the requested ratio before the bounds clip it."""

        def act(observation: Observation, legal: LegalWidths) -> float:
            with self.randomness.active():
                action, _ = self.sac.predict(observation, deterministic=deterministic)
            return float(action[0])

        return act

    def remember(self, episode: Episode) -> None:
        """Store an episode that was played on the weights of the current epoch."""
        for transition in episode.transitions:
            actions = {
                transition.action,
                transition.asked if self.settings.store_asked else transition.action,
            }
            for action in sorted(actions):
                scaled = float(self.sac.policy.scale_action(np.array([action], dtype=np.float32))[0])
                self.sac.replay_buffer.add_step(transition, scaled, episode.candidate.reward, self._epoch)

    def learn(self, episodes: int) -> dict[str, float]:
        """Update environment model, actor and critics for this number of new episodes; return the losses."""
        losses: dict[str, float] = {}
        updates = self.settings.updates_per_episode * episodes
        with self.randomness.active():
            if self.model is not None and self.model.epochs > 1:  # a single epoch has no differences to learn
                decoder_updates, batch = self.settings.decoder_updates, self.settings.batch
                errors = self.model.learn(self.sac.replay_buffer, decoder_updates, batch)
                losses["agent/decoder_loss"] = sum(errors) / len(errors)
                self._note(errors)
                self._show()
                z = self.sac.replay_buffer.contexts
                losses["agent/z_norm"] = float(np.linalg.norm(z[self._epoch]))
                losses["agent/z_change"] = float(np.linalg.norm(z[self._epoch] - z[self._epoch - 1]))
                losses |= {f"z/{i}": float(number) for i, number in enumerate(z[self._epoch][:_Z_SHOWN])}
            self.sac.train(updates, self.settings.batch)
        values = self.sac.logger.name_to_value
        return {
            **losses,
            "agent/actor_loss": float(values["train/actor_loss"]),
            "agent/critic_loss": float(values["train/critic_loss"]),
        }

    def state(self) -> dict[str, Any]:
        """Return the complete state, as tensors and plain values."""
        return {
            "sac": self.sac.state(),
            "model": None if self.model is None else self.model.state(),
            "epoch": self._epoch,
            "learned": dict(self.learned),
            "randomness": self.randomness.state(),
            "generator": json.dumps(self.generator.bit_generator.state),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            CompressorError: It was written with an environment model of another size, or without one.
        """
        stored = 0 if state["model"] is None else int(state["model"]["weights"]["gru.weight_hh_l0"].shape[1])
        if stored != self._env.context_size:
            raise CompressorError(
                f"The search's state has a context of {stored} numbers, the environment one of "
                f"{self._env.context_size}.",
                "Continue with the original settings, or delete it.",
            )
        if self.model is not None:
            self.model.restore(state["model"])
        self.sac.restore(state["sac"])
        self.randomness.restore(state["randomness"])
        self.generator.bit_generator.state = json.loads(state["generator"])
        self._epoch, self.learned = int(state["epoch"]), dict(state["learned"])
        self._show()
