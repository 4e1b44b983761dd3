"""How long a run takes on this machine: a few real steps of its network on random inputs, times their number."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressor.recipe import AgentSettings
from compressor.run.contract import probe_limit_s
from compressor.run.job import Job
from compressor.run.stages import workers_of
from compressor.run.trainings import search_epochs
from compressor.search.finalists import CANDIDATES_EACH, most_finalists
from compressor.training.fake_quantised import FakeQuantised
from compressor.training.feeds import random_inputs
from export.convert.calibrated import LEVELS
from export.convert.trees import outputs_of

FIT_IMAGES = 8
"""Inputs on which a compensation is timed; the time on more of them grows at most with their number."""
SHORTEST_MEASUREMENT_S = 10.0
"""What a measurement of two networks in turns takes if it is decided at once."""
_LARGEST_BATCH = 32
_ABOUT_S = 0.5


@dataclass(frozen=True)
class Part:
    """A part of a run and its time, at least and at most, in seconds."""

    name: str
    low_s: float
    high_s: float
    how: str


@dataclass(frozen=True)
class Steps:
    """Seconds that the dense network takes: an input forwards, an input of a training step, and of one in fine-tuning,
    a candidate's refit."""

    forward_s: float
    train_s: float
    tune_s: float
    refit_s: float


def estimated(job: Job) -> list[Part]:
    """Return the parts of a run with their times, without reading any data.

    The lower bound takes the slim network to be as much faster as its budgets say, and measurements to be decided at
    once; the upper one takes it to be as slow as the dense one, and measurements to use all of their time. Further
    rounds of the search, which follow where a measurement misses the target, are not included, nor is reading pictures.
    """
    recipe, task = job.recipe, job.task
    steps = measured_steps(job)
    share = min([each.target / each.dense for each in job.budgets() if each.dense], default=1.0)
    share = min(1.0, max(0.05, share))
    tested = len(task.test) if task.test is not None else 0
    in_search, epochs = search_epochs(job), int(recipe.epochs or 0)
    trained = len(task.train) if task.train is not None else 0  # type: ignore[arg-type]  # a split of a data set
    parts = [Part("score the dense network", tested * steps.forward_s, tested * steps.forward_s, f"{tested:,} inputs")]
    if in_search:
        seconds = in_search * trained * steps.train_s
        parts.append(Part("train in the search", seconds, seconds, _epochs(in_search, trained)))
    if job.budgets():
        parts.append(_candidates(job, steps, share))
    if job.compensation.delivered != "off":
        ratio = recipe.pruning.compensation_images / FIT_IMAGES
        parts.append(Part("compensate", steps.refit_s, steps.refit_s * ratio, "the slim network"))
    tuning_s: float | None = 0.0
    if left := epochs - in_search:
        teacher = steps.forward_s if recipe.training.distill_weight else 0.0
        low, high = (left * trained * (part * steps.tune_s + teacher) for part in (share, 1.0))
        parts.append(Part("fine-tune", low, high, _epochs(left, trained)))
        tuning_s = high if in_search else None
    scores = 2 * tested * steps.forward_s
    parts.append(Part("score the slim network and its file", share * scores, scores, f"{tested:,} inputs"))
    if job.measurable:
        low, high = SHORTEST_MEASUREMENT_S, recipe.contract.seconds
        if job.latency_budget is not None:
            low += SHORTEST_MEASUREMENT_S
            high += probe_limit_s(recipe, tuning_s)
        parts.append(Part("measure", min(low, high), high, "dense and slim in turns"))
    return parts


def _epochs(number: int, inputs: int) -> str:
    return f"{number} epoch{'s' if number > 1 else ''} of {inputs:,} inputs"


def _candidates(job: Job, steps: Steps, share: float) -> Part:
    """Return the time of scoring the candidates of the search."""
    search, held = job.recipe.search, job.task.search
    number = _evaluations(job)
    scored = min(len(held), search.search_images or len(held)) if held is not None else 0
    refit = steps.refit_s if job.compensation.scored != "off" else 0.0
    again = 0 if refit else int(search.batch_norm_batches or 10) * job.task.batch_size
    brief = search.brief_iterations * int(job.recipe.training.batch_size or 0) * steps.train_s
    each = (scored + again) * steps.forward_s + brief
    fits = job.recipe.pruning.compensation_images / 4 / FIT_IMAGES
    finalists = CANDIDATES_EACH * most_finalists(number) if job.compensation.scored == "quick" else 0
    most = (number + finalists) * (each + refit * max(1.0, fits))
    least = (number * (share * each + refit)) / _workers(job) + finalists * (share * each + refit)
    return Part("score candidates", least, most, f"at most {number}, {scored:,} inputs each")


def _workers(job: Job) -> int:
    """Return the number of candidates that are scored at once, at most; unknown on a cluster."""
    from compressor.search.sites import most_by_default

    workers = workers_of(job)
    if workers is None:
        return max(1, most_by_default(job.recipe.search.threads, job.torch_device))
    return int(workers) if str(workers).isdigit() else 1


def _evaluations(job: Job) -> int:
    """Return the number of candidates that the search scores at most."""
    from compressor.core.agents import agent_class
    from compressor.search.schedule import share_epochs

    search = job.recipe.search
    settings: AgentSettings = agent_class(job.recipe.agent).Settings(**search.settings)
    joint = share_epochs(search_epochs(job), pretrained=job.teacher is not None).joint
    return settings.scored_plans(search.max_evaluations, joint_epochs=joint, groups=len(job.space.groups))


def measured_steps(job: Job) -> Steps:
    """Time a forward pass, a training step and a refit of the dense network on random inputs."""
    import torch

    device = torch.device(job.torch_device)
    model = copy.deepcopy(job.model)
    precision = job.recipe.training.mixed_precision
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)

    def inputs(number: int) -> Any:
        found = random_inputs(job.task.example, number, 0)
        return tuple(each.to(device) if isinstance(each, torch.Tensor) else each for each in found)

    def forward(number: int) -> Callable[[], None]:
        given = inputs(number)

        def run() -> None:
            with torch.no_grad():
                model(*given)

        return run

    def train(number: int) -> Callable[[], None]:
        given = inputs(number)

        def run() -> None:
            with torch.autocast(device.type, dtype=half, enabled=half is not None):
                found = outputs_of(model(*given))
            model.zero_grad(set_to_none=True)
            loss: torch.Tensor = torch.stack([each.float().square().mean() for each in found]).sum()
            loss.backward()  # type: ignore[no-untyped-call]

        return run

    model.eval()
    first = _seconds(forward(2), device) / 2
    number = max(2, min(_LARGEST_BATCH, int(_ABOUT_S / max(first, 1e-9))))
    forward_s = _seconds(forward(number), device) / number
    tune_s = train_s = 0.0
    if job.recipe.epochs:
        model.train()
        tune_s = train_s = _seconds(train(number), device) / number
        if job.recipe.training.quantize == "int8":
            FakeQuantised(model, symmetric=True, levels=LEVELS)
            tune_s = _seconds(train(number), device) / number
    return Steps(forward_s, train_s, tune_s, _refit_s(job, inputs(FIT_IMAGES)))


def _refit_s(job: Job, given: Any) -> float:
    """Time the compensation of a uniform plan on a few random inputs; 0 if nothing is compensated."""
    methods: Any = job.compensation
    method = methods.scored if methods.scored != "off" else methods.delivered
    if method == "off":
        return 0.0
    plan = job.space.uniform(0.7)
    began = time.perf_counter()
    job.space.compensate(plan, [given], method)
    return time.perf_counter() - began


def _seconds(run: Callable[[], None], device: Any) -> float:
    """Return the shortest of a few runs after one that is not counted."""
    import torch

    found: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
        if sum(found) > 4 * _ABOUT_S and len(found) > 1:
            break
    return min(found[1:])

