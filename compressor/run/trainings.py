"""How a job's recipe trains its networks: the dense one in the search, and the slim one in fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.run.job import Job
from compressor.run.together import joining

if TYPE_CHECKING:
    from torch import nn

    from compressor.core.records import Checkpoint
    from compressor.pruning.plan import ChannelPlan
    from compressor.training.loop import BriefTraining, Trainer
    from compressor.training.settings import TrainSettings

OWN_CLIP = 1.0
"""Maximum norm of the gradients of a loss of the user's own, whose scale is not known."""


def search_epochs(job: Job) -> int:
    """Return the epochs of the dense weights; the slim network has the remaining ones, at least one."""
    from compressor.search.schedule import epochs_in_search

    return epochs_in_search(int(job.recipe.epochs or 0), float(job.recipe.search.epochs_share or 0))


def brief_training(job: Job) -> BriefTraining | None:
    """Return a trainer of a few steps at fine-tuning's learning rate, for candidates before they are scored."""
    from compressor.training.loop import BriefTraining

    if job.task.train is None:
        return None
    settings = train_settings(job, job.recipe.training.finetune_learning_rate)
    return BriefTraining(
        job.task,
        settings,
        seed=job.recipe.seed,
        device=job.torch_device,
        rate_field=rate_field(job, finetuning=True),
    )


def rate_field(job: Job, *, finetuning: bool) -> str:
    """Return the recipe field that lowers a training's learning rate."""
    own = finetuning and not job.recipe.training.one_schedule
    return "training.finetune_learning_rate" if own else "training.learning_rate"


def train_settings(job: Job, rate: float | None = None) -> TrainSettings:
    """Return the recipe's training settings; `rate` is fine-tuning's highest learning rate, None for the search's."""
    from compressor.training.settings import TrainSettings

    training = job.recipe.training
    return TrainSettings(
        batch_size=int(training.batch_size or 0),
        learning_rate=float((None if training.one_schedule else rate) or training.learning_rate or 0),
        weight_decay=float(training.weight_decay or 0),
        schedule=training.schedule,
        warmup_share=training.warmup_share,
        label_smoothing=training.label_smoothing,
        ema_decay=training.ema_decay,
        grad_clip=(OWN_CLIP if job.recipe.from_python else 0.0) if training.grad_clip is None else training.grad_clip,
        optimizer=training.optimizer,
        accumulation=training.accumulation,
        mixup=training.mixup,
        cutmix=training.cutmix,
        channels_last=training.channels_last,
        compile=training.compile,
        mixed_precision="no" if training.mixed_precision == "auto" else training.mixed_precision,
    )


def trainer(
    job: Job,
    model: nn.Module,
    epochs: int,
    *,
    rate: float | None = None,
    teacher: nn.Module | None = None,
    within: Checkpoint | None = None,
    of: str = "",
    plan: ChannelPlan | None = None,
) -> Trainer:
    """Create the trainer of `model` on the job's data, as its recipe says.

    Args:
        job: Job with task, batch size, precision and seed.
        model: Network, trained in place.
        epochs: Number of epochs over which the learning rate falls.
        rate: Highest learning rate of fine-tuning; None during the search, for the recipe's own.
        teacher: Trained dense network to distill from, weighted by the recipe's `distill_weight`; None for none.
        within: Where the state in the middle of an epoch is kept; None for nowhere.
        of: What is trained, if that can be different things.
        plan: Plan of `model`; None for the dense network.
    """
    from compressor.training.loop import Trainer
    from compressor.training.within import WithinEpoch

    training, settings = job.recipe.training, train_settings(job, rate)
    return Trainer(
        model,
        job.task,
        settings,
        epochs=epochs,
        seed=job.recipe.seed,
        device=job.torch_device,
        teacher=teacher,
        distill_weight=training.distill_weight,
        span=(search_epochs(job) if rate else 0, int(job.recipe.epochs or 0))
        if training.one_schedule
        else None,
        rate_field=rate_field(job, finetuning=rate is not None),
        within=None if within is None else WithinEpoch(within, of),
        join=joining(plan),
    )


def epoch_record(phase: str, epoch: int, stats: Any) -> dict[str, Any]:
    """Return the manifest's record of an epoch."""
    return {
        "phase": phase,
        "epoch": epoch,
        "loss": stats.loss,
        "accuracy": stats.accuracy,
        "seconds": round(stats.seconds, 3),
    }
