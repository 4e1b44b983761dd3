"""Divide a search's training epochs between its phases."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.core.errors import CompressorError


@dataclass(frozen=True)
class Schedule:
    """Training epochs in each phase of a search, in order; fine-tuning follows.

    Attributes:
        warmup: Epochs before the first episode; for agents that do not train while they search, all epochs.
        joint: Epochs that each follow a round of episodes, and pull the weights towards the structure favored then.
        aligned: Epochs towards the last favored structure, without further episodes.
    """

    warmup: int = 0
    joint: int = 0
    aligned: int = 0

    @property
    def total(self) -> int:
        """Number of epochs that the agent trains for."""
        return self.warmup + self.joint + self.aligned

    def all_before(self) -> Schedule:
        """Return the same epochs for an agent that searches on finished weights: all before the first episode."""
        return Schedule(warmup=self.total)


JOINT_EPOCHS_TO_LEARN = 2
"""Number of joint epochs from which rewards change: the episodes of the second round are on other weights."""


def epochs_in_search(epochs: int, share: float) -> int:
    """Return the epochs of the dense weights out of all; the slim network has the remaining ones, at least one
    of any."""
    return max(0, min(round(epochs * share), epochs - 1))


def fewest_epochs(share: float) -> int | None:
    """Return the fewest epochs of which a search trains one; None if it never does.

    >>> fewest_epochs(0.6), fewest_epochs(1 / 3), fewest_epochs(0.0)
    (2, 2, None)
    """
    if share <= 0:
        return None
    return next(epochs for epochs in range(1, int(1 / share) + 3) if epochs_in_search(epochs, share))


def epochs_until(joint: int, share: float, *, pretrained: bool) -> int | None:
    """Return the fewest epochs, search and fine-tuning together, with this many joint ones; None if there is none.

    >>> epochs_until(2, 1 / 3, pretrained=True)
    5
    >>> epochs_until(2, 0.0, pretrained=True)
    """
    if share <= 0:
        return None
    # at least 4 in 10 of the search's epochs are joint, except for the first few
    most = int(4 * (joint + 2) / share) + 4
    for epochs in range(1, most + 1):
        if share_epochs(epochs_in_search(epochs, share), pretrained=pretrained).joint >= joint:
            return epochs
    return None


def share_epochs(epochs: int, *, pretrained: bool) -> Schedule:
    """Divide the epochs of a search between its phases.

    arXiv 2403.19490 warms up for 10 of its 200 epochs and trains jointly for 70; the other 120 train the fixed
    structure, aligned and then slim, in shares that it does not state. Here a search of 140 epochs has 10, 70 and 60.
    Shorter ones keep the proportions of the latter two, but warm up for up to a sixth: rewards on weights that have
    hardly trained do not depend on the structure. Pretrained weights need no warm-up.

    >>> share_epochs(140, pretrained=False)
    Schedule(warmup=10, joint=70, aligned=60)
    >>> share_epochs(18, pretrained=False)
    Schedule(warmup=3, joint=9, aligned=6)
    >>> share_epochs(1, pretrained=True)
    Schedule(warmup=0, joint=1, aligned=0)

    Raises:
        CompressorError: `epochs` is negative.
    """
    if epochs < 0:
        raise CompressorError(
            f"The search is to train for {epochs} epochs, expected 0 or more.", "Give --epochs N."
        )
    warmup = 0 if pretrained else max(round(epochs / 14), min(10, math.ceil(epochs / 6)))
    joint = math.ceil((epochs - warmup) * 70 / 130)
    return Schedule(warmup, joint, epochs - warmup - joint)
