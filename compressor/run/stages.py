"""Stages that begin a run and find its widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

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
from compressor.core.progress import say
from compressor.core.versions import machine, versions
from compressor.run.answers import dense_answers, record_dense
from compressor.run.candidates import finalists, recorded, with_choice
from compressor.run.compensation import delivered_networks, own_statistics
from compressor.run.contract import Contract
from compressor.run.dense import check_dense, collapsed, problem
from compressor.run.folder import RunFolder
from compressor.run.job import Job, reward_weights
from compressor.run.together import processes
from compressor.run.trainings import brief_training, rate_field, search_epochs, trainer

if TYPE_CHECKING:
    from torch import nn

    from compressor.budgets.base import Budget as LimitedCost
    from compressor.pruning.plan import ChannelPlan
    from compressor.search.environment import PruningEnv, Score
    from compressor.search.evaluate import Evaluator
    from compressor.search.records import SearchResult
    from compressor.search.workers import Site

PLAN = "search/plan.json"
TABLE = "latency_table.json"


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
    if job.files:
        manifest.splits = dict(job.files)
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
        split=job.task.split, images=job.task.test_inputs, metric=metric.name, share=metric.share
    )
    manifest.skipped = [Skipped(name=part.name, reason=part.reason) for part in job.space.skipped]
    manifest.rounds = []
    manifest.training = []
    manifest.notes = job.notes
    run.save()
    if job.teacher is not None:
        given = job.given
        record_dense(run, job.task, given)
        kind = "an untrained last layer" if job.fresh_head else "its given weights"
        run.note_accuracy(dense=given.score, dense_note=f"The dense network has {kind}.")
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
            from compressor.search.baselines import baselines

            scores = dict(baselines(env))
            compared = _baselines(scores)
            if note := _worse_than(scores, env.score(job.space.row(result.best))):
                run.note(note)
    finally:
        evaluator.close()
    for note in never_acted(agent, result):
        run.note(note)
    if not run.finished("search"):
        found = method(agent, recipe, agent.effects(result))
        used = None if found is None else Method(**found)
        _record_search(run, job, result, contract.search_targets(), _uniform_widths(env), used, compared)
    return result.best


def _baselines(scores: Mapping[str, Score]) -> list[Baseline]:
    """Return what the plans of the search are compared with on the page of a front."""
    return [
        Baseline(name=name, widths=list(score.widths), accuracy=score.accuracy, costs=dict(score.costs))
        for name, score in scores.items()
    ]


def _worse_than(scores: Mapping[str, Score], found: Score) -> str | None:
    """Return a note if a network that needs no search has a higher reward than the one that the search has found."""
    from compressor.search.baselines import DENSE

    name = max(scores.keys() - {DENSE}, key=lambda each: scores[each].reward, default=None)
    if name is None or scores[name].reward <= found.reward:
        return None
    return (
        f"The {name} network within the same limits scores {scores[name].accuracy:.1%} on the search split, the one "
        f"that the search has found {found.accuracy:.1%}: the search has scored too few plans. Allow it more with "
        f"--set search.max_evaluations=N, or use --agent {name}."
    )


def _uniform_widths(env: PruningEnv) -> tuple[int, ...] | None:
    """Return the widths of uniform pruning within the same budgets; None if no ratio meets them."""
    from compressor.search.proposals import uniform_widths

    try:
        return tuple(uniform_widths(env.bounds).tolist())
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
            run.warn("search", collapsed("dense", run.manifest.training, tested, rate_field(job, finetuning=False)))
        if dense_teacher(run, job) is None:
            note = f"The dense network{' has an untrained last layer' if job.fresh_head else ' is untrained'}."
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

    search, epochs = job.recipe.search, int(job.recipe.epochs or 0)
    effect = "fine-tuning has no teacher" if epochs else "the delivered network is only cut"
    if search.brief_iterations:  # candidates are trained for some steps before they are scored
        effect = effect.capitalize()
    else:
        effect = (
            f"Candidates were scored on an untrained network, so that their {job.task.metric.name} did not guide the "
            f"search, and {effect}"
        )
    fewest = fewest_epochs(float(search.epochs_share or 0))
    if fewest is None:
        fix = "Give the search a share of the epochs: --set search.epochs_share=0.6"
        if epochs < (enough := fewest_epochs(0.6) or 0):
            fix += f" --epochs {enough}, or more epochs"
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
    from compressor.search.evaluate import Evaluator, Scoring
    from compressor.search.reward import soft_reward

    recipe, settings = job.recipe, job.recipe.search
    evaluator = Evaluator(
        job.space,
        job.task,
        Scoring(
            bn_batches=int(settings.batch_norm_batches or 10),
            batch_size=job.task.batch_size,
            seed=recipe.seed,
            mixed_precision=recipe.training.mixed_precision,
            compensate=job.compensation.scored,
            fit_images=recipe.pruning.compensation_images,
        ),
        device=job.torch_device,
        search_images=settings.search_images,
        threads=settings.threads,
        site=_site(job),
        brief=brief_training(job),
        brief_steps=settings.brief_iterations,
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


def _site(job: Job) -> Site | None:
    """Return where candidates are scored; None for this process."""
    from compressor.search.sites import open_site

    settings = job.recipe.search
    return open_site(workers_of(job), settings.threads, settings.evaluation_seconds, job.torch_device)


def workers_of(job: Job) -> int | str | None:
    """Return the recipe's number of workers; 1 instead of the default where only this process can score.

    Other processes score images by class, with a network that they can build.
    """
    from compressor.training.classification import Classification

    recipe = job.recipe
    sendable = isinstance(job.task, Classification) and not recipe.from_python
    if recipe.search.workers is None and (recipe.search.brief_iterations or not sendable):
        return 1
    return recipe.search.workers


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


def dense_teacher(run: RunFolder, job: Job) -> nn.Module | None:
    """Return the trained dense network: as loaded, or as the search trained it; None if it is untrained.

    A user's own network may have trained weights that the recipe does not name: without training it is tested.
    """
    if job.trained:
        return job.teacher
    if any(each.phase != "finetune" for each in run.manifest.training):
        return job.model
    if job.fresh_head or not job.recipe.own_network:  # better than guessing would be luck
        return None
    answers = dense_answers(run)
    return None if answers is None or problem(*answers) else job.model
