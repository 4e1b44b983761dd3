"""Scores of networks on a split, and the batch-norm statistics of sliced ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compressor.data import Split
from compressor.models.computed import evaluated
from compressor.training.feeds import Feed
from compressor.training.losses import closeness_at, divergence, logits_of
from export.convert.trees import channels_last

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
        found.append(logits_of(logits).log_softmax(dim=1).cpu())
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

    See `losses.closeness_at`; the divergence is that of the model's class probabilities from the dense network's.

    Args:
        model, split, device, batch_size: As for `accuracy`.
        goals: Log-probabilities of the dense network for the same images, (N, classes).
        floor: Stop as soon as this value cannot be reached, and return the value of the images seen, which is below it.
    """
    total, seen, far = len(split), 0, 0.0
    for logits, labels in _scored_batches(model, split, device, batch_size):
        found = logits_of(logits).log_softmax(dim=1).cpu()
        goal = goals[seen : seen + len(labels)]
        far += divergence(found, goal)
        seen += len(labels)
        if floor is not None and closeness_at(far, total) < floor:
            break
    return closeness_at(far, seen)


def share_right(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the accuracy of predicted classes (N,), 0..1."""
    return float((predicted == labels).double().mean())


def standard_error(share: float, images: int) -> float:
    """Return the standard error of an accuracy (0..1) on this number of images."""
    return float((max(share * (1 - share), 0.0) / max(1, images)) ** 0.5)


def error_of_difference(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the standard error of the difference of two accuracies on the same images.

    Args:
        first, second: Predicted classes of two networks (N,).
        labels: Classes (N,).
    """
    changes = (first == labels).double() - (second == labels).double()
    return float(changes.std(correction=0) / max(1, len(labels)) ** 0.5)


@contextmanager
def recent_statistics(model: nn.Module, steps: int) -> Iterator[None]:
    """Keep running statistics of batch norm from being older than a tenth of a training, within the context.

    Mobile networks of torchvision have a momentum of 0.01, for trainings of many thousand steps: after a few hundred,
    their statistics are still those of weights that are gone. A momentum is raised to 10 / steps, but not above 0.1,
    and never lowered; trainings of 1,000 steps and more keep one of 0.01.

    Args:
        model: Network that is trained.
        steps: Steps of the whole training.
    """
    norms = [module for module in model.modules() if isinstance(module, _NORMS) and module.momentum is not None]
    before = [float(norm.momentum or 0) for norm in norms]
    try:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = max(momentum, min(0.1, 10 / max(1, steps)))
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def reestimate_batch_norm(
    model: nn.Module,
    feed: Feed,
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
        feed: Inputs, used without augmentation.
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
        stream = feed.batches(batch_size, shuffle_seed=seed, device=device, drop_last=True)
        for _, batch in zip(range(batches), stream, strict=False):
            model(*channels_last(feed.inputs(batch)))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
