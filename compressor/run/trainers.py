"""Training settings of a run's networks: epochs, learning rates and teacher, as its recipe says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from compressor.run.job import Job
    from compressor.training.loop import BriefTraining, Trainer
    from compressor.training.settings import TrainSettings


def search_epochs(job: Job) -> int:
    """Return the epochs of the dense weights; the slim network has the remaining ones, at least one."""
    from compressor.search.schedule import epochs_in_search

    return epochs_in_search(int(job.recipe.epochs or 0), float(job.recipe.search.epochs_share or 0))


def brief_training(job: Job) -> BriefTraining:
    """Return a trainer of a few steps at fine-tuning's learning rate, for candidates before they are scored."""
    from compressor.training.loop import BriefTraining

    settings = train_settings(job, job.recipe.training.finetune_learning_rate)
    return BriefTraining(
        job.data,
        settings,
        seed=job.recipe.seed,
        device=job.torch_device,
        rate_field=_rate_field(job, finetuning=True),
    )


def _rate_field(job: Job, *, finetuning: bool) -> str:
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
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        ema_decay=training.ema_decay,
        mixed_precision="no" if training.mixed_precision == "auto" else training.mixed_precision,
    )


def trainer(
    job: Job, model: nn.Module, epochs: int, *, rate: float | None = None, teach: bool = False
) -> Trainer:
    """Create the trainer of `model` on the job's data, as its recipe says.

    Args:
        job: Job with training split, batch size, precision and seed.
        model: Network, trained in place.
        epochs: Number of epochs over which the learning rate falls.
        rate: Highest learning rate of fine-tuning; None during the search, for the recipe's own.
        teach: Whether the dense network is the teacher, weighted by the recipe's `distill_weight`.
    """
    from compressor.training.loop import Trainer

    training, settings = job.recipe.training, train_settings(job, rate)
    teacher = (job.teacher or job.model) if teach and training.distill_weight else None
    return Trainer(
        model,
        job.data,
        settings,
        epochs=epochs,
        seed=job.recipe.seed,
        device=job.torch_device,
        teacher=teacher,
        distill_weight=training.distill_weight,
        span=(search_epochs(job) if rate else 0, int(job.recipe.epochs or 0))
        if training.one_schedule
        else None,
        rate_field=_rate_field(job, finetuning=rate is not None),
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
