"""Settings of the constrained agent."""

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
"""Values of the setting `paper`, where the defaults differ: 40,000 steps in updates of 384 are about 3,000 episodes of
13 layers, 24 to 29 of them per update. The source does not state the multiplier's rate and the first deviation; these
follow its other rates and Stable-Baselines3."""

_CHOICES = {"action": ("layer", "channel"), "start": ("dense", "uniform", "measured")}


@dataclass(frozen=True)
class ConstrainedSettings:
    """Settings of the method (arXiv 2110.08558); defaults that differ from the paper suit hundreds of evaluations.

    Attributes:
        paper: Use the paper's values for all settings that are not given (`PAPER`).
        evaluations: Number of scored plans, unless the limits set another number.
        action: "layer", one ratio for each group; "channel", a mask over its channels.
        episodes_per_update: Episodes that each update of the policy learns from.
        start: Plan around which the policy acts first: "dense", the "uniform" one at the budget, or the knapsack's
            from "measured" effects of each group, if there are evaluations for that.
        first_deviation: Standard deviation of the first actions, as a ratio of channels.
        rate, epochs, batch, clip: Learning rate of Adam, passes over an update's steps, steps in a minibatch, clipping
            of the ratio of probabilities.
        target_kl: An update ends when the policy has moved this far from the one that acted.
        gamma, reward_lambda, cost_lambda: Discount, and the lambdas of the two advantages.
        hidden: Width of the two hidden layers of policy, critic and each cost critic.
        multiplier_rate: Learning rate of the multipliers.
        scale_rewards: Whether rewards are standardized by those of the first update; otherwise they are percent.
        scale_costs: Whether the policy is charged only for what exceeds a budget, and the costs' advantages are divided
            by their standard deviation, like the reward's.
        one_hot: Whether the state identifies the group by one number each, beside the paper's description.
        fold: Whether ratios beyond 0 and the cap are mirrored there instead of clipped.
        cap: Maximum ratio that is removed at first; it rises by 0.05 over the run, to 1 at most.
        finetune_iterations: Training steps on each candidate before it is scored, in each third of the run; the final
            candidates all have those of the last third. The weights are restored afterwards.
        near_share: Share of the evaluations after the start for plans near the best one, some after each update; the
            policy then acts around the best. Not used if channels are masked or candidates are trained, because their
            score does not depend on their widths alone.
        near_spread: Their distance from it; see `near_widths`.
        proposals: Number of plans drawn for each of these: a model of the reward, learned from all scored plans, picks
            it (`search/reward_model.py`). 1 picks at random.
        shortlist: Number of best plans that are scaled to the budget and scored again at the end.
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
    """Raise an error for an unknown choice, and for a number outside its range."""
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
