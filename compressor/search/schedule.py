"""How the epochs that a search may train for are shared out between its phases."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.core.errors import CompressorError


@dataclass(frozen=True)
class Schedule:
    """Epochs of training in each phase of a search, in their order; fine-tuning comes after it.

    Attributes:
        warmup: before the first episode; for agents that do not train while they search, all their training.
        joint: each follows a round of episodes, and pulls the weights towards the structure favoured then.
        aligned: towards the structure favoured last, with no more episodes.
    """

    warmup: int = 0
    joint: int = 0
    aligned: int = 0

    @property
    def total(self) -> int:
        """Epochs that the agent trains for."""
        return self.warmup + self.joint + self.aligned

    def all_before(self) -> Schedule:
        """The same epochs for an agent that searches on finished weights: all before the first episode."""
        return Schedule(warmup=self.total)


JOINT_EPOCHS_TO_LEARN = 2
"""Joint epochs from which a reward can be seen to change: the episodes of the second round are on other weights."""


def epochs_in_search(epochs: int, share: float) -> int:
    """Epochs of the dense weights, of all there are; the slim network has the others, at least one."""
    return min(round(epochs * share), epochs - 1)


def epochs_until(joint: int, share: float, *, pretrained: bool) -> int | None:
    """The fewest epochs, search and fine-tuning together, of which so many are joint; None where no number will do.

    >>> epochs_until(2, 1 / 3, pretrained=True)
    5
    >>> epochs_until(2, 0.0, pretrained=True)
    """
    if share <= 0:
        return None
    most = (
        int(4 * (joint + 2) / share) + 4
    )  # at least 4 in 10 of the search's epochs are joint, but for the first few
    for epochs in range(1, most + 1):
        if share_epochs(epochs_in_search(epochs, share), pretrained=pretrained).joint >= joint:
            return epochs
    return None


def share_epochs(epochs: int, *, pretrained: bool) -> Schedule:
    """Share the epochs of a search out between its phases.

    arXiv 2403.19490 warms up for 10 of its 200 epochs and trains jointly for 70; the other 120 go to the fixed
    structure, aligned and then slim, in shares that it does not give. Here a search of 140 epochs has 10, 70 and 60.
    Shorter ones keep the proportions of the latter two, but warm up for up to a sixth: rewards on weights that have
    hardly trained say nothing of the structure. Pretrained weights need no warm-up.

    >>> share_epochs(140, pretrained=False)
    Schedule(warmup=10, joint=70, aligned=60)
    >>> share_epochs(18, pretrained=False)
    Schedule(warmup=3, joint=8, aligned=7)
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
