"""A double dueling deep Q-network over a handful of discrete actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.search.randomness import OwnRandomness


class Dueling(nn.Module):
    """Q(s, a) = V(s) + A(s, a) - mean A(s, .) (Wang et al., arXiv 1511.06581), two hidden layers."""

    def __init__(self, inputs: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.value, self.advantage = nn.Linear(hidden, 1), nn.Linear(hidden, actions)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        seen = self.body(states)
        advantage: torch.Tensor = self.advantage(seen)
        total: torch.Tensor = self.value(seen) + advantage - advantage.mean(dim=1, keepdim=True)
        return total


class DoubleDqn:
    """Learns Q-values from a replay; the online network chooses the next action, the target network evaluates it
    (van Hasselt et al., arXiv 1509.06461).

    Args:
        inputs: Size of a state.
        actions: Number of actions.
        hidden: Width of the two hidden layers.
        rate: Learning rate of Adam.
        gamma: Discount.
        tau: Share of the online network that goes into the target at each update.
        capacity: Maximum number of stored transitions.
        seed: Seed of the networks and of all draws.
    """

    def __init__(
        self,
        inputs: int,
        actions: int,
        *,
        hidden: int,
        rate: float,
        gamma: float,
        tau: float,
        capacity: int,
        seed: int,
    ) -> None:
        self.actions, self.gamma, self.tau = actions, gamma, tau
        self.randomness = OwnRandomness(seed)
        with self.randomness.active():
            self.online = Dueling(inputs, actions, hidden)
            self.target = Dueling(inputs, actions, hidden)
        self.target.load_state_dict(self.online.state_dict())
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=rate)
        self._memory = torch.zeros(capacity, 2 * inputs + 3)
        self._inputs, self._stored = inputs, 0

    def act(self, state: NDArray[np.float32], epsilon: float) -> int:
        """Return the best action, or with probability `epsilon` a random one."""
        with self.randomness.active(), torch.no_grad():
            if np.random.random() < epsilon:
                return int(np.random.randint(self.actions))
            return int(self.online(torch.from_numpy(state)[None]).argmax())

    def remember(
        self,
        state: NDArray[np.float32],
        action: int,
        reward: float,
        following: NDArray[np.float32],
        last: bool,
    ) -> None:
        """Store a transition; it replaces the oldest if the replay is full."""
        row = np.concatenate([state, following, [action, reward, float(last)]]).astype(np.float32)
        self._memory[self._stored % len(self._memory)] = torch.from_numpy(row)
        self._stored += 1

    def learn(self, updates: int, batch: int) -> float:
        """Train on transitions drawn at random; return the mean loss."""
        losses = []
        size, n = min(self._stored, len(self._memory)), self._inputs
        with self.randomness.active():
            for _ in range(updates):
                rows = self._memory[torch.randint(size, (batch,))]
                states, following, (actions, rewards, lasts) = (
                    rows[:, :n],
                    rows[:, n : 2 * n],
                    rows[:, 2 * n :].T,
                )
                with torch.no_grad():
                    chosen = self.online(following).argmax(dim=1, keepdim=True)
                    worth = self.target(following).gather(1, chosen)[:, 0]
                    wanted = rewards + self.gamma * (1 - lasts) * worth
                predicted = self.online(states).gather(1, actions.long()[:, None])[:, 0]
                loss = nn.functional.smooth_l1_loss(predicted, wanted)
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                with torch.no_grad():
                    for ours, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
                        ours.lerp_(theirs, self.tau)
                losses.append(float(loss.detach()))
        return sum(losses) / max(1, len(losses))

    def state(self) -> dict[str, Any]:
        """Return networks, optimizer, replay and random numbers, as tensors and plain values."""
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": self._memory[: self._stored].clone(),
            "stored": self._stored,
            "randomness": self.randomness.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._memory[: len(state["memory"])] = state["memory"]
        self._stored = int(state["stored"])
        self.randomness.restore(state["randomness"])
