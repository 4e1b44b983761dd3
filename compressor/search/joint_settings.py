"""Settings of the joint agent, the values that arXiv 2403.19490 has for them, and its division of the evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from compressor.recipe.schema import CONTEXT_SIZE
from compressor.search.base import LearningSettings, Published
from compressor.search.records import Limits

BLOCK = 10
"""Number of episodes between two saves, and between two updates of the policy."""

ENVIRONMENT_MODEL = "environment model"
ALIGNMENT = "alignment of the weights"


class JointSettings(LearningSettings):
    """Settings of the method; the defaults are those of arXiv 2403.19490, except where stated."""

    fill_episodes: int = Field(
        20,
        ge=1,
        description="Plans that fill the replay before the policy acts (the paper: 100, all random; 20 suits a "
        "laptop): random ones, and with a warm start knapsack plans and some near the best.",
    )
    episodes_per_epoch: int = Field(10, ge=1, description="Episodes before each joint epoch.")
    again_episodes: int = Field(6, ge=1, description="Episodes after a budget was tightened.")
    shortlist: int = Field(5, ge=1, description="Best plans that are scored again on the final weights.")
    actor_rate: float = Field(1e-4, gt=0, description="Learning rate of the actor (Adam).")
    critic_rate: float = Field(1e-3, gt=0, description="Learning rate of the critics (Adam).")
    entropy: float = Field(
        0.1,
        description="Fixed weight of the policy's entropy, against rewards scaled to a standard deviation of 1.",
    )
    tau: float = Field(0.005, gt=0, description="Share of the critics that goes into their targets at each update.")
    replay: int = Field(10_000, ge=1, description="Transitions that are kept.")
    updates_per_episode: int = Field(
        10, ge=1, description="Updates of actor and critics for each episode played."
    )
    returns: Literal["episode", "bootstrapped"] = Field(
        "episode",
        description="episode gives every transition of an episode its final reward; bootstrapped leaves it to the "
        "last one and lets the critics propagate it, as in plain SAC. With tens of episodes, the former learns "
        "and the latter does not (docs/method/agents.md).",
    )
    store_asked: bool = Field(
        True,
        description="Whether the action that the policy requested is stored beside the one that the bounds "
        "projected. With the latter alone, as in the paper, the critics never see actions beyond the bounds, and "
        "a policy that has wandered there stays.",
    )
    warm_start: bool = Field(
        True, description="Whether knapsack plans and plans near the best fill the replay, besides random ones."
    )
    scale_rewards: bool = Field(
        True, description="Whether the critics see rewards with mean 0 and deviation 1 instead of plain accuracies."
    )
    favour: Literal["best", "policy"] = Field(
        "best",
        description="Plan towards which the weights are pulled: the best scored on the current weights, or the "
        "deterministic policy's, as in the paper.",
    )
    rescore: bool = Field(
        True,
        description="Whether the best few are scored again on the final weights; else the plan with the highest "
        "reward is chosen, on whatever weights it was scored.",
    )
    decoder_updates: int = Field(
        100,
        ge=1,
        description="Updates of the environment model before each update of the policy, from the second joint "
        "round on (search.context_size is its size).",
    )
    decoder_rate: float = Field(1e-3, gt=0, description="Learning rate of the environment model.")

    def unread(self, *, environment_model: bool) -> dict[str, str]:
        """Return the settings without effect in combination with the others: name -> reason.

        Args:
            environment_model: Whether there is one that learns.
        """
        found = {}
        if self.returns == "episode":
            found["gamma"] = "returns is 'episode': every transition is drawn as if it were the last"
        if not environment_model:
            reason = "the environment model is off or idle"
            found |= dict.fromkeys(("decoder_updates", "decoder_rate"), reason)
        return found

    def scored_plans(self, most: int, *, joint_epochs: int, groups: int) -> int:
        plan = plan_episodes(self, joint_epochs, Limits(max_evaluations=most), groups)
        return min(most, plan.points * groups + plan.fill + plan.rounds * plan.per_round + plan.reserve)


PUBLISHED = (
    Published(ENVIRONMENT_MODEL, "search.context_size", 128, default=CONTEXT_SIZE, named=True),
    Published("its updates in a round", "decoder_updates", 100),
    Published("its learning rate", "decoder_rate", 1e-3),
    Published(ALIGNMENT, "search.align_weight", 1e-5, most=1e-4, named=True),
    Published("form of the alignment", "search.align", "tensor"),
    Published("training between the rounds of episodes", "", True, here=True, named=True),
    Published("episodes in a round", "episodes_per_epoch", 10),
    Published(
        "episodes near the best plan",
        "near_share",
        0.0,
        why="tens of the policy's own episodes seldom find plans as good",
    ),
    Published(
        "groups measured before the first episode",
        "warm_start",
        False,
        why="the replay starts from good plans",
    ),
    Published(
        "episodes that fill the replay", "fill_episodes", 100, why="a search of minutes has no time for more"
    ),
    Published(
        "reward of a step",
        "returns",
        "bootstrapped",
        why="tens of episodes are too few to propagate the last step's reward back through all groups",
    ),
    Published(
        "rewards standardised",
        "scale_rewards",
        False,
        mentioned=False,
        why="against scores between 0 and 1 the entropy would outweigh differences between plans",
    ),
    Published(
        "actions stored as requested, too",
        "store_asked",
        False,
        why="otherwise the critics never see actions beyond the bounds",
    ),
    Published(
        "plan that the weights are pulled towards",
        "favour",
        "policy",
        why="after tens of episodes the policy's own is seldom the best scored",
    ),
    Published(
        "best plans scored again on the final weights",
        "rescore",
        False,
        mentioned=False,
        why="the highest reward was earned on weights that have moved since",
    ),
    Published("width of the hidden layers", "hidden", 300),
    Published("learning rate of the actor", "actor_rate", 1e-4),
    Published("learning rate of the critics", "critic_rate", 1e-3),
    Published("weight of the entropy", "entropy", 0.1),
    Published("update of the target critics", "tau", 0.005),
    Published("transitions in an update", "batch", 64),
    Published("transitions kept", "replay", 10_000),
    Published(
        "ranking of the channels",
        "pruning.importance",
        "l1",
        default="reconstruction",
        why="where candidates are compensated, those channels go that the others can replace",
    ),
    Published(
        "groups that are pruned",
        "pruning.scope",
        "inner",
        why="residual-coupled channels hold much of the cost",
    ),
    Published(
        "smallest share of a group",
        "pruning.min_share",
        0.0,
        why="a group of a few channels does not recover in training",
    ),
    Published(
        "images that score a plan", "search.search_images", None, why="scoring is most of the search's time"
    ),
    Published(
        "schedule of the learning rate",
        "training.schedule",
        "step",
        why="it falls smoothly in runs of a few epochs",
    ),
    Published(
        "one schedule for search and fine-tuning",
        "training.one_schedule",
        True,
        why="few epochs of fine-tuning need a rate of their own",
    ),
    Published(
        "share of distillation in fine-tuning",
        "training.distill_weight",
        0.0,
        mentioned=False,
        why="the dense network is available as a teacher",
    ),
    Published("weights at the start", "weights", "none"),
)
"""In the order of the report. Values that the source does not state (discount, updates per episode) are left out."""


@dataclass(frozen=True)
class EpisodePlan:
    """Number of episodes in each phase.

    Attributes:
        points: Evaluations of each group alone, for the warm start.
        fill: Episodes that fill the replay.
        rounds: Rounds of joint episodes, each followed by an epoch of training if there is one.
        per_round: Episodes of a round, including the deterministic policy's.
        reserve: Evaluations reserved for the final choice.
    """

    points: int
    fill: int
    rounds: int
    per_round: int
    reserve: int

    @property
    def blocks(self) -> int:
        """Number of blocks per round; the policy learns after each, and the search can be resumed there."""
        return max(1, math.ceil((self.per_round - 1) / BLOCK))

    def block_episodes(self, block: int) -> int:
        """Return the episodes of a block, counted over all rounds; a round's last one is the deterministic policy's."""
        return min(BLOCK, self.per_round - 1 - BLOCK * (block % self.blocks))

    def ends_round(self, block: int) -> bool:
        """Return whether a block, counted over all rounds, is the last of its round."""
        return (block + 1) % self.blocks == 0


def plan_episodes(settings: JointSettings, joint_epochs: int, limits: Limits, groups: int) -> EpisodePlan:
    """Divide the evaluations between the phases.

    >>> plan_episodes(JointSettings(), 2, Limits(max_evaluations=100, use_all=True), groups=10)
    EpisodePlan(points=2, fill=20, rounds=2, per_round=25, reserve=8)
    """
    rounds = max(1, joint_epochs)
    reserve = settings.shortlist + 3
    most = limits.max_evaluations
    points = 0
    if settings.warm_start:
        points = 2 if groups <= 20 else 1
        while points and most is not None and most < 2.5 * points * groups:
            points -= 1
    if most is None:
        return EpisodePlan(points, settings.fill_episodes, rounds, settings.episodes_per_epoch, reserve)
    reserve = max(1, min(reserve, most // 4))
    rescored = rounds - 1  # the favored plan is scored again in each round, because the weights have changed
    free = max(1, most - reserve - rescored - points * groups - bool(points))
    fill = min(settings.fill_episodes, max(1, free // 3))
    per_round = max(1, (free - fill) // rounds)
    if not limits.use_all:
        per_round = min(per_round, settings.episodes_per_epoch)
    return EpisodePlan(points, fill, rounds, per_round, reserve)
