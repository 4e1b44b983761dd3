"""Fine-tuning: the slim network is compensated and trained, and what training made worse is not delivered.

The network before and after training are compared on the search split, which is not trained on. The test split decides
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.core.manifest import Epoch
from compressor.core.progress import Steps, bar, say
from compressor.run.answers import record_slim
from compressor.run.compensation import network_before_finetuning
from compressor.run.dense import collapsed, lost_in_finetuning
from compressor.run.device import int8_runtime
from compressor.run.folder import RunFolder
from compressor.run.job import Job
from compressor.run.stages import dense_teacher
from compressor.run.trainings import epoch_record, rate_field, search_epochs, trainer

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.plan import ChannelPlan
    from compressor.training.fake_quantised import FakeQuantised

START = "finetune-start"
"""Checkpoint of the network before its training."""
FINETUNE_EPOCH = "finetune-epoch"
"""Checkpoint of the epoch of fine-tuning that was stopped."""


def finetune(run: RunFolder, job: Job, plan: ChannelPlan) -> nn.Module:
    """Compensate and train the slim network, and write it as the run's artifact.

    The dense network is goal and teacher if it is trained. If training then lowers the score on the search split, the
    network is delivered as it was before.
    """
    from compressor.models.names import remember_factory
    from compressor.pruning.artefact import save, saved_factory

    epochs = int(job.recipe.epochs or 0) - search_epochs(job)
    checkpoint = run.checkpoint("finetune")
    started = checkpoint.path.exists() or run.checkpoint(FINETUNE_EPOCH).path.exists()
    if epochs and "finetune" in run.begun_before and not started:
        say(f"{checkpoint.path} is missing: fine-tuning starts again.")
    teacher = dense_teacher(run, job)
    state = checkpoint.load()
    if state is not None and state["plan"] != plan.checksum:
        state = None
    if state is None:
        slim = network_before_finetuning(run, job, plan, trained=teacher is not None)
        if epochs:
            _keep_start(run, job, plan, slim, teacher)
    else:
        slim = job.space.apply(plan)
    history = _trained(run, job, slim, plan, epochs, teacher, state) if epochs else []
    slim.eval()
    finetuned = _delivered(run, job, plan, slim, teacher, [Epoch(**entry) for entry in history])
    run.note_accuracy(finetuned=finetuned)
    save(slim, plan, run.path, factory=job.factory, extra=job.task.facts())
    if job.recipe.from_python and (name := saved_factory(run.path)) is not None:
        remember_factory(name)  # a class that this program has run is run again by `compress export`
    earlier = [entry for entry in run.manifest.training if entry.phase != "finetune"]
    run.manifest.training = [*earlier, *(Epoch(**entry) for entry in history)]
    run.save()
    say(f"The slim network's {job.metric} is {job.task.metric.text(finetuned)}.")
    # what is exported is what the files hold, in this process as in one that resumes here
    return finetuned_network(run, job)


def _delivered(
    run: RunFolder, job: Job, plan: ChannelPlan, slim: nn.Module, teacher: nn.Module | None, history: list[Epoch]
) -> float:
    """Return the test score of the network to deliver: `slim` as trained, or with its weights before that, in place."""
    known = run.manifest.accuracy
    unchanged = not history and teacher is not None and job.compensation.delivered != "off"
    if unchanged and known.compensated is not None:
        return known.compensated
    tested = job.tested(slim)
    if history and "search" not in run.manifest.warnings:  # a dense network that has learned nothing is the cause
        run.warn("finetune", collapsed("slim", history, tested, rate_field(job, finetuning=True)))
    discarded = None
    if history and (note := _returned_to_start(run, job, plan, slim, teacher)) is not None:
        run.note(note)
        discarded, tested = tested.score, job.tested(slim)
    elif history:
        before = known.pruned if known.compensated is None else known.compensated
        if (note := lost_in_finetuning(tested.score, before, known.dense, known.images, known.metric)) is not None:
            run.note(note)
    run.note_accuracy(discarded=discarded)
    record_slim(run, job.task, tested)
    return tested.score


def _keep_start(run: RunFolder, job: Job, plan: ChannelPlan, slim: nn.Module, teacher: nn.Module | None) -> None:
    """Keep the network before its training, with its score on the search split, if it has learned something.

    A training that rounds to INT8 is for another network than the one that is scored here.
    """
    start = run.checkpoint(START)
    if teacher is None or job.recipe.training.quantize != "no":
        start.clear()
        return
    _, score = job.task.judge(teacher, job.torch_device)
    weights = {name: value.cpu() for name, value in slim.state_dict().items()}
    start.save({"plan": plan.checksum, "weights": weights, "score": score(slim.eval())})


def _returned_to_start(
    run: RunFolder, job: Job, plan: ChannelPlan, slim: nn.Module, teacher: nn.Module | None
) -> str | None:
    """Give a network its weights before training if that scores more on the search split; returns a note that says so.

    Training images then tell why: a network that improves on them has learned these few by heart, and one that does
    not has not recovered from its first steps.
    """
    start = run.checkpoint(START).load()
    if start is None or teacher is None or start["plan"] != plan.checksum:
        return None
    task, device = job.task, job.torch_device
    metric, judged = task.judge(teacher, device)
    before, after = start["score"], judged(slim)
    if after >= before:
        return None
    seen = task.on_calibration(job.recipe.seed)
    learned = None if seen is None else seen.judge(teacher, device)[1]
    seen_after = None if learned is None else learned(slim)
    slim.load_state_dict(start["weights"])
    change = f"from {metric.text(before)} to {metric.text(after)}"
    note = f"Fine-tuning lowered the {metric.name} on the search split {change}: the network is delivered as before."
    rate = f"lower {rate_field(job, finetuning=True)}"
    if learned is None or seen_after is None:
        return f"{note} Train on more inputs, or {rate}."
    seen_before = learned(slim)
    change = f"from {metric.text(seen_before)} to {metric.text(seen_after)}"
    if seen_after > seen_before:
        return f"{note} On training images it rose {change}: there are too few of them. Add images, or train less."
    return f"{note} On training images it fell, too, {change}: {rate}, or train longer (--epochs)."


def _trained(
    run: RunFolder,
    job: Job,
    slim: nn.Module,
    plan: ChannelPlan,
    epochs: int,
    teacher: nn.Module | None,
    state: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Fine-tune in place, from a checkpoint's state if there is one; returns the record of each epoch."""
    rounded = _rounded(job, slim) if job.recipe.training.quantize == "int8" else None
    training = trainer(
        job,
        slim,
        epochs,
        rate=job.recipe.training.finetune_learning_rate,
        teacher=teacher,
        within=run.checkpoint(FINETUNE_EPOCH),
        of=plan.checksum,
        plan=plan,
    )
    checkpoint = run.checkpoint("finetune")
    history: list[dict[str, Any]] = []
    if state is not None:
        training.restore(state["trainer"])
        history = list(state["history"])
    with bar("Fine-tuning the slim network", epochs * training.steps_per_epoch) as progress:
        progress.advance(training.epoch * training.steps_per_epoch)
        while training.epoch < epochs:
            stats = training.run_epoch(Steps(progress))
            history.append(epoch_record("finetune", training.epoch, stats))
            checkpoint.save({"plan": plan.checksum, "trainer": training.state(), "history": history})
            progress.advance(0, note=f"loss {stats.loss:.3f}")
    run.manifest.trained_ranges = {} if rounded is None else {name: [*ends] for name, ends in rounded.remove().items()}
    return history


def _rounded(job: Job, slim: nn.Module) -> FakeQuantised:
    """Let a network compute as in the run's INT8 file."""
    from compressor.training.fake_quantised import FakeQuantised
    from export.convert.calibrated import FORMS, weight_levels

    runtime = int8_runtime(job.recipe)
    return FakeQuantised(slim, symmetric=FORMS[runtime].symmetric, levels=weight_levels(runtime))


def finetuned_network(run: RunFolder, job: Job) -> nn.Module:
    """Read the slim network from the run's files."""
    from compressor.pruning.artefact import load

    return load(run.path, factory=job.builder, device=job.torch_device)
