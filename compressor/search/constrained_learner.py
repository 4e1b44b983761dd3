"""Stable-Baselines3's PPO with cost critics, and Lagrange multipliers that rise while a cost exceeds its budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from compressor.search.constrained_settings import ConstrainedSettings


class Multipliers(nn.Module):
    """One multiplier for each budget: nu = softplus(p), initially 1, with its own optimizer.

    Args:
        number: Number of budgets.
        rate: Learning rate of Adam.
    """

    def __init__(self, number: int, rate: float) -> None:
        super().__init__()
        self._raw = nn.Parameter(torch.full((number,), math.log(math.e - 1.0)))
        self.optimizer = torch.optim.Adam([self._raw], lr=rate)

    @property
    def values(self) -> Tensor:
        """Return the multipliers, (budgets,), above 0, without gradient."""
        return torch.nn.functional.softplus(self._raw.detach())

    def step(self, costs: Sequence[float], budgets: Sequence[float]) -> None:
        """Take one step on -nu * (mean cost - budget): if the budget is exceeded, nu rises.

        Args:
            costs: Mean cost of the episodes since the last step, one for each budget.
            budgets: Limits in the same unit.
        """
        excess = torch.tensor([cost - budget for cost, budget in zip(costs, budgets, strict=True)])
        self.optimizer.zero_grad()
        torch.autograd.backward(-(torch.nn.functional.softplus(self._raw) * excess).sum())
        self.optimizer.step()


def lagrangian_loss(
    ratio: Tensor, advantages: Tensor, cost_advantages: Tensor, multipliers: Tensor, clip: float
) -> Tensor:
    """Return the policy's loss: mean of (-min(r A, clip(r) A) + sum of nu r A_C) / (1 + sum of nu).

    Args:
        ratio: (N,), probability of each action now over its probability when it was taken.
        advantages: (N,), of the reward.
        cost_advantages: (N, budgets), of the costs.
        multipliers: (budgets,).
        clip: Clipping of the ratio, 0.2 for [0.8, 1.2]; the costs' part is not clipped.
    """
    clipped = torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    gain = torch.min(ratio * advantages, clipped * advantages)
    loss = -gain + ratio * (cost_advantages @ multipliers)
    return loss.mean() / (1.0 + multipliers.sum())


class Step(NamedTuple):
    """Outputs of the policy and the critics for one state.

    Attributes:
        action: (actions,), not clipped.
        value: Expected return of the reward, (1,).
        cost_values: Expected returns of the costs, (budgets,).
        log_prob: Log probability of the action, (1,).
    """

    action: NDArray[np.float32]
    value: Tensor
    cost_values: Tensor
    log_prob: Tensor


class CostSamples(NamedTuple):
    """A minibatch: PPO's fields, and the same for the costs, (N, budgets) each."""

    observations: Tensor
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    cost_advantages: Tensor
    cost_returns: Tensor


class CostRolloutBuffer(RolloutBuffer):
    """A rollout buffer with costs beside the reward; each cost has a buffer of its own, as that buffer's "reward".

    Args:
        budgets: Number of costs.
        cost_lambda: Lambda of their advantages.
    """

    def __init__(self, *args: Any, budgets: int, cost_lambda: float, **options: Any) -> None:
        self.costs = [RolloutBuffer(*args, **{**options, "gae_lambda": cost_lambda}) for _ in range(budgets)]
        super().__init__(*args, **options)

    def reset(self) -> None:
        super().reset()
        for buffer in self.costs:
            buffer.reset()

    def add_with_costs(
        self,
        observation: NDArray[np.float32],
        step: Step,
        reward: float,
        costs: NDArray[np.float64],
        first: bool,
    ) -> None:
        """Store one step; `costs` (budgets,) are the costs of this step."""
        start = np.array([first])
        self.add(observation, step.action, np.array([reward]), start, step.value, step.log_prob)
        for buffer, cost, value in zip(self.costs, costs, step.cost_values, strict=True):
            buffer.add(observation, step.action, np.array([cost]), start, value, step.log_prob)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[Any]) -> None:
        """Compute the advantages of the reward and the costs; the buffer must end with the end of an episode."""
        super().compute_returns_and_advantage(last_values, dones)
        for buffer in self.costs:
            buffer.compute_returns_and_advantage(last_values, dones)

    def _get_samples(self, batch_inds: NDArray[np.int64], env: Any = None) -> CostSamples:  # type: ignore[override]
        plain = super()._get_samples(batch_inds)
        of_costs = [
            np.stack([getattr(buffer, name)[batch_inds, 0] for buffer in self.costs], axis=1)
            for name in ("advantages", "returns")
        ]
        return CostSamples(*plain[:6], *map(self.to_torch, of_costs))


class CostCritics(nn.Module):
    """One network per cost: two hidden layers, one output."""

    def __init__(self, inputs: int, budgets: int, hidden: int) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, hidden),
                nn.Tanh(),
                nn.Linear(hidden, hidden),
                nn.Tanh(),
                nn.Linear(hidden, 1),
            )
            for _ in range(budgets)
        )

    def forward(self, states: Tensor) -> Tensor:
        """(N, budgets) from (N, inputs)."""
        return torch.cat([critic(states) for critic in self.critics], dim=1)


class _Spaces(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Declares the shapes of states and actions to PPO; it is never stepped."""

    def __init__(self, inputs: int, actions: int) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (inputs,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)


class LagrangianPpo(PPO):
    """PPO whose loss weighs costs with multipliers; `act`, the buffer and `train` are used, `learn` is not.

    Args:
        inputs: Size of a state.
        actions: Size of an action.
        steps: Steps of a rollout; whole episodes.
        budgets: Number of costs.
        settings: Settings of the method.
    """

    rollout_buffer: CostRolloutBuffer

    def __init__(
        self, inputs: int, actions: int, steps: int, budgets: int, settings: ConstrainedSettings
    ) -> None:
        self.settings = settings
        super().__init__(
            "MlpPolicy",
            _Spaces(inputs, actions),
            learning_rate=settings.rate,
            n_steps=steps,
            batch_size=steps,
            normalize_advantage=False,  # `train` does it; PPO would reject it for a rollout of one step
            n_epochs=settings.epochs,
            gamma=settings.gamma,
            gae_lambda=settings.reward_lambda,
            clip_range=settings.clip,
            target_kl=settings.target_kl,
            rollout_buffer_class=CostRolloutBuffer,
            rollout_buffer_kwargs={"budgets": budgets, "cost_lambda": settings.cost_lambda},
            policy_kwargs={
                "net_arch": [settings.hidden, settings.hidden],
                "log_std_init": float(np.log(settings.first_deviation)),
            },
            device="cpu",
        )
        # Not passed to PPO, which would warn about a smaller last minibatch.
        self.batch_size = minibatch_size(steps, settings.batch)
        self.set_logger(Logger(None, []))
        self.cost_critics = CostCritics(inputs, budgets, settings.hidden)
        self._cost_optimizer = torch.optim.Adam(self.cost_critics.parameters(), lr=settings.rate)
        self.multipliers = Multipliers(budgets, settings.multiplier_rate)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        own = ["cost_critics", "_cost_optimizer", "multipliers", "multipliers.optimizer"]
        return [*names, *own], variables

    def act(self, state: NDArray[np.float32], deterministic: bool = False) -> Step:
        """Return an action for a state (inputs,)."""
        states = torch.from_numpy(state)[None]
        with torch.no_grad():
            action, value, log_prob = self.policy(states, deterministic=deterministic)
            return Step(action.numpy()[0], value[0], self.cost_critics(states)[0], log_prob)

    def train(self) -> None:
        """Learn from the full rollout buffer like PPO, with the costs in the policy's loss."""
        self.policy.set_training_mode(True)
        nu = self.multipliers.values
        near = True
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                assert isinstance(batch, CostSamples)
                values, log_prob, _ = self.policy.evaluate_actions(batch.observations, batch.actions)
                log_ratio = log_prob - batch.old_log_prob
                ratio = torch.exp(log_ratio)
                near = float(((ratio - 1) - log_ratio).detach().mean()) <= 1.5 * self.settings.target_kl
                if not near:
                    break
                costs = centred(batch.cost_advantages, scale=self.settings.scale_costs)
                loss = lagrangian_loss(
                    ratio, centred(batch.advantages, scale=True), costs, nu, self.settings.clip
                )
                loss = loss + self.vf_coef * nn.functional.mse_loss(values.flatten(), batch.returns)
                _descend(self.policy.optimizer, loss, self.max_grad_norm)
                predicted = self.cost_critics(batch.observations)
                _descend(self._cost_optimizer, nn.functional.mse_loss(predicted, batch.cost_returns), None)
            self._n_updates += 1
            if not near:
                break

    def state(self) -> dict[str, Any]:
        """Return networks, optimizers and multipliers, as tensors and plain values."""
        return {"parameters": self.get_parameters(), "updates": self._n_updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.set_parameters(state["parameters"], device="cpu")
        self._n_updates = int(state["updates"])


def minibatch_size(steps: int, most: int) -> int:
    """Return the minibatch size: the largest allowed divisor of a rollout's steps.

    If there is none, as for a prime, the minibatches are equal except for the last.

    >>> [minibatch_size(steps, 64) for steps in (1, 48, 104, 67)]
    [1, 48, 52, 34]
    """
    size = max(size for size in range(1, min(most, steps) + 1) if steps % size == 0)
    return size if size > 1 else -(-steps // -(-steps // most))


def centred(advantages: Tensor, *, scale: bool) -> Tensor:
    """Return advantages (N, ...) with mean 0 over the steps and, with `scale`, standard deviation 1."""
    if len(advantages) < 2:
        return advantages
    moved = advantages - advantages.mean(dim=0)
    return moved / (advantages.std(dim=0) + 1e-8) if scale else moved


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, most: float | None) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    if most is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], most)
    optimizer.step()
