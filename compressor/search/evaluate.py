"""Scoring: accuracy on a split, batch-norm statistics for sliced networks, and the accuracy of plans."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from compressor.data import Split
from compressor.models.computed import evaluated
from compressor.search.networks import Networks
from compressor.search.workers import Site, Workers, described

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _scored_batches(
    model: nn.Module,
    split: Split,
    device: str | torch.device,
    batch_size: int,
    max_batches: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits and labels of a split's batches, in stored order; the training mode is restored at the end."""
    with evaluated(model):
        for images, labels in itertools.islice(split.batches(batch_size, device=device), max_batches):
            with torch.no_grad():
                logits = model(images.contiguous(memory_format=torch.channels_last))
            yield logits, labels


def accuracy(
    model: nn.Module,
    split: Split,
    *,
    device: str | torch.device = "cpu",
    max_batches: int | None = None,
    batch_size: int = 256,
    floor: float | None = None,
) -> float:
    """Return the share of a split's images that the model classifies correctly, 0..1.

    Args:
        model: Network on `device`; its training mode is restored.
        split: Split, read in its stored order.
        device: Device of the batches.
        max_batches: Stop after this number of batches, and return the share of the images seen.
        batch_size: Images per batch.
        floor: Stop as soon as this share cannot be reached, and return the share of the images seen, which is
            below it.
    """
    total = len(split) if max_batches is None else min(len(split), max_batches * batch_size)
    right = seen = 0
    for logits, labels in _scored_batches(model, split, device, batch_size, max_batches):
        right += int((logits.argmax(dim=1) == labels).sum())
        seen += len(labels)
        if floor is not None and right + total - seen < floor * total:
            break
    return right / max(1, seen)


def predictions(
    model: nn.Module, split: Split, *, device: str | torch.device = "cpu", batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a model's predicted classes of a split's images, and their labels: int64 (N,) each, on the CPU.

    Args:
        model, device, batch_size: As for `accuracy`.
        split: Split, read in its stored order.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for logits, labels in _scored_batches(model, split, device, batch_size):
        found.append((logits.argmax(dim=1).cpu(), labels.cpu()))
    return torch.cat([classes for classes, _ in found]), torch.cat([labels for _, labels in found])


def log_probabilities(
    model: nn.Module, split: Split, *, device: str | torch.device = "cpu", batch_size: int = 256
) -> torch.Tensor:
    """Return a model's log-probabilities of the classes for a split's images, float32 (N, classes), on the CPU."""
    found = []
    for logits, _ in _scored_batches(model, split, device, batch_size):
        found.append(logits.float().log_softmax(dim=1).cpu())
    return torch.cat(found)


def closeness(
    model: nn.Module,
    split: Split,
    goals: torch.Tensor,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    floor: float | None = None,
) -> float:
    """Return how close a model's outputs are to the dense network's, 0..1; labels are not used.

    It is exp(-d), d the mean over the images of the Kullback-Leibler divergence of the model's class probabilities from
    the dense network's, in nats: 1 for equal outputs.

    Args:
        model, split, device, batch_size: As for `accuracy`.
        goals: Log-probabilities of the dense network for the same images, (N, classes).
        floor: Stop as soon as this value cannot be reached, and return the value of the images seen, which is below it.
    """
    total, seen, divergence = len(split), 0, 0.0
    for logits, labels in _scored_batches(model, split, device, batch_size):
        found = logits.float().log_softmax(dim=1).cpu()
        goal = goals[seen : seen + len(labels)]
        divergence += float(nn.functional.kl_div(found, goal, reduction="sum", log_target=True))
        seen += len(labels)
        if floor is not None and math.exp(-max(0.0, divergence) / total) < floor:
            break
    return math.exp(-max(0.0, divergence) / max(1, seen))


def standard_error(share: float, images: int) -> float:
    """Return the standard error of an accuracy (0..1) on this number of images."""
    return float((max(share * (1 - share), 0.0) / max(1, images)) ** 0.5)


def reestimate_batch_norm(
    model: nn.Module,
    split: Split,
    *,
    batches: int = 10,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> None:
    """Replace the running statistics by the plain mean over a few batches, in place.

    A slim network's activations have other means and variances than the dense one's; without this step its
    accuracy is not meaningful.

    Args:
        model: Network on `device`; without batch norm it is not changed.
        split: Training images, used without augmentation.
        batches: Number of batches to average.
        batch_size: Images per batch.
        device: Device of the batches.
        seed: Seed that chooses the images.
    """
    norms = [
        module for module in model.modules() if isinstance(module, _NORMS) and module.track_running_stats
    ]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    with evaluated(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch then averages over all batches with equal weight
            norm.train()
        stream = split.batches(batch_size, shuffle_seed=seed, device=device, drop_last=True)
        for _, (images, _labels) in zip(range(batches), stream, strict=False):
            model(images.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


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


class Splits(Protocol):
    """Splits of a data set that an evaluator reads."""

    @property
    def train(self) -> Split: ...

    @property
    def search(self) -> Split: ...


class Evaluator:
    """Scores plans: the accuracy of the slim network on the search split, or its closeness to the dense one there.

    The network is compensated, or it is only sliced and its batch norm is re-estimated. A plan is scored once while
    the weights stay the same; call `weights_moved` after they change.

    Args:
        space: Applies plans to its model's current weights.
        data: Data whose training split gives the statistics, and whose search split gives the accuracy.
        device: Device for scoring.
        bn_batches: Number of batches from which statistics are estimated.
        batch_size: Images per batch, in these and in the scored batches.
        search_images: Maximum number of images of the search split; None for all.
        seed: Seed that chooses the images.
        mixed_precision: "bf16" scores all candidates with forward passes in that precision; "no" in float32.
        threads: Number of torch's threads while scoring in this process; None for the current number.
        site: Where worker processes score instead, each with its own threads; None scores in this process. The
            accuracies are bit-identical if a worker has as many threads as this process would.
        brief: Trains a candidate's network in place for a number of steps; None trains none.
        brief_steps: Number of these steps for every candidate without another number; only in this process.
        compensate: How candidates are compensated before they are scored: "off", or a method of `compensate`.
        fit_images: Number of training images that compensation fits to.
        measure: "accuracy", or "closeness" to the dense network's outputs, for which labels are not used.

    Attributes:
        evaluations: Number of networks scored so far; answers from the cache do not count.
        seconds: Time spent on them, in seconds.
    """

    def __init__(
        self,
        space: PruningSpace,
        data: Splits,
        *,
        device: str | torch.device = "cpu",
        bn_batches: int = 10,
        batch_size: int = 128,
        search_images: int | None = None,
        seed: int = 0,
        mixed_precision: str = "no",
        threads: int | None = None,
        site: Site | None = None,
        brief: Callable[[nn.Module, int], None] | None = None,
        brief_steps: int = 0,
        compensate: str = "off",
        fit_images: int = 512,
        measure: str = "accuracy",
    ) -> None:
        if site is not None and brief_steps:
            raise ValueError("workers do not train candidates: brief_steps needs site=None")
        self.space = space
        self.device = device
        self.evaluations = 0
        self.seconds = 0.0
        self._bf16 = mixed_precision == "bf16"
        self._bn_batches, self._batch_size, self._seed = bn_batches, batch_size, seed
        # Decoded once: a search reads the same images for every candidate.
        whole = search_images is None or search_images >= len(data.search)
        self._search = (data.search if whole else data.search.sample(search_images or 0, seed)).in_memory()
        # A fit is not to take much longer than the images that batch norm and score take without it.
        fit_images = min(fit_images, (bn_batches * batch_size + len(self._search)) // 4)
        most = bn_batches * batch_size if compensate == "off" else max(fit_images, bn_batches * batch_size)
        # A worker receives this sample, and must not draw from it in another order.
        few = len(data.train) <= most
        self._train = (data.train if few else data.train.sample(most, seed)).in_memory()
        self._networks = Networks(
            space, self._train, compensate if site is None else "off", images=fit_images, seed=seed, device=device
        )
        self._compensate, self._fit_images = compensate, fit_images
        self._measure = measure
        self._goals: torch.Tensor | None = None
        self._scores: dict[str, float] = {}
        self._threads, self._site = threads, site
        self._brief, self._brief_steps = brief, brief_steps
        self._workers: Workers | None = None
        self._moved = True

    @property
    def workers(self) -> int:
        """Number of candidates that are scored in parallel."""
        return 1 if self._site is None else self._site.number

    @property
    def images(self) -> int:
        """Number of images that a full evaluation scores."""
        return len(self._search)

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
        if self._site is None:
            scores = [self.scored(plan, floor=floor) for plan, floor in new.values()]
        else:
            scores = self._started(self._site).score(*zip(*new.values(), strict=True)) if new else []
        found = dict(zip(new, scores, strict=True))
        known = self._scores | found
        if remember:
            whole = (key for key, (_, floor) in new.items() if floor is None or found[key] >= floor)
            self._scores.update({key: found[key] for key in whole})
        self.evaluations += len(new)
        self.seconds += time.perf_counter() - started
        return [known[plan.checksum] for plan in plans]

    def _started(self, site: Site) -> Workers:
        """Return the workers, with the current weights."""
        from compressor.pruning.artefact import channels_last, cpu_tensors

        if self._workers is None:
            options = {
                "device": str(self.device),
                "bn_batches": self._bn_batches,
                "batch_size": self._batch_size,
                "seed": self._seed,
                "mixed_precision": "bf16" if self._bf16 else "no",
                "compensate": self._compensate,
                "fit_images": self._fit_images,
                "measure": self._measure,
            }
            self._workers = Workers(site, *described(self.space, self._train, self._search, options))
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
        with _threads(self._threads):
            network = self._networks.build(plan)
        return self.score(network, floor=floor, steps=steps, compensated=self._networks.compensated)

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
        kind = torch.device(self.device).type
        with _threads(self._threads):
            number = self._brief_steps if steps is None else steps
            if self._brief is not None and number:
                self._brief(model, number)
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=self._bf16):
                size, device = self._batch_size, self.device
                if not compensated or number:
                    reestimate_batch_norm(
                        model,
                        self._train,
                        batches=self._bn_batches,
                        batch_size=size,
                        device=device,
                        seed=self._seed,
                    )
                if self._measure == "accuracy":
                    return accuracy(model, self._search, device=device, batch_size=size, floor=floor)
                if self._goals is None:
                    self._goals = log_probabilities(self.space.model, self._search, device=device, batch_size=size)
                return closeness(
                    model, self._search, self._goals, device=device, batch_size=size, floor=floor
                )

    def weights_moved(self) -> None:
        """Forget all scores after the space's model was trained."""
        self._scores.clear()
        self._networks.weights_moved()
        self._goals = None
        self._moved = True
