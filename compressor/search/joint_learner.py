"""What the joint agent learns with (arXiv 2403.19490): soft actor-critic, its replay, and a model of the reward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from compressor.core.errors import CompressorError
from compressor.search.bounds import LegalWidths
from compressor.search.environment import FEATURES, Observation, PruningEnv
from compressor.search.joint_settings import JointSettings
from compressor.search.randomness import OwnRandomness
from compressor.search.records import Episode, Policy, Transition

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
        parameters, replay = self.get_parameters(), self.replay_buffer.state()
        return {"parameters": parameters, "replay": replay, "updates": self._n_updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.set_parameters(state["parameters"], device="cpu")
        self.replay_buffer.restore(state["replay"])
        self._n_updates = int(state["updates"])


class EnvironmentModel(nn.Module):
    """Describes each epoch by a state z from which a decoder predicts rewards.

    Each epoch has a learnable embedding; a GRU runs over those of epochs 0..e, and its last output is z of epoch e. The
    decoder gets the nine numbers of an observation, the action and z, and is trained to predict the episode's reward
    (most transitions have none of their own). The GRU and the embeddings are trained by its loss alone, and its loss
    trains nothing else: the policy reads z as plain numbers.

    Args:
        size: Size of the embeddings and of z.
        hidden: Width of the decoder's two hidden layers.
        rate: Learning rate of Adam.
    """

    def __init__(self, size: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.size = size
        self.embeddings = nn.ParameterList([nn.Parameter(0.1 * torch.randn(size))])
        self.gru = nn.GRU(size, size)
        self.decoder = nn.Sequential(
            nn.Linear(len(FEATURES) + 1 + size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
        # One parameter group and one fused step: with a group per epoch the optimizer takes longer than the gradients.
        self.optimizer = torch.optim.Adam(self.parameters(), lr=rate, fused=True)

    @property
    def epochs(self) -> int:
        """Number of epochs with an embedding."""
        return len(self.embeddings)

    def reach(self, epoch: int) -> None:
        """Give every epoch up to `epoch` an embedding; a new one starts as a copy of its predecessor's."""
        while self.epochs <= epoch:
            embedding = nn.Parameter(self.embeddings[-1].detach().clone())
            self.embeddings.append(embedding)
            self.optimizer.param_groups[0]["params"].append(embedding)

    def contexts(self) -> torch.Tensor:
        """Return z of every epoch, (epochs, size), with gradients."""
        outputs: torch.Tensor = self.gru(torch.stack(list(self.embeddings))[:, None])[0]
        return outputs[:, 0]

    def plain_contexts(self) -> NDArray[np.float32]:
        """Return z of every epoch, (epochs, size), as numbers."""
        with torch.no_grad():
            array: NDArray[np.float32] = self.contexts().numpy()
        return array

    def learn(self, replay: EpochReplay, updates: int, batch: int) -> list[float]:
        """Train on transitions from the replay; return each update's mean squared error of scaled rewards."""
        losses = []
        for _ in range(updates):
            features, actions, epochs, rewards = replay.draw_returns(batch, len(FEATURES))
            z = self.contexts()[epochs]
            predicted = self.decoder(torch.cat([features, actions, z], dim=1))[:, 0]
            loss = nn.functional.mse_loss(predicted, rewards)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer, as tensors and plain values."""
        return {
            "epochs": self.epochs,
            "weights": self.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.reach(int(state["epochs"]) - 1)
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


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
        self.settings = settings
        self._env = env
        self._epoch = 0
        self.learned: dict[str, float] = {}
        self.randomness = OwnRandomness(seed)
        self.model: EnvironmentModel | None = None
        with self.randomness.active():
            self.sac = PruningSac(env, settings)
            self.generator = np.random.default_rng(np.random.randint(2**31))
            if env.context_size:
                self.model = EnvironmentModel(env.context_size, settings.hidden, settings.decoder_rate)
        self.begin_epoch(0)

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
            requested = transition.requested if self.settings.store_asked else transition.action
            for action in sorted({transition.action, requested}):
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
