"""Settings of the constrained agent, and the values that arXiv 2110.08558 has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compressor.search.base import LearningSettings, Published

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

_Steps = Annotated[int, Field(ge=0)]


class ConstrainedSettings(LearningSettings):
    """Settings of the method (arXiv 2110.08558); defaults that differ from the paper suit hundreds of evaluations."""

    paper: bool = Field(False, description="Use the paper's values for all settings that are not given.")
    evaluations: int = Field(100, ge=1, description="Scored plans, unless the limits set another number.")
    action: Literal["layer", "channel"] = Field(
        "layer", description="layer: one ratio for each group; channel: a mask over its channels."
    )
    episodes_per_update: int = Field(8, ge=1, description="Episodes that each update of the policy learns from.")
    start: Literal["dense", "uniform", "measured"] = Field(
        "measured",
        description="Plan around which the policy acts first: the dense one, the uniform one at the budget, or "
        "the knapsack's from measured effects of each group, if there are evaluations for that.",
    )
    first_deviation: float = Field(
        0.05, gt=0, description="Standard deviation of the first actions, as a ratio of channels."
    )
    rate: float = Field(1e-3, gt=0, description="Learning rate of policy and critics (Adam).")
    epochs: int = Field(10, ge=1, description="Passes over an update's steps.")
    clip: float = Field(0.2, gt=0, description="Clipping of the ratio of probabilities.")
    target_kl: float = Field(
        0.05, gt=0, description="An update ends when the policy has moved this far from the one that acted."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    reward_lambda: float = Field(1.0, gt=0, le=1, description="Lambda of the reward's advantages.")
    cost_lambda: float = Field(1.0, gt=0, le=1, description="Lambda of the costs' advantages.")
    hidden: int = Field(32, ge=1, description="Width of the two hidden layers of policy, critic and each cost critic.")
    multiplier_rate: float = Field(0.3, gt=0, description="Learning rate of the multipliers.")
    scale_rewards: bool = Field(
        True, description="Whether rewards are standardized by those of the first update; otherwise they are percent."
    )
    scale_costs: bool = Field(
        True,
        description="Whether the policy is charged only for what exceeds a budget, and the costs' advantages are "
        "divided by their standard deviation, like the reward's.",
    )
    one_hot: bool = Field(
        True, description="Whether the state identifies the group by one number each, beside the paper's description."
    )
    fold: bool = Field(
        True, description="Whether ratios beyond 0 and the cap are mirrored there instead of clipped."
    )
    cap: float = Field(
        0.9, gt=0, le=1, description="Maximum ratio removed at first; it rises by 0.05 over the run, to 1 at most."
    )
    finetune_iterations: tuple[_Steps, _Steps, _Steps] = Field(
        (0, 0, 0),
        strict=False,
        description="Training steps on each candidate before it is scored, in each third of the run; the final "
        "candidates all have those of the last third. The weights are restored afterwards.",
    )
    near_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of the evaluations after the start for plans near the best one, some after each "
        "update; the policy then acts around the best. Not used if channels are masked or candidates are trained, "
        "because their score does not depend on their widths alone.",
    )
    shortlist: int = Field(4, ge=1, description="Best plans that are scaled to the budget and scored again at the end.")

    @property
    def removes_blocks(self) -> bool:
        return self.action == "layer" and not self.paper

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_paper(cls, values: Any) -> Any:
        return {**PAPER, **values} if isinstance(values, Mapping) and values.get("paper") is True else values


_FEW = "a search on one machine has a hundred evaluations instead of thousands"
_SCALES = "a multiplier near 1 then weighs score and cost alike from the first update on"
_WORDS = {
    "evaluations": ("plans scored", _FEW),
    "episodes_per_update": ("episodes in an update", _FEW),
    "start": ("plan that the policy first acts around", "from a good plan a hundred evaluations get further"),
    "rate": ("learning rate", "few updates have to move the policy"),
    "gamma": ("discount", "the reward comes once, and the critic has not learned by then"),
    "reward_lambda": ("lambda of the reward's advantages", "the critic has not learned by then"),
    "cost_lambda": ("lambda of the costs' advantages", ""),
    "scale_rewards": ("rewards standardised", _SCALES),
    "scale_costs": ("only the excess over a budget is charged, and standardised", _SCALES),
    "one_hot": ("the state says which group it is", "groups of the same shape may differ"),
    "fold": ("ratios beyond the limits are mirrored", "clipped ones are all equal, and give no gradient"),
    "finetune_iterations": (
        "training steps on each candidate, by thirds of the run",
        "they cost more than scoring",
    ),
    "near_share": ("evaluations near the best plan", "they find better plans than the policy's few"),
}
"""By setting of `PAPER`: its description, and why the default differs. The source does not state the other values."""

PUBLISHED = (
    Published("what is removed", "", "single weights", here="whole channels"),
    Published(
        "learning rate of the multipliers",
        "multiplier_rate",
        PAPER["multiplier_rate"],
        mentioned=False,
        why="they must converge within few steps",
    ),
    *(Published(part, name, PAPER[name], why=why) for name, (part, why) in _WORDS.items()),
    Published("passes over an update's steps", "epochs", 10),
    Published("steps in a minibatch", "batch", 64),
    Published("clipping of the ratio", "clip", 0.2),
    Published("width of the hidden layers", "hidden", 32),
    Published("cap of the ratio at first", "cap", 0.9),
)
