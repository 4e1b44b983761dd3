"""Stages that find the widths and train the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.manifest import (
    SCHEMA,
    Accuracy,
    Baseline,
    Budget,
    Epoch,
    Group,
    Method,
    Search,
    Skipped,
)
from compressor.core.metrics import ACCURACY, AGREEMENT
from compressor.core.progress import Steps, bar, say
from compressor.core.versions import machine, versions
from compressor.run.answers import dense_answers, record_dense, record_slim
from compressor.run.candidates import finalists, recorded, with_choice
from compressor.run.compensation import delivered_networks, network_before_finetuning, own_statistics
from compressor.run.contract import Contract
from compressor.run.dense import check_dense, collapsed, lost_in_finetuning, problem
from compressor.run.device import int8_runtime
from compressor.run.folder import RunFolder
from compressor.run.job import Job, reward_weights
from compressor.run.together import joining, processes

if TYPE_CHECKING:
    from torch import nn

    from compressor.budgets.base import Budget as LimitedCost
    from compressor.core.records import Checkpoint
    from compressor.pruning.plan import ChannelPlan
    from compressor.search.environment import PruningEnv
    from compressor.search.evaluate import Evaluator
    from compressor.search.records import SearchResult
    from compressor.training.fake_quantised import FakeQuantised
    from compressor.training.loop import BriefTraining, Trainer
    from compressor.training.settings import TrainSettings

OWN_CLIP = 1.0
"""Maximum norm of the gradients of a loss of the user's own, whose scale is not known."""

PLAN = "search/plan.json"
TABLE = "latency_table.json"
FINETUNE_EPOCH = "finetune-epoch"
"""Checkpoint of the epoch of fine-tuning that was stopped."""


def begin(run: RunFolder, job: Job) -> None:
    """Record recipe, data, budgets and device of the run, and the accuracy of the dense network."""
    recipe, manifest = job.recipe, run.manifest
    if job.table is not None:
        write_atomic(run.file(TABLE), job.table.to_json())
    manifest.schema_version = SCHEMA
    manifest.status = "running"
    manifest.model = recipe.model
    manifest.data = recipe.data.source
    manifest.preprocessing = job.preprocessing
    manifest.seed = recipe.seed
    manifest.agent = recipe.agent
    manifest.weights = recipe.weights
    manifest.epochs = recipe.epochs
    manifest.recipe = recipe.model_dump(mode="json")
    manifest.versions = versions()
    manifest.machine = machine() | ({"processes": processes()} if processes() > 1 else {})
    manifest.budgets = [
        Budget(
            name=each.name,
            unit=each.unit,
            target=each.target,
            dense=each.dense,
            predicted=None,
            measured=None,
            kept=None,
            how=each.how,
        )
        for each in job.budgets()
    ]
    metric = job.task.metric
    manifest.accuracy = Accuracy(
        split="test", images=job.task.test_inputs, metric=metric.name, share=metric.share
    )
    manifest.skipped = [Skipped(name=part.name, reason=part.reason) for part in job.space.skipped]
    manifest.rounds = []
    manifest.training = []
    manifest.notes = job.notes
    run.save()
    if job.teacher is not None:
        given = job.given
        record_dense(run, job.task, given)
        run.note_accuracy(dense=given.score, dense_note="The dense network has its given weights.")
        if metric.name != AGREEMENT:
            say(f"The dense network's {job.metric} is {metric.text(given.score)}.")
        if job.trained and given.answers is not None and (note := check_dense(job, *given.answers, str(run.path))):
            run.note(note)


def search(run: RunFolder, job: Job, contract: Contract) -> ChannelPlan:
    """Let the agent find the widths; `job.model` then has the weights at the end of the search.

    A finished search only returns its plan and restores these weights.
    """
    from compressor.search.base import create_agent
    from compressor.search.method import method, never_acted, without_effect
    from compressor.search.records import Limits
    from compressor.search.schedule import share_epochs
    from compressor.training.losses import Alignment

    recipe, settings = job.recipe, job.recipe.search
    schedule = share_epochs(search_epochs(job), pretrained=job.teacher is not None)
    agent = create_agent(
        recipe.agent,
        seed=recipe.seed,
        trainer=trainer(job, job.model, schedule.total, within=run.checkpoint("search-epoch"))
        if schedule.total
        else None,
        schedule=schedule,
        settings=settings.settings,
        alignment=partial(Alignment, job.space, form=settings.align, beta=settings.align_weight)
        if settings.align_weight
        else None,
        context_size=settings.context_size or 0,
        curves=run.file("search/curves"),
    )
    env, evaluator = environment(job, contract.search_budgets(), context_size=agent.context_size)
    images = evaluator.images if job.task.metric.name == ACCURACY else None
    for note in (too_few_images(images), *without_effect(agent, recipe)):
        if note:
            run.note(note)
    log, checkpoint = run.episodes(), run.checkpoint("search")
    if not checkpoint.path.exists():
        if run.finished("search"):
            run.note(
                f"{checkpoint.path}, the search's checkpoint, is missing: the search is repeated from the beginning, "
                f"including its {len(log)} episodes."
            )
        elif len(log):
            say(f"{checkpoint.path} is missing: the search starts again; {len(log)} episodes are repeated.")
    limits = Limits(max_evaluations=settings.max_evaluations, max_seconds=settings.max_seconds)
    compared: list[Baseline] = []
    try:
        result = agent.search(env, evaluator, limits, log=log, checkpoint=checkpoint)
        if job.of_front and not run.finished("search"):
            compared = _baselines(env)
    finally:
        evaluator.close()
    for note in never_acted(agent, result):
        run.note(note)
    if not run.finished("search"):
        found = method(agent, recipe, agent.effects(result))
        used = None if found is None else Method(**found)
        _record_search(run, job, result, contract.search_targets(), _uniform_widths(env), used, compared)
    return result.best


def _baselines(env: PruningEnv) -> list[Baseline]:
    """Return what the plans of the search are compared with on the page of a front."""
    from compressor.search.baselines import baselines

    return [
        Baseline(name=name, widths=list(score.widths), accuracy=score.accuracy, costs=dict(score.costs))
        for name, score in baselines(env)
    ]


def _uniform_widths(env: PruningEnv) -> tuple[int, ...] | None:
    """Return the widths of uniform pruning within the same budgets; None if no ratio meets them."""
    from compressor.search.proposals import uniform_widths

    try:
        return tuple(uniform_widths(env).tolist())
    except CompressorError:
        return None


def _record_search(
    run: RunFolder,
    job: Job,
    result: SearchResult,
    targets: dict[str, float],
    uniform: tuple[int, ...] | None,
    method: Method | None,
    compared: list[Baseline],
) -> None:
    """Record the result of a search, and the dense network that it trained.

    Args:
        targets: The run's targets in the units of the candidates' costs.
        uniform: Widths of uniform pruning within the budgets.
        method: Parts of the agent's method that were used.
        compared: Networks that need no search, for a front.
    """
    done, planned = len(result.training), search_epochs(job)  # fewer than planned if the time limit was reached
    run.manifest.training = [Epoch(**each) for each in result.training]
    if not job.trained:
        tested = job.tested(job.model)
        record_dense(run, job.task, tested)
        if done:
            run.warn("search", collapsed("dense", run.manifest.training, tested, _rate_field(job, finetuning=False)))
        if dense_teacher(run, job) is None:
            note = f"The dense network{' has an untrained last layer' if job.teacher else ' is untrained'}."
            run.note(f"{note} {_effect_of_no_training(job)}")
        elif done:
            epochs = "one epoch" if done == 1 else f"{done} epochs"
            note = f"The dense network was trained for the {epochs} of the search, the slim one for all epochs."
        else:
            note = f"The dense network has the weights that {job.recipe.model} gives it."
        run.note_accuracy(dense=tested.score, dense_note=note)
    _note_plan(run, job, result.best)
    if done < planned:
        run.note(f"The search's time limit stopped its training after {done} of {planned} epochs.")
    earlier = run.manifest.search.finalists if run.manifest.search is not None else []
    run.manifest.search = Search(
        agent=job.recipe.agent,
        evaluations=run.manifest.evaluations_before + result.evaluations,
        episodes=len(result.candidates),
        seconds=round(result.seconds, 3),
        timing={name: round(seconds, 3) for name, seconds in result.timing.items()},
        best_reward=result.reward,
        method=method,
        targets=targets,
        candidates=recorded(result.candidates, uniform, job.space, result.best),
        finalists=finalists(result) or earlier,
        **({"baselines": compared} if compared else {}),
    )
    run.save()


def _effect_of_no_training(job: Job) -> str:
    """Return what follows for the run from an untrained dense network, and how to have it trained."""
    from compressor.search.schedule import fewest_epochs

    search = job.recipe.search
    effect = "Fine-tuning has no teacher"
    if not search.brief_iterations:  # else candidates are trained for some steps before they are scored
        effect = (
            f"Candidates were scored on an untrained network, so that their {job.task.metric.name} did not guide the "
            "search, and fine-tuning has no teacher"
        )
    fewest = fewest_epochs(float(search.epochs_share or 0))
    if fewest is None:
        fix = "Give the search a share of the epochs: --set search.epochs_share=0.6"
    elif search_epochs(job):
        fix = "Allow the search more time: search.max_seconds"
    else:
        fix = f"The search trains from {fewest} epochs on: --epochs {fewest} or more"
    return f"{effect}. {fix}."


def environment(
    job: Job, budgets: Sequence[LimitedCost], *, context_size: int = 0
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
        job.task,
        device=job.torch_device,
        bn_batches=int(settings.batch_norm_batches or 10),
        batch_size=job.task.batch_size,
        search_images=settings.search_images,
        mixed_precision=recipe.training.mixed_precision,
        seed=recipe.seed,
        threads=settings.threads,
        site=open_site(settings.workers, settings.threads, settings.evaluation_seconds, job.torch_device),
        brief=_brief_training(job),
        brief_steps=settings.brief_iterations,
        compensate=job.compensation.scored,
        fit_images=recipe.pruning.compensation_images,
        delivered=delivered_networks(job) if job.compensation.scored == "quick" else None,
    )
    env = PruningEnv(
        job.space,
        budgets,
        evaluator,
        reward=soft_reward(reward_weights(recipe), budgets),
        importance=recipe.pruning.importance,
        context_size=context_size,
        importance_data=job.task.gradients(job.torch_device, recipe.seed),
        reconstruction_data=job.task.reconstruction(job.torch_device, recipe.seed)
        if recipe.pruning.importance == "reconstruction"
        else None,
    )
    return env, evaluator


def too_few_images(images: int | None) -> str | None:
    """Return a note if the search split is too small to compare networks: a standard error above 2 points."""
    from compressor.training.scoring import standard_error

    if images is None or (error := standard_error(0.9, images)) <= 0.02:
        return None
    return (
        f"The search split has {images} images: an accuracy of 90 % is known to within {error:.1%} (standard error), "
        "and networks that differ by less cannot be distinguished."
    )


def choose(run: RunFolder, job: Job, contract: Contract, plan: ChannelPlan) -> ChannelPlan:
    """Return the plan to fine-tune: the last, or an earlier one that meets the latency target more closely."""
    best = contract.best_plan(plan)
    if best.checksum != plan.checksum:
        _note_plan(run, job, best)
        state, known = run.checkpoint("search").load(), run.manifest.search
        if state is not None and known is not None:
            rows = [each["widths"] for each in state["candidates"]]
            marked = with_choice(known.candidates, rows, job.space, best)
            run.manifest.search = known.model_copy(update={"candidates": marked})
            run.save()
        say("An earlier plan is used instead of the last: it meets the latency target more closely.")
    return best


def _note_plan(run: RunFolder, job: Job, plan: ChannelPlan) -> None:
    """Record a plan as the run's, with the accuracy of the network that is only sliced."""
    pruned = job.space.apply(plan)
    own_statistics(job, pruned)
    run.note_accuracy(pruned=job.tested(pruned).score)
    write_atomic(run.file(PLAN), plan.to_json())
    blocks = [block for block in job.space.blocks if block.name in plan.removed] if plan.removed else []
    gone = {group for block in blocks for group in block.groups}
    run.manifest.groups = [
        Group(
            name=each.name,
            width=each.width,
            kept=0 if each.index in gone else plan.widths[each.name],
            coupled=each.coupled,
        )
        for each in job.space.groups
    ]
    run.manifest.removed = [block.name for block in blocks]
    run.save()


def finetune(run: RunFolder, job: Job, plan: ChannelPlan) -> nn.Module:
    """Compensate and train the slim network, and write it as the run's artifact.

    The dense network is goal and teacher if it is trained.
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
    else:
        slim = job.space.apply(plan)
    history = _trained(run, job, slim, plan, epochs, teacher, state) if epochs else []
    slim.eval()
    known = run.manifest.accuracy
    unchanged = not epochs and teacher is not None and job.compensation.delivered != "off"
    if unchanged and known.compensated is not None:
        finetuned = known.compensated
    else:
        tested = job.tested(slim)
        record_slim(run, job.task, tested)
        finetuned = tested.score
        if epochs and "search" not in run.manifest.warnings:  # a dense network that has learned nothing is the cause
            epochs_done = [Epoch(**entry) for entry in history]
            run.warn("finetune", collapsed("slim", epochs_done, tested, _rate_field(job, finetuning=True)))
    run.note_accuracy(finetuned=finetuned)
    before = known.pruned if known.compensated is None else known.compensated
    if epochs and (note := lost_in_finetuning(finetuned, before, known.dense, known.images, known.metric)):
        run.note(note)
    save(slim, plan, run.path, factory=job.factory, extra=job.task.facts())
    if job.recipe.from_python and (name := saved_factory(run.path)) is not None:
        remember_factory(name)  # a class that this program has run is run again by `compress export`
    earlier = [entry for entry in run.manifest.training if entry.phase != "finetune"]
    run.manifest.training = [*earlier, *(Epoch(**entry) for entry in history)]
    run.save()
    say(f"The slim network's {job.metric} is {job.task.metric.text(finetuned)}.")
    # what is exported is what the files hold, in this process as in one that resumes here
    return finetuned_network(run, job)


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
    from export.convert.calibrated import FORMS

    return FakeQuantised(slim, symmetric=FORMS[int8_runtime(job.recipe)].symmetric)


def finetuned_network(run: RunFolder, job: Job) -> nn.Module:
    """Read the slim network from the run's files."""
    from compressor.pruning.artefact import load

    return load(run.path, factory=job.builder, device=job.torch_device)


def dense_teacher(run: RunFolder, job: Job) -> nn.Module | None:
    """Return the trained dense network: as loaded, or as the search trained it; None if it only guesses.

    A user's own network may have trained weights that the recipe does not name: without training it is tested.
    """
    if job.trained:
        return job.teacher
    if any(each.phase != "finetune" for each in run.manifest.training):
        return job.model
    answers = dense_answers(run)
    return None if answers is None or problem(*answers) else job.model


def search_epochs(job: Job) -> int:
    """Return the epochs of the dense weights; the slim network has the remaining ones, at least one."""
    from compressor.search.schedule import epochs_in_search

    return epochs_in_search(int(job.recipe.epochs or 0), float(job.recipe.search.epochs_share or 0))


def _brief_training(job: Job) -> BriefTraining | None:
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
        rate_field=_rate_field(job, finetuning=rate is not None),
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
