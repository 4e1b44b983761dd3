"""A model of the reward while the weights train (arXiv 2403.19490)."""

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
