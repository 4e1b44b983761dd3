"""Settings of the joint agent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from compressor.core.errors import CompressorError
from compressor.search.base import check_kinds
from compressor.search.candidate import Limits

_CHOICES = {
    "returns": ("episode", "bootstrapped"),
    "favour": ("best", "policy"),
    "proposer": ("learned", "random", "uniform"),
}
BLOCK = 10
"""Number of episodes between two saves, and between two updates of the policy."""

ENVIRONMENT_MODEL = "environment model"
LEARNED = ("updates", "weights", "first_error", "last_error")
"""Records of its learning; see `Learner.learned`."""


@dataclass(frozen=True)
class JointSettings:
    """Settings of the method; the defaults are those of arXiv 2403.19490, except where stated.

    Attributes:
        fill_episodes: plans that fill the replay before the policy acts (the paper: 100, all random; 20 suits a
            laptop): random ones, and with a warm start knapsack plans and some near the best.
        episodes_per_epoch: episodes before each joint epoch.
        again_episodes: episodes after a budget was tightened.
        shortlist: how many of the best plans are scored again on the final weights.
        hidden: width of the two hidden layers of actor and critics.
        actor_rate, critic_rate: learning rates of Adam.
        entropy: fixed weight of the policy's entropy, against rewards scaled to a standard deviation of 1.
        tau: share of the critics that goes into their targets at each update.
        gamma: discount; the paper is silent. 1 suits a reward that comes once, at the end.
        batch: transitions in an update.
        replay: transitions that are kept.
        updates_per_episode: updates of actor and critics for each episode played.
        returns: "episode" gives every transition of an episode its final reward; "bootstrapped" leaves it to
            the last one and has the critics carry it back, as in plain SAC. With tens of episodes, the former
            learns and the latter does not (docs/method/agents.md).
        store_asked: whether the action that the policy asked for is stored beside the one that the bounds
            made of it. With the latter alone, as in the paper, the critics never hear of actions beyond the
            bounds, and a policy that has wandered there stays.
        near_share: share of the joint episodes that vary the best plan of the moment instead of following the policy;
            0 is the paper's way.
        near_spread: how far they vary it; see `near_widths`.
        proposals: variations that are drawn for each one played: a model of the reward, learned from all plans scored,
            picks it (`search/reward_model.py`). 1 leaves it to chance.
        warm_start: whether the replay is filled with knapsack plans and plans near the best, besides random
            ones.
        scale_rewards: Whether the critics see rewards with mean 0 and deviation 1 instead of plain accuracies.
        favour: Plan towards which the weights are pulled: the "best" scored on the current weights, or the
            deterministic "policy"'s, as in the paper.
        rescore: Whether the best few are scored again on the final weights; otherwise the plan with the highest
            reward is chosen, on whatever weights it was scored.
        joint_training: Whether the epochs of the joint and the aligned phase come between the rounds of episodes;
            otherwise all of them come first, without alignment, and the weights stay fixed during the episodes.
        proposer: What the episodes follow: the "learned" policy, the same number of "random" plans at the budget, or
            the "uniform" plan alone. The latter two change nothing else, and serve as baselines.
        decoder_updates: Updates of the environment model before each update of the policy, from the
            second joint round on (`search.context_size` is its size).
        decoder_rate: Learning rate of the environment model.
    """

    fill_episodes: int = 20
    episodes_per_epoch: int = 10
    again_episodes: int = 6
    shortlist: int = 5
    hidden: int = 300
    actor_rate: float = 1e-4
    critic_rate: float = 1e-3
    entropy: float = 0.1
    tau: float = 0.005
    gamma: float = 1.0
    batch: int = 64
    replay: int = 10_000
    updates_per_episode: int = 10
    returns: Literal["episode", "bootstrapped"] = "episode"
    store_asked: bool = True
    near_share: float = 0.75
    near_spread: float = 0.3
    proposals: int = 256
    warm_start: bool = True
    scale_rewards: bool = True
    favour: Literal["best", "policy"] = "best"
    rescore: bool = True
    joint_training: bool = True
    proposer: Literal["learned", "random", "uniform"] = "learned"
    decoder_updates: int = 100
    decoder_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                expected = " or ".join(map(repr, known))
                raise CompressorError(f"The setting {name} is {getattr(self, name)!r}, expected {expected}.")
        for name in (
            "fill_episodes",
            "episodes_per_epoch",
            "again_episodes",
            "shortlist",
            "batch",
            "replay",
            "hidden",
            "proposals",
            "updates_per_episode",
            "decoder_updates",
        ):
            if getattr(self, name) < 1:
                raise CompressorError(f"The setting {name} is {getattr(self, name)}, expected 1 or more.")
        for name in ("actor_rate", "critic_rate", "decoder_rate", "tau"):
            if not getattr(self, name) > 0:
                raise CompressorError(f"The setting {name} is {getattr(self, name)}, expected more than 0.")
        for name in ("near_share", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise CompressorError(f"The setting {name} is {getattr(self, name)}, expected 0 to 1.")

    def unread(self, *, environment_model: bool) -> dict[str, str]:
        """Return the settings without effect in combination with the others: name -> reason.

        Args:
            environment_model: Whether there is one that learns.
        """
        found = {}
        if self.returns == "episode":
            found["gamma"] = "returns is 'episode': every transition is drawn as if it were the last"
        if not environment_model:
            found |= dict.fromkeys(
                ("decoder_updates", "decoder_rate"), "the environment model is off or idle"
            )
        if self.proposer != "learned":
            reason = f"proposer is {self.proposer!r}: there is no policy"
            names = (
                "hidden actor_rate critic_rate entropy tau gamma batch replay updates_per_episode returns store_asked "
                "scale_rewards near_share near_spread proposals decoder_updates decoder_rate"
            )
            found |= dict.fromkeys(names.split(), reason)
        return found

    @property
    def measures_groups(self) -> bool:
        """Whether the replay starts from the groups' measured effects and from plans based on them."""
        return self.warm_start and self.proposer == "learned"


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
    fill_episodes = settings.fill_episodes
    if not settings.measures_groups:  # compared at equal cost: as many random plans instead
        fill_episodes, points = fill_episodes + points * groups, 0
    if most is None:
        return EpisodePlan(points, fill_episodes, rounds, settings.episodes_per_epoch, reserve)
    reserve = max(1, min(reserve, most // 4))
    rescored = rounds - 1  # the favored plan is scored again in each round, because the weights have changed
    free = max(1, most - reserve - rescored - points * groups - bool(points))
    fill = min(fill_episodes, max(1, free // 3 + fill_episodes - settings.fill_episodes))
    per_round = max(1, (free - fill) // rounds)
    if not limits.use_all:
        per_round = min(per_round, settings.episodes_per_epoch)
    return EpisodePlan(points, fill, rounds, per_round, reserve)
