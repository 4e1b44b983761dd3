"""What can be set on the constrained agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from compressor.core.errors import CompressorError
from compressor.search.base import check_kinds

PAPER: Mapping[str, Any] = {
    "evaluations": 3_000,
    "episodes_per_update": 24,
    "rate": 3e-4,
    "gamma": 0.99,
    "reward_lambda": 0.95,
    "cost_lambda": 1.0,
    "first_deviation": 1.0,
    "scale_rewards": False,
    "scale_costs": False,
    "one_hot": False,
    "fold": False,
    "start": "dense",
    "multiplier_rate": 3e-4,
    "finetune_iterations": (0, 32, 128),
    "shortlist": 1,
    "near_share": 0.0,
}
"""What `paper` stands for, where the defaults are others: 40,000 steps in updates of 384 are about 3,000 episodes of 13
layers and 24 to 29 of them in an update. The multiplier's rate and the first deviation are silent in the source; these
are what its other rates and Stable-Baselines3 have."""

_CHOICES = {"action": ("layer", "channel"), "start": ("dense", "uniform", "measured")}


@dataclass(frozen=True)
class ConstrainedSettings:
    """Numbers of the method (arXiv 2110.08558); defaults that are not the paper's suit hundreds of evaluations.

    Attributes:
        paper: take the paper's values for everything that is not given (`PAPER`).
        evaluations: plans that are scored, unless the limits ask for others.
        action: "layer", one ratio for each group; "channel", a mask over its channels.
        episodes_per_update: episodes that each update of the policy learns from.
        start: the plan around which the policy first acts: "dense", the "uniform" one at the budget, or that which a
            knapsack makes of "measured" effects of each group, where there are evaluations for that.
        first_deviation: standard deviation of the first actions, as a ratio of channels.
        rate, epochs, batch, clip: learning rate of Adam, passes over an update's steps, steps in a minibatch, clipping
            of the ratio of probabilities.
        target_kl: an update ends where the policy has moved so far from the one that acted.
        gamma, reward_lambda, cost_lambda: discount, and the lambdas of the two advantages.
        hidden: width of the two hidden layers of policy, critic and each cost critic.
        multiplier_rate: learning rate of the multipliers.
        scale_rewards: whether rewards have mean 0 and deviation 1 by the first update's; else they are percent.
        scale_costs: whether the policy is charged only what exceeds a budget, and the costs' advantages are divided by
            their deviation, as the reward's are.
        one_hot: whether the state says which group it is by one number each, beside the paper's description.
        fold: whether ratios beyond 0 and the cap are mirrored there instead of clipped.
        cap: ratio beyond which nothing is removed at first; it rises by 0.05 over the run, to 1 at most.
        finetune_iterations: training steps on each candidate before it is scored, in each third of the run; the final
            candidates all have those of the last third. The weights are as before afterwards.
        near_share: share of the evaluations after the start that go to plans near the best one, some after each update;
            the policy acts around the best from then on. None where channels are masked or candidates are trained:
            their worth is not that of their widths.
        near_spread: how far they lie from it; see `near_widths`.
        proposals: plans that are drawn for each of these: a model of the reward, learned from all plans scored, picks
            it (`search/reward_model.py`). 1 leaves it to chance.
        shortlist: how many of the best plans are scaled to the budget and scored again in the end.
    """

    paper: bool = False
    evaluations: int = 100
    action: Literal["layer", "channel"] = "layer"
    episodes_per_update: int = 8
    start: Literal["dense", "uniform", "measured"] = "measured"
    first_deviation: float = 0.05
    rate: float = 1e-3
    epochs: int = 10
    batch: int = 64
    clip: float = 0.2
    target_kl: float = 0.05
    gamma: float = 1.0
    reward_lambda: float = 1.0
    cost_lambda: float = 1.0
    hidden: int = 32
    multiplier_rate: float = 0.3
    scale_rewards: bool = True
    scale_costs: bool = True
    one_hot: bool = True
    fold: bool = True
    cap: float = 0.9
    finetune_iterations: tuple[int, int, int] = (0, 0, 0)
    near_share: float = 0.5
    near_spread: float = 0.3
    proposals: int = 256
    shortlist: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.finetune_iterations, list):
            object.__setattr__(self, "finetune_iterations", tuple(self.finetune_iterations))
        check_kinds(self)
        for field in fields(self):
            _check(field.name, getattr(self, field.name))


def _check(name: str, value: Any) -> None:
    """Refuse words that mean nothing, and numbers outside their range."""
    if name in _CHOICES and value not in _CHOICES[name]:
        raise CompressorError(
            f"The setting {name} is {value!r}, expected one of {', '.join(_CHOICES[name])}."
        )
    if name == "finetune_iterations":
        if len(value) != 3 or any(type(each) is not int or each < 0 for each in value):
            raise CompressorError(f"The setting {name} is {value!r}, expected three numbers of steps.")
    elif name == "near_share":
        if not 0 <= value < 1:
            raise CompressorError(f"The setting {name} is {value}, expected 0 or more and less than 1.")
    elif type(value) in (int, float) and not value > 0:
        raise CompressorError(f"The setting {name} is {value}, expected more than 0.")
    elif name in ("gamma", "reward_lambda", "cost_lambda", "cap") and value > 1:
        raise CompressorError(f"The setting {name} is {value}, expected at most 1.")
