"""Compensation in a run: the network before fine-tuning, and what is recorded of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from compressor.core.manifest import Compensated
from compressor.core.progress import say
from compressor.run.answers import record_slim

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.verdict import Compensation
    from compressor.run.folder import RunFolder
    from compressor.run.job import Job
    from compressor.search.networks import Networks


def compensation_of(job: Job, plan: ChannelPlan) -> Compensation | None:
    """Return the network of a plan as it is delivered without training; None if nothing is compensated."""
    networks = delivered_networks(job)
    return networks.compensation(plan) if networks.compensated else None


def delivered_networks(job: Job) -> Networks:
    """Return what builds networks as they are delivered without training."""
    from compressor.search.networks import Networks

    return Networks(
        job.space,
        job.task.calibration,
        job.compensation.delivered,
        images=job.recipe.pruning.compensation_images,
        seed=job.recipe.seed,
        device=job.torch_device,
    )


def own_statistics(job: Job, slim: nn.Module) -> None:
    """Re-estimate a sliced network's batch-norm statistics in place, if there are inputs for it."""
    from compressor.training.scoring import reestimate_batch_norm

    if job.task.calibration is not None:
        reestimate_batch_norm(slim, job.task.calibration, batches=10, device=job.torch_device)


def network_before_finetuning(run: RunFolder, job: Job, plan: ChannelPlan, *, trained: bool) -> nn.Module:
    """Return the slim network with the weights that fine-tuning starts from; its accuracy and errors are recorded.

    Args:
        run: The run.
        job: Its network, data and space.
        plan: Channels that are kept.
        trained: Whether the dense network is trained; the outputs of an untrained one are no goal.
    """
    method = job.compensation.delivered
    if method == "off" or not trained:
        slim = job.space.apply(plan)
        if not job.recipe.epochs:  # no training will adapt the statistics
            own_statistics(job, slim)
        return slim
    started = time.perf_counter()
    found = compensation_of(job, plan)
    assert found is not None
    seconds = time.perf_counter() - started
    tested = job.tested(found.network)
    run.note_accuracy(compensated=tested.score)
    if not job.recipe.epochs:  # it is the delivered network
        record_slim(run, job.task, tested)
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
        say(f"The compensated network's {job.metric} is {job.task.metric.text(tested.score)}, without training.")
    else:
        say(
            "No layer is refitted: on the images that judge, the outputs of the network that is only cut are as close "
            "to the dense network's."
        )
    return found.network
