"""Compensation in a run: which method candidates and the delivered network get, and the network before fine-tuning."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.manifest import Compensated
from compressor.core.progress import say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace
    from compressor.pruning.verdict import Compensation
    from compressor.recipe import Recipe
    from compressor.run.folder import RunFolder
    from compressor.run.job import Job


@dataclass(frozen=True)
class Methods:
    """How networks are compensated: each is "off" or a method of `compensate`.

    Attributes:
        scored: Candidates of the search.
        delivered: The network that is fine-tuned and delivered.
        note: Why nothing is compensated although the recipe leaves it to the network; empty if it is.
    """

    scored: str = "off"
    delivered: str = "off"
    note: str = ""


def methods(recipe: Recipe, space: PruningSpace, example: Tensor) -> Methods:
    """Return the methods of a recipe's `pruning.compensate`.

    By default candidates are compensated only where the network has trained weights from the beginning: weights that
    train during the search are a moving goal, with statistics that lag behind, and the data may be so small that
    fitting takes longer than scoring.

    Raises:
        CompressorError: The recipe names a method, and the network cannot be compensated.
    """
    import torch

    from compressor.pruning.compensate import compensate

    wanted = recipe.pruning.compensate
    if wanted == "off":
        return Methods()
    try:
        noise = torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(0))
        compensate(space, space.dense(), [noise])
    except CompressorError as error:
        if wanted == "auto":
            return Methods(note=f"Networks are not compensated. {error.message}")
        raise CompressorError(error.message, "Omit pruning.compensate, or set it to off.") from error
    if wanted == "auto":
        return Methods("quick" if recipe.pretrained or not recipe.epochs else "off", "layers")
    return Methods(wanted, wanted)


def compensation_of(job: Job, plan: ChannelPlan) -> Compensation | None:
    """Return the network of a plan as it is delivered without training; None if nothing is compensated."""
    from compressor.search.networks import Networks

    if job.compensation.delivered == "off":
        return None
    networks = Networks(
        job.space,
        job.data.train,
        job.compensation.delivered,
        images=job.recipe.pruning.compensation_images,
        seed=job.recipe.seed,
        device=job.torch_device,
    )
    return networks.compensation(plan)


def network_before_finetuning(run: RunFolder, job: Job, plan: ChannelPlan, *, trained: bool) -> nn.Module:
    """Return the slim network with the weights that fine-tuning starts from; its accuracy and errors are recorded.

    Args:
        run: The run.
        job: Its network, data and space.
        plan: Channels that are kept.
        trained: Whether the dense network is trained; the outputs of an untrained one are no goal.
    """
    from compressor.search.evaluate import accuracy, reestimate_batch_norm

    method = job.compensation.delivered
    if method == "off" or not trained:
        slim = job.space.apply(plan)
        if not job.recipe.epochs:  # no training will adapt the statistics
            reestimate_batch_norm(slim, job.data.train, batches=10, device=job.torch_device)
        return slim
    started = time.perf_counter()
    found = compensation_of(job, plan)
    assert found is not None
    seconds = time.perf_counter() - started
    share = accuracy(found.network, job.data.test, device=job.torch_device)
    run.note_accuracy(compensated=share)
    run.manifest.compensation = Compensated(
        method=method,
        images=found.images,
        refitted=dict(found.refitted),
        left=dict(found.left),
        error=found.error,
        error_cut=found.error_cut,
        statistics=found.statistics,
        seconds=round(seconds, 3),
    )
    run.save()
    if found.refitted:
        say(f"The compensated network's test accuracy is {share:.2%}, without training.")
    return found.network
