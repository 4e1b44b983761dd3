"""What trains the networks of a run, by its recipe: for how long, at which rate, taught by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from compressor.run.job import Job
    from compressor.training.brief import BriefTraining
    from compressor.training.loop import Trainer
    from compressor.training.settings import TrainSettings


def search_epochs(job: Job) -> int:
    """Epochs of the dense weights; the slim network has the others, at least one."""
    from compressor.search.schedule import epochs_in_search

    return epochs_in_search(int(job.recipe.epochs or 0), float(job.recipe.search.epochs_share or 0))


def brief_training(job: Job) -> BriefTraining:
    """A few steps of training at fine-tuning's learning rate, for candidates that are scored after them."""
    from compressor.training.brief import BriefTraining

    settings = train_settings(job, job.recipe.training.finetune_learning_rate)
    return BriefTraining(
        job.data,
        settings,
        seed=job.recipe.seed,
        device=job.torch_device,
        rate_field=_rate_field(job, finetuning=True),
    )


def _rate_field(job: Job, *, finetuning: bool) -> str:
    """The field of the recipe by which a training's learning rate can be lowered."""
    own = finetuning and not job.recipe.training.one_schedule
    return "training.finetune_learning_rate" if own else "training.learning_rate"


def train_settings(job: Job, rate: float | None = None) -> TrainSettings:
    """How the recipe trains; `rate` is fine-tuning's highest learning rate, left out for the search's own."""
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
    """Trains `model` on the job's data by its recipe.

    Args:
        job: its training split, batch size, precision and seed.
        model: trained in place.
        epochs: over which the learning rate falls.
        rate: fine-tuning's highest learning rate; where left out, it is the search that trains, at the recipe's own.
        teach: whether the dense network teaches it, as far as the recipe's `distill_weight` says.
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
    """What the manifest keeps of an epoch."""
    return {
        "phase": phase,
        "epoch": epoch,
        "loss": stats.loss,
        "accuracy": stats.accuracy,
        "seconds": round(stats.seconds, 3),
    }
