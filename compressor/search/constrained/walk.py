"""One episode of the constrained agent: a pass of the policy through all groups, whatever it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.search.constrained.actions import ChannelActions, LayerActions, Masks

if TYPE_CHECKING:
    from compressor.search.constrained.ppo import LagrangianPpo, Step
    from compressor.search.constrained.state import States
    from compressor.search.randomness import OwnRandomness


@dataclass
class Walk:
    """A state and a step for each group, and their result."""

    states: list[NDArray[np.float32]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    masks: Masks = field(default_factory=list)


class Walker:
    """Goes through all groups with the current policy; the result need not meet the budgets.

    Args:
        actions: Meaning of an action.
        states: Observations of the policy.
        ppo: Policy.
        randomness: Random numbers for its draws.
    """

    def __init__(
        self, actions: LayerActions, states: States, ppo: LagrangianPpo, randomness: OwnRandomness
    ) -> None:
        self._actions, self._states, self._ppo, self._randomness = actions, states, ppo, randomness

    def __call__(self, cap: float, deterministic: bool = False) -> Walk:
        """Play an episode that removes at most the ratio `cap` of each group."""
        walk, past = Walk(), 0.0
        for group in range(len(self._actions.around)):
            state = self._states(group, past)
            with self._randomness.active():
                step = self._ppo.act(state, deterministic)
            if isinstance(self._actions, ChannelActions):
                walk.masks.append(self._actions.mask(group, step.action, cap))
                ratio = 1.0 - float(walk.masks[-1].mean())
            else:
                ratio = self._actions.ratio(group, step.action, cap)
            walk.states.append(state)
            walk.steps.append(step)
            walk.widths.append(self._actions.width(group, ratio))
            past += ratio
        return walk
