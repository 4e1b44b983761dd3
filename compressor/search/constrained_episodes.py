"""Episodes of the constrained agent, whatever they cost: actions, states, costs and a pass through all groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.running_mean_std import RunningMeanStd

from compressor.pruning.plan import ChannelPlan
from compressor.search.bounds import LegalWidths, Widths
from compressor.search.environment import first_layer

if TYPE_CHECKING:
    from compressor.search.constrained_learner import LagrangianPpo, Step
    from compressor.search.environment import PruningEnv
    from compressor.search.randomness import OwnRandomness
    from compressor.search.records import Candidate


Masks = list[NDArray[np.float64]]


class LayerActions:
    """One number per group: the ratio to remove, relative to the ratio of the plan around which the policy acts.

    Args:
        env: Environment with the groups.
        fold: Whether values beyond 0 and the cap are mirrored there instead of clipped. With clipping, all actions of
            a policy that has moved beyond are equal, and it learns nothing from them.
    """

    size = 1
    sums_past = True

    def __init__(self, env: PruningEnv, *, fold: bool) -> None:
        self._env, self._fold = env, fold
        self.around = np.zeros(len(env.bounds.dense))

    def centre(self, widths: Widths) -> None:
        """Act around a plan of these widths (G,): an action of 0 keeps them."""
        self.around = 1.0 - np.asarray(widths) / self._env.bounds.dense

    def ratio(self, group: int, action: NDArray[np.float32], cap: float) -> float:
        """Return the ratio that an action removes from a group, 0..cap; the plan's own ratio may be above the cap."""
        cap = max(cap, float(self.around[group]))
        wanted = float(self.around[group]) + float(action[0])
        if self._fold:
            wanted = abs(wanted) if wanted < cap else 2 * cap - wanted
        return float(np.clip(wanted, 0.0, cap))

    def width(self, group: int, ratio: float) -> int:
        """Return the legal width closest to what a ratio leaves."""
        bounds = self._env.bounds
        return LegalWidths(int(bounds.dense[group]), bounds.choices[group]).width(ratio)


class ChannelActions(LayerActions):
    """As many numbers as the widest group has channels; the first of them are a group's soft mask, 0..1.

    Around a plan, the masks are above 0.5 for the channels that it keeps, and higher for more important channels.
    """

    sums_past = False

    def __init__(self, env: PruningEnv, *, fold: bool) -> None:
        super().__init__(env, fold=fold)
        self.size = int(env.bounds.dense.max())
        # Rank of each channel in its group's order of importance.
        self._place = [np.argsort(np.argsort(-scores, kind="stable")) for scores in env.saliency()]

    def mask(self, group: int, action: NDArray[np.float32], cap: float) -> NDArray[np.float64]:
        """Return the mask (width,) of an action, raised if it would keep less than 1 - cap."""
        dense = int(self._env.bounds.dense[group])
        kept = dense * (1.0 - self.around[group])
        mask = np.clip(0.5 + (kept - 0.5 - self._place[group]) / dense + action[:dense], 0.0, 1.0)
        return np.asarray(mask + max(0.0, 1.0 - cap - float(mask.mean())) * (mask < 1.0))

    def hard(self, masks: Sequence[NDArray[np.float64]]) -> Widths:
        """Return the legal widths (G,) closest to the numbers of channels with a mask above 0.5."""
        shares = [1.0 - float((mask > 0.5).mean()) for mask in masks]
        return np.array([self.width(group, share) for group, share in enumerate(shares)], dtype=np.int64)


def plan_of_masks(names: Sequence[str], masks: Sequence[NDArray[np.float64]], widths: Widths) -> ChannelPlan:
    """Return the plan that keeps the `widths` channels with the highest masks, the first of equal ones.

    >>> dict(plan_of_masks(["a"], [np.array([0.2, 0.9, 0.6])], np.array([2])).keep)
    {'a': (1, 2)}
    """
    kept = [
        sorted(np.argsort(-mask, kind="stable")[:width].tolist())
        for mask, width in zip(masks, widths, strict=True)
    ]
    return ChannelPlan(dict(zip(names, map(tuple, kept), strict=True)))


_CLIP = 5.0


class States:
    """The paper's state, with running normalization (arXiv 2110.08558).

    Index, channels in and out, kernel (2), stride (2) and padding (2) of the first layer whose outputs the group
    holds, and the sum of the past actions if an action is a ratio; the running mean of each is subtracted and the
    result divided by its running standard deviation. Not normalized, and not from the paper: one number for each group,
    1 for the current group.

    Args:
        env: Environment with the groups.
        past: Whether the sum of past actions is part of the state.
        one_hot: Whether the groups' own numbers are.
    """

    def __init__(self, env: PruningEnv, *, past: bool, one_hot: bool) -> None:
        dense = env.bounds.dense
        self._described = np.array([_described(env, group) for group in range(len(dense))], dtype=np.float64)
        self._past, self._own = past, np.eye(len(dense)) if one_hot else np.zeros((len(dense), 0))
        self._running = RunningMeanStd(epsilon=1e-4, shape=(self._described.shape[1] + past,))
        self._seen: list[NDArray[np.float64]] = []
        self.size = self._described.shape[1] + past + self._own.shape[1]
        for group in range(len(dense)):  # a first estimate of the ranges: half of each group removed
            self(group, group / 2)
        self.update()

    def __call__(self, group: int, past: float) -> NDArray[np.float32]:
        """Return the state before a group, (size,); `past` is the sum of the actions so far."""
        plain = np.append(self._described[group], past) if self._past else self._described[group]
        self._seen.append(plain)
        deviation = np.sqrt(self._running.var + 1e-8)
        normal = np.clip((plain - self._running.mean) / deviation, -_CLIP, _CLIP)
        return np.concatenate([normal, self._own[group]]).astype(np.float32)

    def update(self) -> None:
        """Update the running mean and deviation with the states since the last call."""
        if self._seen:
            self._running.update(np.stack(self._seen))
            self._seen.clear()

    def state(self) -> dict[str, Any]:
        """Plain values."""
        running = self._running
        return {"mean": running.mean.tolist(), "var": running.var.tolist(), "count": float(running.count)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._running.mean, self._running.var = np.array(state["mean"]), np.array(state["var"])
        self._running.count = float(state["count"])
        self._seen.clear()


def _described(env: PruningEnv, group: int) -> list[float]:
    dense, layer = env.bounds.dense[None], first_layer(env.space, group)
    if layer is None:
        return [float(group), 0.0, float(dense[0, group]), *[0.0] * 6]
    inputs = float(layer.in_channels(dense)[0])
    sizes = [*_pair(layer.kernel), *_pair(layer.stride), *_pair(layer.padding)]
    return [float(group), inputs, float(dense[0, group]), *sizes]


def _pair(size: tuple[int, ...]) -> list[float]:
    return [float(size[0]), float(size[-1])] if size else [0.0, 0.0]


class Costs:
    """Costs of candidates by each budget.

    Args:
        env: Environment with the budgets and the dense network's costs.
        steps: Steps of an episode.
        excess: Whether an episode is charged only for what exceeds a budget.

    Attributes:
        budgets: Limits, in percent of the dense network's cost.
    """

    def __init__(self, env: PruningEnv, *, steps: int, excess: bool) -> None:
        self._names = [budget.name for budget in env.budgets]
        self._dense = np.array(dense_costs(env))
        self._steps, self._excess = steps, excess
        targets = np.array([float(budget.target) for budget in env.budgets])
        self.budgets: list[float] = (100.0 * targets / self._dense).tolist()

    def percent(self, candidate: Candidate) -> NDArray[np.float64]:
        """Return the percentage of the dense network's cost, (budgets,)."""
        return np.asarray(100.0 * np.array([candidate.costs[name] for name in self._names]) / self._dense)

    def terminal(self, candidate: Candidate) -> NDArray[np.float64]:
        """Return the cost of an episode's last step, (budgets,), from which the cost critics learn.

        The mean over the steps is the percentage kept, as in the paper. If only the excess is charged, it is in tens of
        percent, and a plan within the budget costs nothing, so that a multiplier that is still high does not drive the
        policy far below.
        """
        percent = self.percent(candidate)
        if self._excess:
            return np.asarray(np.maximum(percent - np.array(self.budgets), 0.0) / 10.0)
        return np.asarray(self._steps * percent)


def dense_costs(env: Any) -> list[float]:
    """Return the dense network's cost for each budget; the target if that cost is 0, so that shares are defined."""
    costs = env.costs(env.bounds.dense)
    return [
        costs[budget.name] if costs[budget.name] > 0 else float(budget.target) or 1.0
        for budget in env.budgets
    ]


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
