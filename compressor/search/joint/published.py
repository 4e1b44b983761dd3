"""The settings of the joint method as published in arXiv 2403.19490."""

from __future__ import annotations

from compressor.recipe.schema import CONTEXT_SIZE
from compressor.search.base import Published
from compressor.search.joint.settings import ENVIRONMENT_MODEL

ALIGNMENT = "alignment of the weights"

PUBLISHED = (
    Published(ENVIRONMENT_MODEL, "search.context_size", 128, default=CONTEXT_SIZE, named=True),
    Published("its updates in a round", "decoder_updates", 100),
    Published("its learning rate", "decoder_rate", 1e-3),
    Published(ALIGNMENT, "search.align_weight", 1e-5, most=1e-4, named=True),
    Published("form of the alignment", "search.align", "tensor"),
    Published("training between the rounds of episodes", "joint_training", True, named=True),
    Published("what decides the plans", "proposer", "learned"),
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
        why="against accuracies between 0 and 1 the entropy would outweigh differences between plans",
    ),
    Published(
        "actions stored as asked, too",
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
    Published("ranking of the channels", "pruning.importance", "l1"),
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
"""In the order of the page. Values that the source does not state (discount, updates per episode) are left out."""
