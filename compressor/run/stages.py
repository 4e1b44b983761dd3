"""Stages that find the widths and train the weights; each returns at once if it had finished."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.core.files import write_atomic
from compressor.core.progress import bar, say
from compressor.core.versions import machine, versions
from compressor.run.contract import kept_plan, margin, searched_share
from compressor.run.dense import check_dense, lost_in_finetuning
from compressor.run.folder import RunDir
from compressor.run.inputs import described
from compressor.run.job import Job
from compressor.run.onnx_files import DENSE
from compressor.run.search_setup import environment, too_few_images
from compressor.run.trainers import epoch_record, search_epochs, trainer

if TYPE_CHECKING:
    from torch import nn

    from compressor.budgets.base import Budget
    from compressor.pruning.plan import ChannelPlan
    from compressor.search.records import SearchResult

PLAN = "search/plan.json"
TABLE = "latency_table.json"


def begin(run: RunDir, job: Job) -> None:
    """Record recipe, data, budgets and device of the run, and the accuracy of the dense network."""
    from compressor.models.weights import FRESH_HEAD
    from compressor.search.evaluate import predictions

    job.dense_file.put(run.file(DENSE))
    if run.finished("begin"):
        return
    recipe = job.recipe
    with run.stage("begin"):
        if job.table is not None:
            write_atomic(run.file(TABLE), job.table.to_json())
        budgets = job.budgets()
        run.save(
            schema=1,
            status="running",
            model=recipe.model,
            data=recipe.data.source,
            preprocessing=described(recipe, job.data.preprocessing),
            seed=recipe.seed,
            agent=recipe.agent,
            weights=recipe.weights,
            epochs=recipe.epochs,
            recipe=recipe.model_dump(mode="json"),
            versions=versions(),
            machine=machine(),
            budgets=[
                {"name": each.name, "unit": each.unit, "target": each.target, "dense": each.dense,
                 "predicted": None, "measured": None, "kept": None}
                for each in budgets
            ],
            accuracy={"split": "test", "images": len(job.data.test)},
            skipped=[{"name": part.name, "reason": part.reason} for part in job.space.skipped],
            rounds=[],
            training=[],
            notes=job.notes,
        )  # fmt: skip
        if job.teacher is not None:
            answers, labels = predictions(job.teacher, job.data.test, device=job.torch_device)
            dense = float((answers == labels).double().mean())
            _note_accuracy(run, dense=dense, dense_note="The dense network has its given weights.")
            say(f"The dense network's test accuracy is {dense:.2%}.")
            fresh = getattr(job.teacher, FRESH_HEAD, False)  # an untrained head only guesses
            if not fresh and (note := check_dense(job, answers, labels, str(run.path))):
                _tell(run, note)


def search(run: RunDir, job: Job) -> ChannelPlan:
    """Let the agent find the widths; `job.model` then has the weights at the end of the search."""
    from compressor.search.evaluate import accuracy

    if run.finished("search"):
        return _search(run, job)[0].best
    with run.stage("search"):
        result, uniform, compared = _search(run, job)
        if job.teacher is None:
            dense = accuracy(job.model, job.data.test, device=job.torch_device)
            epochs = len(result.training)  # fewer than planned if the time limit was reached
            note = f"The dense network was trained for the {epochs} epochs of the search, the slim one for all epochs."
            _note_accuracy(run, dense=dense, dense_note=note)
        _note_plan(run, job, result.best)
        if len(result.training) < (planned := search_epochs(job)):
            done = len(result.training)
            _tell(run, f"The search's time limit stopped its training after {done} of {planned} epochs.")
        run.save(
            search={
                "agent": job.recipe.agent,
                "evaluations": run.manifest.get("evaluations_before", 0) + result.evaluations,
                "episodes": len(result.candidates),
                "seconds": round(result.seconds, 3),
                "timing": {name: round(seconds, 3) for name, seconds in result.timing.items()},
                "best_reward": result.reward,
                "method": compared,
                "candidates": [
                    {
                        "reward": each.reward,
                        "accuracy": each.accuracy,
                        "costs": dict(each.costs),
                        "source": "uniform" if each.widths == uniform else each.phase,
                        "epoch": each.epoch,
                        **({"given_up": True} if each.given_up else {}),
                    }
                    for each in result.candidates
                ],
            },
            training=[*result.training],
        )
    return result.best


def _tell(run: RunDir, note: str) -> None:
    """Print a sentence and add it to the run's notes, once."""
    if note not in run.manifest["notes"]:
        say(note)
        run.save(notes=[*run.manifest["notes"], note])


def _search(run: RunDir, job: Job) -> tuple[SearchResult, tuple[int, ...] | None, dict[str, Any] | None]:
    """Return the agent's result, the widths of uniform pruning within the same budgets (None if no ratio meets them),
    and how the search compares with the method's publication, if there is one."""
    from compressor.search.base import create_agent
    from compressor.search.method import method, never_acted, without_effect
    from compressor.search.proposals import uniform_widths
    from compressor.search.records import Limits
    from compressor.search.schedule import share_epochs
    from compressor.training.losses import Alignment

    recipe, settings = job.recipe, job.recipe.search
    schedule = share_epochs(search_epochs(job), pretrained=job.teacher is not None)
    agent = create_agent(
        recipe.agent,
        seed=recipe.seed,
        trainer=trainer(job, job.model, schedule.total) if schedule.total else None,
        schedule=schedule,
        settings=settings.settings,
        alignment=partial(Alignment, job.space, form=settings.align, beta=settings.align_weight)
        if settings.align_weight
        else None,
        context_size=settings.context_size or 0,
        curves=run.file("search/curves"),
    )
    env, evaluator = environment(job, search_budgets(run, job), context_size=agent.context_size)
    for note in (too_few_images(evaluator.images), *without_effect(agent, recipe)):
        if note:
            _tell(run, note)
    log, checkpoint = run.episodes(), run.checkpoint("search")
    if not checkpoint.path.exists():
        if run.finished("search"):
            _tell(
                run,
                f"{checkpoint.path}, the search's checkpoint, is missing: the search is repeated from the beginning, "
                f"including its {len(log)} episodes.",
            )
        elif len(log):
            say(
                f"{checkpoint.path} is missing: the search starts again; {len(log)} episodes are repeated."
            )
    limits = Limits(max_evaluations=settings.max_evaluations, max_seconds=settings.max_seconds)
    try:
        result = agent.search(env, evaluator, limits, log=log, checkpoint=checkpoint)
    finally:
        evaluator.close()
    for note in never_acted(agent, result):
        _tell(run, note)
    compared = method(agent, recipe, agent.effects(result))
    try:
        return result, tuple(uniform_widths(env).tolist()), compared
    except CompressorError:
        return result, None, compared


def settle(run: RunDir, job: Job, plan: ChannelPlan) -> ChannelPlan:
    """Return the plan to fine-tune: the last, or an earlier one that meets the latency target more closely."""
    kept = kept_plan(run, plan)
    if kept.checksum != plan.checksum and not run.finished("finetune"):
        _note_plan(run, job, kept)
        say("An earlier plan is used instead of the last: it meets the latency target more closely.")
    return kept


def fall_back(run: RunDir, plan: ChannelPlan) -> bool:
    """After a missed latency target and with nothing left to search, return to an earlier plan that meets it.

    Returns:
        Whether there is such a plan.
    """
    if kept_plan(run, plan).checksum == plan.checksum:
        return False
    run.reopen("finetune", "export", "measure")
    return True


def _note_plan(run: RunDir, job: Job, plan: ChannelPlan) -> None:
    """Record a plan as the run's, with the accuracy of the network before fine-tuning."""
    from compressor.search.evaluate import accuracy, reestimate_batch_norm

    pruned = job.space.apply(plan)
    reestimate_batch_norm(pruned, job.data.train, batches=10, device=job.torch_device)
    _note_accuracy(run, pruned=accuracy(pruned, job.data.test, device=job.torch_device))
    write_atomic(run.file(PLAN), plan.to_json())
    run.save(
        groups=[
            {"name": each.name, "width": each.width, "kept": plan.widths[each.name], "coupled": each.coupled}
            for each in job.space.groups
        ]
    )


def search_budgets(run: RunDir, job: Job) -> list[Budget]:
    """Return the budgets of the search: the run's targets, with the margin subtracted from the latency."""
    targets = {entry["name"]: entry["target"] for entry in run.manifest["budgets"]}
    below = margin(run, job)
    share = searched_share(run, job)
    if share is not None and job.table is not None:
        targets["latency"] = share * job.table.dense_ms(job.space)  # in milliseconds of the table
    aims = {name: target * (1 - below) if name == "latency" else target for name, target in targets.items()}
    budgets: list[Any] = list(job.budgets())  # all are frozen dataclasses, which their abstract base does not declare
    return [
        budget
        if budget.dense <= targets[budget.name]
        else dataclasses.replace(budget, target=aims[budget.name])
        for budget in budgets
    ]


def tighten(run: RunDir, job: Job) -> bool:
    """Refit the table with the measurement after a latency that missed its target or left too much of it unused.

    Returns:
        Whether another search can help.
    """
    rounds: list[dict[str, Any]] = run.manifest["rounds"]
    if job.table is None or len(rounds) >= job.recipe.contract.max_rounds:
        return False
    last = rounds[-1]
    # As shares of the dense network's time: milliseconds would bring the load of other processes into the table.
    correction = (last["predicted_ratio"], last["ratio"])
    table = job.table.refit([correction], lower=True)
    try:
        job.budgets(table)
    except CompressorError as error:
        say(f"The latency target cannot be met: {error.message}")
        return False
    job.table = table
    # One write for both: after a kill between the corrected table and the reopened stages, it would be corrected twice.
    run.reopen(
        "search", "probe", "finetune", "export", "measure",
        corrections=[*run.manifest.get("corrections", []), list(correction)],
        evaluations_before=run.manifest["search"]["evaluations"],
        missed=sum(each["kept"] is False for each in rounds),
        quiet_dense_ms=min(each["dense_ms"] for each in rounds),
    )  # fmt: skip
    say("The table was refitted with the measurement; the search continues.")
    return True


def finetune(run: RunDir, job: Job, plan: ChannelPlan) -> nn.Module:
    """Train the slim network with the dense one as teacher, and write it as the run's artifact."""
    from compressor.pruning.artefact import save
    from compressor.search.evaluate import accuracy

    if run.finished("finetune"):
        return _saved(run, job)
    epochs = int(job.recipe.epochs or 0) - search_epochs(job)
    slim = job.space.apply(plan)
    checkpoint = run.checkpoint("finetune")
    if "finetune" in run.manifest["stages"] and not checkpoint.path.exists():
        say(f"{checkpoint.path} is missing: fine-tuning starts again.")
    with run.stage("finetune"):
        training = trainer(job, slim, epochs, rate=job.recipe.training.finetune_learning_rate, teach=True)
        state = checkpoint.load()
        if state is not None and state["plan"] == plan.checksum:
            training.restore(state["trainer"])
        history = [entry for entry in run.manifest["training"] if entry["phase"] != "finetune"]
        history += (state or {}).get("history", []) if training.epoch else []
        with bar("Fine-tuning the slim network", epochs * training.steps_per_epoch) as progress:
            progress.advance(training.epoch * training.steps_per_epoch)
            while training.epoch < epochs:
                stats = training.run_epoch(on_step=lambda _: progress.advance())
                history.append(epoch_record("finetune", training.epoch, stats))
                own = [entry for entry in history if entry["phase"] == "finetune"]
                checkpoint.save({"plan": plan.checksum, "trainer": training.state(), "history": own})
                progress.advance(0, note=f"loss {stats.loss:.3f}")
        slim.eval()
        finetuned = accuracy(slim, job.data.test, device=job.torch_device)
        _note_accuracy(run, finetuned=finetuned)
        known = run.manifest["accuracy"]
        if note := lost_in_finetuning(finetuned, known.get("pruned"), known.get("dense"), len(job.data.test)):
            _tell(run, note)
        save(slim, plan, run.path, factory=job.factory, extra=job.data.facts())
        run.save(training=history)
        say(f"The slim network's test accuracy is {finetuned:.2%}.")
    # what is exported is what the files hold, in this process as in one that resumes here
    return _saved(run, job)


def _saved(run: RunDir, job: Job) -> nn.Module:
    """Read the slim network from the run's files."""
    from compressor.pruning.artefact import load

    return load(run.path, factory=job.recipe.model, device=job.torch_device)


def _note_accuracy(run: RunDir, **values: Any) -> None:
    run.save(accuracy={**run.manifest["accuracy"], **values})
