"""The settings of the constrained method as published in arXiv 2110.08558."""

from __future__ import annotations

from compressor.search.base import Published
from compressor.search.constrained.settings import PAPER

_FEW = "a search on one machine has a hundred evaluations instead of thousands"
_SCALES = "a multiplier near 1 then weighs accuracy and cost alike from the first update on"
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
