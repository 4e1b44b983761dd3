"""Set up the search: the environment of a job, and the evaluator that scores its plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressor.run.job import Job, reward_weights
from compressor.run.trainers import brief_training

if TYPE_CHECKING:
    from compressor.budgets.base import Budget
    from compressor.search.environment import PruningEnv
    from compressor.search.evaluate import Evaluator


def environment(
    job: Job, budgets: Sequence[Budget], *, context_size: int = 0
) -> tuple[PruningEnv, Evaluator]:
    """Create the search environment: plans of the job's network within `budgets`, scored on its search split.

    Args:
        job: Network, data and settings.
        budgets: Budgets that every plan must meet.
        context_size: Number of values that the agent adds to each observation, its `context_size`.
    """
    from compressor.search.environment import PruningEnv
    from compressor.search.evaluate import Evaluator
    from compressor.search.reward import soft_reward
    from compressor.search.sites import open_site

    recipe, settings = job.recipe, job.recipe.search
    evaluator = Evaluator(
        job.space,
        job.data,
        device=job.torch_device,
        bn_batches=int(settings.batch_norm_batches or 10),
        search_images=settings.search_images,
        mixed_precision=recipe.training.mixed_precision,
        seed=recipe.seed,
        threads=settings.threads,
        site=open_site(settings.workers, settings.threads, settings.evaluation_seconds, job.torch_device),
        brief=brief_training(job),
        brief_steps=settings.brief_iterations,
    )
    env = PruningEnv(
        job.space,
        budgets,
        evaluator,
        reward=soft_reward(reward_weights(recipe), budgets),
        importance=recipe.pruning.importance,
        context_size=context_size,
        importance_data=_importance_data(job),
    )
    return env, evaluator


def too_few_images(images: int) -> str | None:
    """Return a note if the search split is too small to compare networks: a standard error above 2 points."""
    from compressor.search.evaluate import standard_error

    error = standard_error(0.9, images)
    if error <= 0.02:
        return None
    return (
        f"The search split has {images} images: an accuracy of 90 % is known to within {error:.1%} (standard error), "
        "and networks that differ by less cannot be distinguished."
    )


def _importance_data(job: Job) -> list[tuple[Any, Any]]:
    """Return two batches of training images and labels, for criteria and values that need gradients."""
    stream = job.data.train.batches(128, shuffle_seed=job.recipe.seed, device=job.torch_device)
    return [batch for _, batch in zip(range(2), stream, strict=False)]
