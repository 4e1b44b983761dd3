"""The score of a plan: that of its network on the search inputs of a task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.search.networks import Networks
from compressor.search.workers import Site, Workers, described
from compressor.training.scoring import reestimate_batch_norm

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace
    from compressor.training.feeds import Feed
    from compressor.training.task import Task


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Set torch's number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def _sampled(feed: Feed, number: int | None, seed: int) -> Feed:
    """Return at most this many inputs, decoded once: a search reads the same ones for every candidate."""
    few = number is None or len(feed) <= number
    return (feed if few else feed.sample(number or 0, seed)).in_memory()


@dataclass(frozen=True)
class Scoring:
    """How a candidate's network is built and scored, in this process or a worker.

    Attributes:
        bn_batches: Number of batches from which batch-norm statistics are estimated.
        batch_size: Images per batch, in these and in the scored batches.
        seed: Seed that chooses the images.
        mixed_precision: "bf16" scores all candidates with forward passes in that precision; "no" in float32.
        compensate: How candidates are compensated before they are scored: "off", or a method of `compensate`.
        fit_images: Number of training images that compensation fits to, at most.
    """

    bn_batches: int = 10
    batch_size: int = 128
    seed: int = 0
    mixed_precision: str = "no"
    compensate: str = "off"
    fit_images: int = 512


class Evaluator:
    """Scores plans by a task: the slim network's accuracy on the search split, its closeness to the dense one, ...

    The network is compensated, or it is only sliced and its batch norm is re-estimated. A plan is scored once while
    the weights stay the same; call `weights_moved` after they change.

    Args:
        space: Applies plans to its model's current weights.
        task: Task whose calibration inputs give the statistics, and whose search inputs give the score.
        scoring: How a candidate is built and scored.
        device: Device for scoring.
        search_images: Maximum number of images of the search split; None for all.
        threads: Number of torch's threads while scoring in this process; None for the current number.
        site: Where worker processes score instead, each with its own threads; None scores in this process. The
            accuracies are bit-identical if a worker has as many threads as this process would. Until the workers of a
            site with `after_s` are started, this process scores with as many threads as one of them.
        brief: Trains a candidate's network in place for a number of steps; None trains none.
        brief_steps: Number of these steps for every candidate without another number; only in this process.
        delivered: Builds networks as they are delivered, if that is not how candidates are built.

    Attributes:
        delivered: Scores a plan's network as it is delivered, 0..1, without remembering it; None without `delivered`.
        evaluations: Number of networks scored so far; answers from the cache do not count.
        seconds: Time spent on them, in seconds.
    """

    def __init__(
        self,
        space: PruningSpace,
        task: Task,
        scoring: Scoring = Scoring(),
        *,
        device: str | torch.device = "cpu",
        search_images: int | None = None,
        threads: int | None = None,
        site: Site | None = None,
        brief: Callable[[nn.Module, int], None] | None = None,
        brief_steps: int = 0,
        delivered: Networks | None = None,
    ) -> None:
        if site is not None and brief_steps:
            raise ValueError("workers do not train candidates: brief_steps needs site=None")
        self.space = space
        self.device = device
        self.evaluations = 0
        self.seconds = 0.0
        self._scoring = scoring
        self.task = task
        self._search = None if task.search is None else _sampled(task.search, search_images, scoring.seed)
        scored = 0 if self._search is None else len(self._search)
        # A fit is not to take much longer than the images that batch norm and score take without it.
        for_statistics = scoring.bn_batches * scoring.batch_size
        fit_images = min(scoring.fit_images, (for_statistics + scored) // 4)
        most = for_statistics if scoring.compensate == "off" else max(fit_images, for_statistics)
        # A worker receives this sample, and must not draw from it in another order.
        self._calibration = None if task.calibration is None else _sampled(task.calibration, most, scoring.seed)
        self._networks = Networks(
            space,
            self._calibration,
            scoring.compensate if site is None or site.after_s else "off",
            images=fit_images,
            seed=scoring.seed,
            device=device,
        )
        self._as_delivered = delivered
        self.delivered = None if delivered is None else partial(self._scored_by, delivered)
        self._goals: Any = None
        self._scores: dict[str, float] = {}
        self._threads = site.threads if site is not None and site.after_s else threads
        self._threads_alone, self._site = threads, site
        self._brief, self._brief_steps = brief, brief_steps
        self._workers: Workers | None = None
        self._moved = True

    @property
    def workers(self) -> int:
        """Number of candidates that are scored in parallel now."""
        return 1 if (site := self._started_site()) is None else site.number

    def _started_site(self) -> Site | None:
        """Return where candidates are scored if that is not here, or not yet."""
        site = self._site
        if site is None or self._workers is not None or not site.after_s:
            return site
        if self.seconds < site.after_s:
            return None
        if site.settle() < 2:
            self._here()
        return self._site

    def _here(self) -> None:
        """Score in this process from now on."""
        self.close()
        self._site = self._workers = None

    @property
    def images(self) -> int | None:
        """Number of images that a full evaluation scores; None if a user's function reads them."""
        return None if self._search is None else len(self._search)

    def __call__(self, plan: ChannelPlan, *, floor: float | None = None) -> float:
        """Return the score of the plan's network on the search split, 0..1.

        Args:
            plan: Channels that are kept.
            floor: Stop as soon as this score cannot be reached; the result is then an estimate below it, which is not
                remembered.
        """
        return self.many([plan], floors=[floor])[0]

    def many(
        self,
        plans: Sequence[ChannelPlan],
        *,
        floors: Sequence[float | None] | None = None,
        remember: bool = True,
    ) -> list[float]:
        """Return the score of each plan, in order; several workers score them in parallel.

        Args:
            plans: Channels that are kept; of equal plans the first is scored.
            floors: Floor of each plan, as for `__call__`; None for no floors.
            remember: Whether to cache the results. Results scored in advance must not change what a floor gives.

        Raises:
            CompressorError: A candidate ended one worker after another.
        """
        new: dict[str, tuple[ChannelPlan, float | None]] = {}
        for plan, floor in zip(plans, floors or [None] * len(plans), strict=True):
            if plan.checksum not in self._scores:
                new.setdefault(plan.checksum, (plan, floor))
        started = time.perf_counter()
        scores = self._all_scored(list(new.values())) if new else []
        found = dict(zip(new, scores, strict=True))
        known = self._scores | found
        if remember:
            whole = (key for key, (_, floor) in new.items() if floor is None or found[key] >= floor)
            self._scores.update({key: found[key] for key in whole})
        self.evaluations += len(new)
        self.seconds += time.perf_counter() - started
        return [known[plan.checksum] for plan in plans]

    def _all_scored(self, new: list[tuple[ChannelPlan, float | None]]) -> list[float]:
        site = self._started_site()
        if site is not None:
            try:
                return self._started(site).score(*zip(*new, strict=True))
            except CompressorError as error:
                if not site.after_s:
                    raise
                self._here()
                say(f"Candidates are scored in this process alone. {error.message}")
        return [self.scored(plan, floor=floor) for plan, floor in new]

    def _started(self, site: Site) -> Workers:
        """Return the workers, with the current weights."""
        from compressor.pruning.artefact import channels_last, cpu_tensors

        if self._workers is None:
            plain, images = described(self.space, self.task, self._calibration, self._search)
            plain |= {"scoring": asdict(self._scoring), "device": str(self.device)}
            self._workers = Workers(site, plain, images)
            self._networks.weights_moved()  # what this process has computed for candidates is not used again
        if self._moved:
            self._workers.reweigh(cpu_tensors(self.space.model), channels_last(self.space.model))
            self._moved = False
        return self._workers

    def close(self) -> None:
        """Stop the workers, if there are any."""
        if self._workers is not None:
            self._workers.close()
        elif self._site is not None:
            self._site.stop()
            self._site.close()

    def scored(self, plan: ChannelPlan, *, floor: float | None = None, steps: int | None = None) -> float:
        """Score the network of a plan in this process, without remembering it; `steps` as for `score`."""
        return self._scored_by(self._networks, plan, floor=floor, steps=steps)

    def _scored_by(
        self, networks: Networks, plan: ChannelPlan, *, floor: float | None = None, steps: int | None = None
    ) -> float:
        with _threads(self._threads if networks is self._networks else self._threads_alone):
            network = networks.build(plan)
        return self.score(network, floor=floor, steps=steps, compensated=networks.compensated)

    def score(
        self,
        model: nn.Module,
        *,
        floor: float | None = None,
        steps: int | None = None,
        compensated: bool = False,
    ) -> float:
        """Return the measure of any network on the same images.

        Its weights are trained for `steps` (None for those of every candidate), and its batch-norm statistics are
        replaced, except for those of a compensated network that is not trained.
        """
        kind, how = torch.device(self.device).type, self._scoring
        with _threads(self._threads):
            number = self._brief_steps if steps is None else steps
            if self._brief is not None and number:
                self._brief(model, number)
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=how.mixed_precision == "bf16"):
                size, device = how.batch_size, self.device
                if self._calibration is not None and (not compensated or number):
                    reestimate_batch_norm(
                        model,
                        self._calibration,
                        batches=how.bn_batches,
                        batch_size=size,
                        device=device,
                        seed=how.seed,
                    )
                if self._goals is None:
                    self._goals = self.task.search_goals(
                        self.space.model, self._search, device=device, batch_size=size
                    )
                return self.task.search_score(
                    model, self._search, self._goals, device=device, batch_size=size, floor=floor
                )

    def weights_moved(self) -> None:
        """Forget all scores after the space's model was trained."""
        self._scores.clear()
        self._networks.weights_moved()
        if self._as_delivered is not None:
            self._as_delivered.weights_moved()
        self._goals = None
        self._moved = True
