"""A model of the reward as it changes while the weights train (arXiv 2403.19490)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.search.observation import FEATURES

if TYPE_CHECKING:
    from compressor.search.joint.replay import EpochReplay


class EnvironmentModel(nn.Module):
    """Describes each epoch by a state z from which a decoder must be able to tell rewards.

    Each epoch has a learnable embedding; a GRU runs over those of epochs 0..e, and its last output is z of epoch e. The
    decoder gets the nine numbers of an observation, the action and z, and is trained to give the episode's reward (most
    transitions have none of their own). Its loss is the only one that reaches the GRU and the embeddings, and reaches
    nothing else: the policy reads z as plain numbers.

    Args:
        size: of the embeddings and of z.
        hidden: width of the decoder's two hidden layers.
        rate: learning rate of Adam.
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
        # One group and one fused step: with a group for each epoch the optimiser takes longer than the gradients.
        self.optimizer = torch.optim.Adam(self.parameters(), lr=rate, fused=True)

    @property
    def epochs(self) -> int:
        """How many epochs have an embedding."""
        return len(self.embeddings)

    def reach(self, epoch: int) -> None:
        """Give every epoch up to `epoch` an embedding; a new one starts as its predecessor's."""
        while self.epochs <= epoch:
            embedding = nn.Parameter(self.embeddings[-1].detach().clone())
            self.embeddings.append(embedding)
            self.optimizer.param_groups[0]["params"].append(embedding)

    def contexts(self) -> torch.Tensor:
        """z of every epoch, (epochs, size), with gradients."""
        outputs: torch.Tensor = self.gru(torch.stack(list(self.embeddings))[:, None])[0]
        return outputs[:, 0]

    def plain_contexts(self) -> NDArray[np.float32]:
        """z of every epoch, (epochs, size), as numbers."""
        with torch.no_grad():
            array: NDArray[np.float32] = self.contexts().numpy()
        return array

    def learn(self, replay: EpochReplay, updates: int, batch: int) -> list[float]:
        """Train on transitions drawn from the replay; returns each update's mean squared error of scaled rewards."""
        losses = []
        for _ in range(updates):
            features, actions, epochs, rewards = replay.draw_returns(batch, len(FEATURES))
            z = self.contexts()[epochs]
            told = self.decoder(torch.cat([features, actions, z], dim=1))[:, 0]
            loss = nn.functional.mse_loss(told, rewards)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def state(self) -> dict[str, Any]:
        """Weights and optimiser, as tensors and plain values."""
        return {
            "epochs": self.epochs,
            "weights": self.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self.reach(int(state["epochs"]) - 1)
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
