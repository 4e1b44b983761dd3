"""Scoring: accuracy on a split, batch-norm statistics for changed networks, and both together for plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from compressor.data import Split

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.pruning.space import PruningSpace
    from compressor.search.workers import Site, Workers

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def accuracy(
    model: nn.Module,
    split: Split,
    *,
    device: str | torch.device = "cpu",
    max_batches: int | None = None,
    batch_size: int = 256,
    floor: float | None = None,
) -> float:
    """Share of a split's images that the model classifies rightly, 0..1.

    Args:
        model: Evaluated where it lies, which must be `device`; its mode is put back.
        split: Gone through in its stored order.
        device: Where the batches are put.
        max_batches: Stop after so many, and give the share of what was seen.
        batch_size: Images in a batch.
        floor: Stop as soon as this share cannot be reached, and give the share of what was seen, which is
            below it.
    """
    total = len(split) if max_batches is None else min(len(split), max_batches * batch_size)
    right = seen = 0
    with _evaluating(model), torch.no_grad():
        for index, (images, labels) in enumerate(split.batches(batch_size, device=device)):
            if index == max_batches:
                break
            logits = model(images.contiguous(memory_format=torch.channels_last))
            right += int((logits.argmax(dim=1) == labels).sum())
            seen += len(labels)
            if floor is not None and right + total - seen < floor * total:
                break
    return right / max(1, seen)


def predictions(
    model: nn.Module, split: Split, *, device: str | torch.device = "cpu", batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes that a model gives to a split's images, and their labels: int64 (N,) each, on the CPU.

    Args:
        model, device, batch_size: As for `accuracy`.
        split: Gone through in its stored order.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with _evaluating(model), torch.no_grad():
        for images, labels in split.batches(batch_size, device=device):
            logits = model(images.contiguous(memory_format=torch.channels_last))
            found.append((logits.argmax(dim=1).cpu(), labels.cpu()))
    return torch.cat([classes for classes, _ in found]), torch.cat([labels for _, labels in found])


def standard_error(share: float, images: int) -> float:
    """Standard error of an accuracy (0..1) that was counted on so many images."""
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

    A slim network's activations have other means and variances than the dense one's; without this its
    accuracy says little about it.

    Args:
        model: Lies on `device`; a network without batch-norm is left alone.
        split: Training images, taken without augmentation.
        batches: How many are averaged.
        batch_size: Images in each.
        device: Where the batches are put.
        seed: Chooses the images; same seed, same images.
    """
    norms = [
        module for module in model.modules() if isinstance(module, _NORMS) and module.track_running_stats
    ]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    with _evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's way of saying: average over all batches alike
            norm.train()
        stream = split.batches(batch_size, shuffle_seed=seed, device=device, drop_last=True)
        for _, (images, _labels) in zip(range(batches), stream, strict=False):
            model(images.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Another number of torch's threads, and afterwards the one before."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


class Splits(Protocol):
    """What an evaluator reads of a data set."""

    @property
    def train(self) -> Split: ...

    @property
    def search(self) -> Split: ...


class Evaluator:
    """Scores plans: the accuracy of the slim network on the search split, with re-estimated batch-norm.

    A plan is scored once as long as the weights stay as they are; `weights_moved` says that they did not.

    Args:
        space: Applies plans to its model's current weights.
        data: Its training split gives the statistics, its search split the accuracy.
        device: Where networks are scored.
        bn_batches: Batches from which statistics are estimated.
        batch_size: Images in these and in the scored batches.
        search_images: The most images of the search split that are used; None for all.
        seed: Chooses the images.
        mixed_precision: "bf16" scores with forward passes in that precision, all candidates alike; "no" in float32.
        threads: torch's while it scores here; None leaves them as they are.
        site: where worker processes score instead, each with threads of its own; None scores in this process. The
            accuracies are the same to the last digit where a worker has as many threads as this process would.
        brief: Trains a candidate's network in place for so many steps; None leaves all as they are sliced.
        brief_steps: How many, for every candidate whose score asks for no other number; only in this process.

    Attributes:
        evaluations: Networks scored so far; answers from the cache do not count.
        seconds: Time spent on them.
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
        self._train = data.train.sample(bn_batches * batch_size, seed).in_memory()
        whole = search_images is None or search_images >= len(data.search)
        self._search = (data.search if whole else data.search.sample(search_images or 0, seed)).in_memory()
        self._scores: dict[str, float] = {}
        self._threads, self._site = threads, site
        self._brief, self._brief_steps = brief, brief_steps
        self._workers: Workers | None = None
        self._moved = True

    @property
    def workers(self) -> int:
        """Candidates that can be scored at a time."""
        return 1 if self._site is None else self._site.number

    @property
    def images(self) -> int:
        """Images that a full evaluation scores."""
        return len(self._search)

    def __call__(self, plan: ChannelPlan, *, floor: float | None = None) -> float:
        """Accuracy of the plan's network on the search split, 0..1.

        Args:
            plan: Which channels are kept.
            floor: Give up as soon as this accuracy is out of reach; the answer is then an estimate below
                it, which is not remembered.
        """
        return self.many([plan], floors=[floor])[0]

    def many(
        self,
        plans: Sequence[ChannelPlan],
        *,
        floors: Sequence[float | None] | None = None,
        remember: bool = True,
    ) -> list[float]:
        """Accuracy of each plan, in their order; several workers score them side by side.

        Args:
            plans: which channels are kept; of equal ones the first is scored.
            floors: for each plan what `__call__` takes; left out, none is given up.
            remember: whether a later call need not score them again. What is scored ahead must not change what a floor
                gives.

        Raises:
            CompressorError: a candidate ended one worker after another.
        """
        new: dict[str, tuple[ChannelPlan, float | None]] = {}
        for plan, floor in zip(plans, floors or [None] * len(plans), strict=True):
            if plan.checksum not in self._scores:
                new.setdefault(plan.checksum, (plan, floor))
        started = time.perf_counter()
        if self._site is None:
            scores = [
                self.score(self.space.apply(plan).to(self.device), floor=floor)
                for plan, floor in new.values()
            ]
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
        """The workers, with the weights of the moment."""
        from compressor.pruning.blueprint import channels_last, weights
        from compressor.search.worker_data import described
        from compressor.search.workers import Workers

        if self._workers is None:
            options = {
                "device": str(self.device),
                "bn_batches": self._bn_batches,
                "batch_size": self._batch_size,
                "seed": self._seed,
                "mixed_precision": "bf16" if self._bf16 else "no",
            }
            self._workers = Workers(site, *described(self.space, self._train, self._search, options))
        if self._moved:
            self._workers.reweigh(weights(self.space.model), channels_last(self.space.model))
            self._moved = False
        return self._workers

    def close(self) -> None:
        """End the workers, if there are any."""
        if self._workers is not None:
            self._workers.close()
        elif self._site is not None:
            self._site.stop()
            self._site.close()

    def score(self, model: nn.Module, *, floor: float | None = None, steps: int | None = None) -> float:
        """Accuracy of any network on the same images; its weights are trained for `steps`, its batch-norm statistics
        are replaced. Left out, the steps are those of every candidate."""
        kind = torch.device(self.device).type
        with _threads(self._threads):
            if self._brief is not None and (number := self._brief_steps if steps is None else steps):
                self._brief(model, number)
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=self._bf16):
                size, device = self._batch_size, self.device
                reestimate_batch_norm(
                    model,
                    self._train,
                    batches=self._bn_batches,
                    batch_size=size,
                    device=device,
                    seed=self._seed,
                )
                return accuracy(model, self._search, device=device, batch_size=size, floor=floor)

    def weights_moved(self) -> None:
        """Forget all scores: the space's model was trained meanwhile."""
        self._scores.clear()
        self._moved = True
